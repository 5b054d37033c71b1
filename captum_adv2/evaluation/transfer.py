# SPDX-License-Identifier: MIT
"""Whether what fools one interpreter, or one classifier, fools another (§5 Q2, Table 9).

Any adversarial images make a row, those of attacks that look at no map too. Every row is judged by
the same target classes, so attacks are best targeted by label::

    def craft(attack):
        attack.set_mode_targeted_by_label(quiet=True)
        return attack(images, target)

    adversarial = {name: craft(ADV2(model, g)) for name, g in interpreters.items()}
    adversarial["PGD"] = craft(torchattacks.PGD(model))
    print(transfer.matrix(model, interpreters, images, adversarial, target))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from captum_adv2.checks import expect_images, expect_model
from captum_adv2.evaluation.evaluate import Report, evaluate
from captum_adv2.interpreters.base import Interpreter, expect_interpreter
from captum_adv2.types import Explanation

__all__ = ["Matrix", "across", "matrix"]


class Matrix(NamedTuple):
    """Reports on every pair of a source, a row, and a target, a column.

    Attributes:
        sources: What made the adversarial images, a name a row.
        targets: What they are tried on, a name a column.
        reports: Row by row; see `Report`.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    reports: tuple[tuple[Report, ...], ...]

    @property
    def l1(self) -> Tensor:
        """L1 distances of adversarial and benign map, ``(sources, targets, B)``."""
        return self.each("l1")

    @property
    def success(self) -> Tensor:
        """Whether the column's classifier says the target class, ``(sources, targets, B)``."""
        return self.each("success")

    def each(self, measure: str) -> Tensor:
        """Return a measure of `Report` image by image, ``(sources, targets, B)``.

        Args:
            measure: ``"success"``, ``"confidence"``, ``"l1"``, ``"l2"``, ``"iou"`` or ``"linf"``.

        Raises:
            ValueError: Another measure.
        """
        _expect_measure(measure, Report._fields[:6])
        rows = [torch.stack([getattr(report, measure) for report in row]) for row in self.reports]
        return torch.stack(rows)

    def mean(self, measure: str = "l1") -> Tensor:
        """Return an entry of `Report.summary`, float64 ``(sources, targets)``.

        Distances are means over the successful images, NaN where there are none.

        Args:
            measure: ``"asr"``, ``"confidence"``, ``"l1"``, ``"l2"``, ``"iou"`` or ``"linf"``.

        Raises:
            ValueError: Another measure.
        """
        _expect_measure(measure, tuple(self.reports[0][0].summary()))
        entries = [[report.summary()[measure] for report in row] for row in self.reports]
        return torch.tensor(entries, dtype=torch.float64)

    def __str__(self) -> str:
        first = max(map(len, self.sources))
        width = max(15, *map(len, self.targets))
        lines = ["".ljust(first), *(name.ljust(first) for name in self.sources)]
        for column, name in enumerate(self.targets):
            lines[0] += f"  {name:>{width}}"
            for number, row in enumerate(self.reports, 1):
                entry = row[column].summary()
                lines[number] += f"  {entry['l1']:.4f} ({entry['asr']:.0%})".rjust(width + 2)
        return "\n".join(["L1 over successes (ASR); row: source, column: target", *lines])


def matrix(
    model: nn.Module,
    interpreters: Mapping[str, Interpreter],
    images: Tensor,
    adversarial: Mapping[str, Tensor],
    target: Tensor,
    labels: Tensor | None = None,
    quantize: bool = True,
) -> Matrix:
    """Try adversarial images of every source on every interpreter of a model (Table 9).

    Convention:
        As in `evaluate`, which measures each pair: benign maps explain the images' own classes,
        adversarial maps the target classes, after rounding to 8 bits.

    Args:
        model: The classifier.
        interpreters: Interpreters of it by name, the columns.
        images: Clean images ``(B, C, H, W)`` in [0, 1].
        adversarial: Adversarial images by their source's name, the rows.
        target: The attacker's class ``(B,)``, the same for all sources.
        labels: Class of the benign map ``(B,)``; default: the model's prediction on ``images``.
        quantize: Round adversarial images to multiples of 1/255.

    Returns:
        A `Matrix`; ``print`` it for the table.

    Raises:
        TypeError: An argument of a wrong type.
        ValueError: An argument of a wrong shape or range, or without an entry.

    >>> from captum_adv2.interpreters import Gradient
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    >>> images, target = torch.rand(2, 1, 4, 4), torch.tensor([0, 1])
    >>> interpreters = {"GRAD": Gradient(model), "fine": Gradient(model, pool=1)}
    >>> found = matrix(model, interpreters, images, {"none": images}, target, labels=target)
    >>> found.l1.shape, found.mean().shape
    (torch.Size([1, 2, 2]), torch.Size([1, 2]))
    """
    expect_model(model)
    _expect_entries(interpreters, "interpreters")
    for name, interpreter in interpreters.items():
        expect_interpreter(interpreter, f"interpreters[{name!r}]")
    columns = {name: (model, interpreter) for name, interpreter in interpreters.items()}
    return _table(columns, images, adversarial, target, labels, quantize)


