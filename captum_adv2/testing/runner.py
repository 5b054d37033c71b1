# SPDX-License-Identifier: MIT
"""`check_interpreter`: all checks, on drawn networks or on an interpreter of the caller's own."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import SkipTest

import hypothesis
import torch
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from captum_adv2.interpreters.base import Interpreter, eval_mode
from captum_adv2.spec import Count, Images, Index, checked
from captum_adv2.testing import drawn
from captum_adv2.testing.checks import CHECKS, Attributions, Build, Check, built, class_count
from captum_adv2.testing.traces import unchanged


@dataclass(frozen=True)
class CheckReport:
    """Names of the checks that hold, and of those not made, with reasons; prints as a list."""

    interpreter: str
    held: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.interpreter}: {len(self.held)} of {len(CHECKS)} checks hold"]
        lines += [f"  held: {', '.join(self.held)}"]
        lines += [f"  not checked: {name} ({reason})" for name, reason in self.skipped.items()]
        return "\n".join(lines)


@checked
def check_interpreter(
    interpreter: Interpreter | Build,
    images: Images | tuple[Count, Count, Count] | SearchStrategy[Tensor] | None = None,
    *,
    max_examples: Count = 10,
    skip: Collection[str] = (),
    seed: Index | None = 0,
    attributions: Attributions | None = None,
) -> CheckReport:
    """Run every check that applies on an interpreter; raise at the first that fails.

    Args:
        interpreter: A class, or function, that makes an interpreter from a model: small networks
            are drawn. Or an interpreter, on a model of your own: only images are drawn.
        images: A batch ``(B, C, H, W)``, a shape ``(C, H, W)``, or a strategy for batches, of three
            channels where networks are drawn. Default: small images; for an interpreter, 32 x 32.
            Degenerate images are made of these.
        max_examples: Number of examples of each check.
        skip: Names of checks to leave out, or a mapping from names to reasons.
        seed: Seed of hypothesis: the same examples in every run, and no example database. With
            ``None``, new ones in each run, and the database of the profile in use.
        attributions: For a method that promises completeness: interpreter, images and target to
            signed attributions, batch first, and the sums ``(B,)`` they promise.

    Raises:
        AssertionError: A check fails. The message has its name, the expected and the actual value,
            and the image; the notes have the example, shrunk.

    >>> from captum_adv2.interpreters import CAM
    >>> report = check_interpreter(CAM, max_examples=1, skip={"scaling": "to show a reason"})
    >>> print(str(report).splitlines()[-2])
      not checked: scaling (to show a reason)
    """
    reasons = dict(skip) if isinstance(skip, Mapping) else dict.fromkeys(skip, "as asked")
    if unknown := list(reasons.keys() - CHECKS.keys()):
        raise ValueError(f"expected skip from {list(CHECKS)}, got {unknown}")
    own = isinstance(interpreter, Interpreter)
    source: _Own | _Drawn = (_Own if own else _Drawn)(interpreter, images)
    report = CheckReport(getattr(interpreter, "__name__", repr(interpreter)))
    # Around all of them, for what only the very first call leaves behind.
    with unchanged(source.model):
        for name, check in CHECKS.items():
            extra = {"attributions": attributions} if name == "completeness" else {}
            try:
                if name in reasons:
                    raise SkipTest(reasons[name])
                _run(name, check, source, max_examples, seed, **extra)
            except SkipTest as reason:
                report.skipped[name] = str(reason)
            except AssertionError as error:
                error.args = (f"{name}: {error}",)
                raise
            except Exception as error:
                error.add_note(f"raised in the check {name!r}")
                raise
            else:
                report.held.append(name)
    return report


class _Drawn:
    """Examples on drawn networks."""

    model = None
    classes = drawn.CLASSES

    def __init__(self, build: Any, images: Any) -> None:
        self.build, self.images = build, partial(_images, images)
        self.channels = 3
        if isinstance(images, Tensor | tuple):
            self.channels = images.shape[1] if isinstance(images, Tensor) else images[0]

    def networks(self, check: Check) -> dict[str, SearchStrategy[Any]]:
        smooth: Any = {"activations": ("SiLU", "GELU")} if check.smooth else {}
        return {"network": drawn.networks(channels=self.channels, **smooth)}

    def arguments(self, check: Check, images: Tensor, network: Any) -> tuple[Any, ...]:
        images = images.double() if check.exact else images
        network = network.to(images.dtype)
        if check.rebuilt:
            return self.build, network, images
        return built(self.build, network), images


class _Own:
    """Examples for the caller's interpreter, on its model's device, in its dtype or in double."""

    def __init__(self, interpreter: Any, images: Any) -> None:
        self.interpreter, self.model = interpreter, interpreter.model
        parameters = [] if self.model is None else list(self.model.parameters())
        channels = next((p.shape[1] for p in parameters if p.ndim == 4), 3)
        self.images = partial(_images, (channels, 32, 32) if images is None else images)
        self.like = parameters[0].detach() if parameters else torch.zeros(())
        probe = hypothesis.find(self.images("random"), lambda _: True).to(self.like)
        with eval_mode(self.model):
            self.wide = _widened(interpreter, probe)
            self.classes = class_count(interpreter, probe)

    def networks(self, check: Check) -> dict[str, SearchStrategy[Any]]:
        if check.drawn:
            raise SkipTest("needs drawn networks; pass what makes the interpreter from a model")
        return {}

    def arguments(self, check: Check, images: Tensor) -> tuple[Any, ...]:
        if check.exact and self.wide is not None:
            return self.wide, images.to(self.like.device, torch.float64)
        return self.interpreter, images.to(self.like)


def _images(images: Any, kind: str) -> SearchStrategy[Tensor]:
    """Draw images of a kind: given ones, or of a shape, or by a strategy."""
    if isinstance(images, tuple | None):
        return drawn.images(images, kinds=[kind])
    given = st.just(images) if isinstance(images, Tensor) else images
    return given.map(drawn.KINDS[kind])


def _widened(interpreter: Interpreter, images: Tensor) -> Interpreter | None:
    """Return a copy in double precision, or ``None`` where it cannot be copied or run."""
    copied: dict[int, Any] = {}
    try:
        wide = copy.deepcopy(interpreter, copied)
        for value in copied.values():  # weights, buffers, and tensors in no module
            if isinstance(value, Tensor) and value.is_floating_point():
                value.data = value.data.double()
        wide(images.double(), torch.zeros(len(images), dtype=torch.long))
    except Exception:
        return None
    return wide


def _run(
    name: str,
    check: Check,
    source: _Drawn | _Own,
    max_examples: int,
    seed: int | None,
    **extra: Any,
) -> None:
    """Run a check on examples of each kind of images; raise the first failure, shrunk."""

    def test(images: Tensor, target: Tensor, **network: Any) -> None:
        *subject, images = source.arguments(check, images, **network)
        target = target.repeat(len(images))[: len(images)].to(images.device)
        with eval_mode(source.model):
            check.function(*subject, images, target, **extra)

    test.__name__ = f"check_{name}"  # hypothesis prints it
    others = source.networks(check) | {"target": drawn.classes(count=source.classes)}
    kinds = list(drawn.KINDS) if check.degenerate else ["random"]
    memory: dict[str, Any] = {} if seed is None else {"database": None}
    settings = hypothesis.settings(
        max_examples=-(-max_examples // len(kinds)),
        deadline=None,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        phases=[Phase.reuse, Phase.generate, Phase.shrink],
        **memory,
    )
    for kind in kinds:
        run = settings(hypothesis.given(images=source.images(kind), **others)(test))
        (run if seed is None else hypothesis.seed(seed)(run))()
