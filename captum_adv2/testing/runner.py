# SPDX-License-Identifier: MIT
"""`check_interpreter`: all checks, on drawn networks or on an interpreter of the caller's own."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any
from unittest import SkipTest

import hypothesis
import torch
from hypothesis import strategies as st
from torch import Tensor

from captum_adv2.interpreters.base import Interpreter, eval_mode
from captum_adv2.spec import Count, Images, Index, checked
from captum_adv2.testing import drawn
from captum_adv2.testing.checks import CHECKS, Attributions, Build, Check, built
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
    images: Images | tuple[Count, Count, Count] | st.SearchStrategy[Tensor] | None = None,
    *,
    max_examples: Count = 10,
    skip: Collection[str] = (),
    seed: Index | None = 0,
    attributions: Attributions | None = None,
) -> CheckReport:
    """Run every check that applies; raise ``AssertionError`` at the first that fails.

    The message has the check's name, the expected and the actual value, and the image; the notes
    have the example, shrunk.

    Args:
        interpreter: A class, or function, that makes an interpreter from a model: small networks
            are drawn. Or an interpreter, on a model of your own: only images are drawn.
        images: A batch ``(B, C, H, W)``, a shape ``(C, H, W)``, or a strategy for batches, of which
            degenerate images are made. Default: small images; for an interpreter, 32 x 32.
        max_examples: Number of examples of each check.
        skip: Names of checks to leave out, or a mapping from names to reasons.
        seed: Seed of hypothesis: the same examples in every run, and no example database. With
            ``None``, new ones in each run, and the database of the profile in use.
        attributions: For a method that promises completeness: interpreter, images and target to
            signed attributions, batch first, and the sums ``(B,)`` they promise.

    >>> from captum_adv2.interpreters import CAM
    >>> report = check_interpreter(CAM, max_examples=1, skip={"scaling": "to show a reason"})
    >>> print(str(report).splitlines()[-2])
      not checked: scaling (to show a reason)
    """
    reasons = dict(skip) if isinstance(skip, Mapping) else dict.fromkeys(skip, "as asked")
    if unknown := list(reasons.keys() - CHECKS.keys()):
        raise ValueError(f"expected skip from {list(CHECKS)}, got {unknown}")
    settings = {"completeness": {"attributions": attributions}} if attributions else {}
    examples = _Examples(interpreter, images)
    report = CheckReport(getattr(interpreter, "__name__", repr(interpreter)))
    # Around all of them, for what only the very first call leaves behind.
    with unchanged(examples.model):
        for name, check in CHECKS.items():
            try:
                if name in reasons:
                    raise SkipTest(reasons[name])
                examples.run(name, check, max_examples, seed, **settings.get(name, {}))
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


class _Examples:
    """Examples for what makes interpreters, on drawn networks, or for one, on its own model."""

    def __init__(self, subject: Any, images: Any) -> None:
        self.subject, self.own = subject, isinstance(subject, Interpreter)
        self.model = subject.model if self.own else None
        parameters = [] if self.model is None else list(self.model.parameters())
        if self.own and images is None:
            images = (next((p.shape[1] for p in parameters if p.ndim == 4), 3), 32, 32)
        if isinstance(images, tuple | None):
            images = drawn.images(images, kinds=["random"])
        self.images = st.just(images) if isinstance(images, Tensor) else images
        probe = hypothesis.find(self.images, lambda _: True)
        self.channels, self.classes = probe.shape[1], drawn.CLASSES
        if self.own:
            like = parameters[0].detach() if parameters else torch.zeros(())
            probe = probe.to(like)
            with eval_mode(self.model):
                self.classes = 2 if self.model is None else subject.logits(probe).shape[1]
                wide = _widened(subject, probe)
            self.given = subject, like
            self.exact = (wide, like.double()) if wide else self.given

    def run(self, name: str, check: Check, count: int, seed: int | None, **extra: Any) -> None:
        """Run a check on ``count`` examples, of each kind of images; raise the first failure."""
        others: dict[str, Any] = {"target": drawn.classes(count=self.classes)}
        if not self.own:
            smooth: Any = {"activations": ("SiLU", "GELU")} if check.smooth else {}
            others["network"] = drawn.networks(channels=self.channels, **smooth)
        elif check.drawn:
            raise SkipTest("needs drawn networks; pass what makes the interpreter from a model")

        def test(images: Tensor, target: Tensor, **other: Any) -> None:
            if self.own:
                (*subject, like) = self.exact if check.exact else self.given
                images = images.to(like)
            else:
                images = images.double() if check.exact else images
                build, network = self.subject, other["network"].to(images.dtype)
                subject = [build, network] if check.rebuilt else [built(build, network)]
            target = target.repeat(len(images))[: len(images)].to(images.device)
            with eval_mode(self.model):
                check.function(*subject, images, target, **extra)

        test.__name__ = f"check_{name}"  # hypothesis prints it
        kinds = list(drawn.KINDS) if check.degenerate else ["random"]
        settings = hypothesis.settings(
            max_examples=-(-count // len(kinds)),
            deadline=None,
            suppress_health_check=list(hypothesis.HealthCheck),
            report_multiple_bugs=False,
            phases=[hypothesis.Phase.reuse, hypothesis.Phase.generate, hypothesis.Phase.shrink],
        )
        for kind in kinds:
            images = self.images if kind == "random" else self.images.map(drawn.KINDS[kind])
            run = settings(hypothesis.given(images=images, **others)(test))
            (run if seed is None else hypothesis.seed(seed)(run))()


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