def across(
    models: Mapping[str, nn.Module],
    build: Callable[[nn.Module], Interpreter],
    images: Tensor,
    adversarial: Mapping[str, Tensor],
    target: Tensor,
    labels: Tensor | None = None,
    quantize: bool = True,
) -> Matrix:
    """Try adversarial images of every source on other classifiers, each with its own interpreter.

    Args:
        models: Classifiers by name, the columns.
        build: What makes an interpreter from a model, such as the class ``CAM``.
        images: Clean images ``(B, C, H, W)`` in [0, 1].
        adversarial: Adversarial images by their source's name, the rows.
        target: The attacker's class ``(B,)``, the same for all sources.
        labels: Class of the benign maps ``(B,)``; default: each model's prediction on ``images``.
        quantize: Round adversarial images to multiples of 1/255.

    Returns:
        A `Matrix`: ``mean("asr")`` says how often each model is fooled.

    Raises:
        TypeError: An argument of a wrong type.
        ValueError: An argument of a wrong shape or range, or without an entry.
    """
    _expect_entries(models, "models")
    if not callable(build):
        raise TypeError(f"expected build to be a function, got {type(build).__name__}; pass CAM")
    columns = {}
    for name, model in models.items():
        interpreter = build(expect_model(model))
        columns[name] = (model, expect_interpreter(interpreter, "what build returns"))
    return _table(columns, images, adversarial, target, labels, quantize)


@final
class _Once(Interpreter):
    """Explains the clean images once, however many sources they are compared with."""

    def __init__(self, interpreter: Interpreter, clean: Tensor) -> None:
        super().__init__(interpreter.model)
        self._interpreter = interpreter
        self._clean = clean
        self._benign: Explanation | None = None

    def explain(self, images: Tensor, target: Tensor) -> Explanation:
        if images is not self._clean:
            return self._interpreter.explain(images, target)
        if self._benign is None:
            self._benign = self._interpreter.explain(images, target)
        return self._benign


def _table(
    columns: Mapping[str, tuple[nn.Module, Interpreter]],
    images: Tensor,
    adversarial: Mapping[str, Tensor],
    target: Tensor,
    labels: Tensor | None,
    quantize: bool,
) -> Matrix:
    expect_images(images)
    _expect_entries(adversarial, "adversarial")
    for name, given in adversarial.items():  # all of them before the first, which may take long
        shape = tuple(expect_images(given, f"adversarial[{name!r}]").shape)
        if shape != images.shape:
            raise ValueError(
                f"expected adversarial[{name!r}] of shape {tuple(images.shape)}, got {shape}"
            )
    once = [(model, _Once(interpreter, images)) for model, interpreter in columns.values()]
    reports = tuple(
        tuple(evaluate(model, g, images, given, target, labels, quantize) for model, g in once)
        for given in adversarial.values()
    )
    return Matrix(tuple(adversarial), tuple(columns), reports)


def _expect_entries(value: Any, name: str) -> None:
    if not isinstance(value, Mapping):
        raise TypeError(
            f"expected {name} to be a mapping, got {type(value).__name__}; "
            "pass a dictionary by name"
        )
    if not value:
        raise ValueError(f"expected at least one entry in {name}, got none")


def _expect_measure(value: Any, known: tuple[str, ...]) -> None:
    if not (isinstance(value, str) and value in known):
        raise ValueError(f"expected measure from {', '.join(known)}, got {value!r}")
