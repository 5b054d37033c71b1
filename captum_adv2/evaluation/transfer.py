# SPDX-License-Identifier: MIT
"""Transfer of attacks to other interpreters and to other classifiers (§5 Q2, Table 9).

Any adversarial images make a row, also those of attacks on the prediction alone. Every row is
judged by the same target classes, so attacks are best targeted by label::

    def craft(attack):
        attack.set_mode_targeted_by_label(quiet=True)
        return attack(images, target)

    adversarial = {name: craft(ADV2(model, g)) for name, g in interpreters.items()}
    adversarial["PGD"] = craft(torchattacks.PGD(model))
    print(transfer.matrix(model, interpreters, images, adversarial, target))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from captum_adv2 import spec
from captum_adv2.evaluation.evaluate import Report, evaluate
from captum_adv2.interpreters.base import Interpreter
from captum_adv2.spec import Classes, Images, checked


class Matrix(NamedTuple):
    """Reports row by row: sources of adversarial images, by what they are tried on, the targets."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    reports: tuple[tuple[Report, ...], ...]

    @checked
    def each(self, measure: Literal["success", "confidence", "l1", "l2", "iou", "linf"]) -> Tensor:
        """Return a measure of `Report` image by image, ``(sources, targets, B)``."""
        rows = [torch.stack([getattr(report, measure) for report in row]) for row in self.reports]
        return torch.stack(rows)

    @checked
    def mean(
        self, measure: Literal["asr", "confidence", "l1", "l2", "iou", "linf"] = "l1"
    ) -> Tensor:
        """Return an entry of `Report.summary`, float64 ``(sources, targets)``."""
        entries = [[report.summary()[measure] for report in row] for row in self.reports]
        return torch.tensor(entries, dtype=torch.float64)

    def __str__(self) -> str:
        first = max(map(len, self.sources))
        width = max(15, *map(len, self.targets))
        lines = [" " * first + "".join(f"  {name:>{width}}" for name in self.targets)]
        for name, l1, asr in zip(self.sources, self.mean("l1"), self.mean("asr"), strict=True):
            cells = [f"{a:.4f} ({b:.0%})" for a, b in zip(l1, asr, strict=True)]
            lines.append(name.ljust(first) + "".join(f"  {cell:>{width}}" for cell in cells))
        return "\n".join(["L1 over successes (ASR); row: source, column: target", *lines])


@checked
def matrix(
    model: nn.Module,
    interpreters: Mapping[str, Interpreter],
    images: Images,
    adversarial: Mapping[str, Images],
    target: Classes,
    labels: Classes | None = None,
    quantize: bool = True,
) -> Matrix:
    """Try adversarial images of every source on every interpreter of a model (Table 9).

    Interpreters by name are the columns, adversarial images by their source's name the rows. Every
    entry is the report of `evaluate`, which describes the other arguments.

    >>> from captum_adv2.interpreters import Gradient
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    >>> images, target = torch.rand(2, 1, 4, 4), torch.tensor([0, 1])
    >>> interpreters = {"GRAD": Gradient(model), "fine": Gradient(model, pool=1)}
    >>> found = matrix(model, interpreters, images, {"none": images}, target, labels=target)
    >>> found.each("l1").shape, found.mean().shape
    (torch.Size([1, 2, 2]), torch.Size([1, 2]))
    """
    columns = {name: (model, interpreter) for name, interpreter in interpreters.items()}
    return _matrix(columns, adversarial, images, target, labels, quantize)


@checked
def across(
    models: Mapping[str, nn.Module],
    build: Callable[[nn.Module], Interpreter],
    images: Images,
    adversarial: Mapping[str, Images],
    target: Classes,
    labels: Classes | None = None,
    quantize: bool = True,
) -> Matrix:
    """Try adversarial images of every source on other classifiers, each with its own interpreter.

    The columns are ``models`` by name, and ``build``, such as the class ``CAM``, makes each model's
    interpreter; ``mean("asr")`` is the share of images that fool it. The rest is as in `matrix`.
    """
    columns = {name: (model, build(model)) for name, model in models.items()}
    return _matrix(columns, adversarial, images, target, labels, quantize)


def _matrix(
    columns: Mapping[str, tuple[nn.Module, Interpreter]],
    adversarial: Mapping[str, Tensor],
    images: Tensor,
    *others: Any,
) -> Matrix:
    """Evaluate every source on every column; ``others`` are further arguments of `evaluate`."""
    if not (columns and adversarial):
        raise ValueError("expected at least one source and one target, got none")
    for name, given in adversarial.items():  # all of them before the first map, which may be slow
        spec.expect_shape(given, images.shape, f"adversarial[{name!r}]")
    reports = []
    for model, interpreter in columns.values():
        column: list[Report] = []
        for given in adversarial.values():
            benign = column[0].benign_maps if column else None
            column.append(evaluate(model, interpreter, images, given, *others, benign_maps=benign))
        reports.append(column)
    return Matrix(tuple(adversarial), tuple(columns), tuple(zip(*reports, strict=True)))
