# SPDX-License-Identifier: MIT
"""The attack on a classifier and its interpreter, whatever the attacker may change (§3).

::

    warm start   steps of a regular attack, on the prediction alone (§3.6)
    repeat       the surrogate's state advances; a step on prediction and map (Eq. 3)
    result       each image's best iterate, judged on the reported map after 8-bit rounding
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn

from captum_adv2 import spec
from captum_adv2.attacks.base import CarefulAttack
from captum_adv2.attacks.frameworks import Framework
from captum_adv2.attacks.loop import Batch, Callback, Problem, Progress, Step, descend
from captum_adv2.attacks.targets import Benign, TargetMap
from captum_adv2.attacks.terms import CrossEntropy, MapDistance, Term
from captum_adv2.interpreters.base import Interpreter, Surrogate
from captum_adv2.interpreters.boundary import (
    differentiable_logits,
    expect_explains,
    expect_gradients,
    failures_explained,
    outputs_checked,
)
from captum_adv2.interpreters.gradient import Gradient
from captum_adv2.progress import progress_bar
from captum_adv2.spec import Count, Index, Unit, doubt

_CROSS_ENTROPY = CrossEntropy(rho=0.0)
_GATE = 30.0  # of far target maps; docs/benchmarks.md has what else was tried


class Request(NamedTuple):
    """The checked arguments of a call, and the classes they lead to."""

    interpreter: Interpreter  # as a function of images in [0, 1]
    clean: Tensor  # (B, C, H, W)
    own: Tensor  # the classes (B,) that the model gives the images
    labels: Tensor  # those passed (B,); by default, own
    target: Tensor | None  # the target classes (B,); None in an untargeted attack


@dataclass(eq=False, repr=False)
class CoupledAttack(CarefulAttack):
    """What attacks on a classifier and its interpreter share, with gradients or without.

    Settings, the model's classes, target classes and target maps; see `ADV2`. Subclasses have the
    fields of their threat model, in their own order.
    """

    _distance: ClassVar[MapDistance]  # default interpretation loss, where maps are min-max scaled
    _build = None  # a function of the model, where the interpreter was given as one

    model: nn.Module
    interpreter: Interpreter | Callable[[nn.Module], Interpreter] | None = None
    _: KW_ONLY
    target_map: TargetMap = Benign()
    prediction: Term = CrossEntropy()
    interpretation: Term | None = None
    terms: Sequence[Term] = ()
    confidence: Unit = 0.9
    stop: Unit | None = None
    generator: torch.Generator | None = None
    callback: Callback | None = None
    verbose: bool = False

    def __post_init__(self) -> None:
        """Set up torchattacks' part."""
        super().__init__(type(self).__name__, self.model)
        self.supported_mode = ["default", "targeted"]
        self._checked_interpreter()
        self._close()

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; build the interpreter where a class or function was given for it."""
        new = name == "interpreter" or (name == "model" and value is not getattr(self, name, None))
        super().__setattr__(name, value)
        if name == "interpreter":
            build = None if isinstance(value, Interpreter) else value or Gradient
            super().__setattr__("_build", build)
        if new and self._build is not None:
            super().__setattr__("interpreter", self._built(self._build))

    def _built(self, build: Callable[[nn.Module], Interpreter]) -> Interpreter:
        """Return the interpreter that a class or function builds for the model."""
        built = build(self.model)
        spec.expect(built, Interpreter, "interpreter")
        return built

    @classmethod
    def from_preset(
        cls,
        model: nn.Module,
        interpreter: Interpreter | Callable[[nn.Module], Interpreter] | None,
        preset: Mapping[str, Any],
        **overrides: Any,
    ) -> Self:
        """Return an attack with the settings of, say, ``presets.PAPER["CAM"]``, and overrides."""
        return cls(model, interpreter, **{**preset, **overrides})

    @abstractmethod
    def _classified(self, clean: Tensor) -> Tensor:
        """Return the logits ``(B, classes)`` of clean images, checked."""

    def _request(self, images: Tensor, labels: Tensor | None) -> Request:
        """Check the arguments of a call; classify the images and choose the target classes."""
        interpreter = self._checked_interpreter()
        if self._normalization_applied is False:
            interpreter = interpreter.after(self.normalize)
        if labels is None and self.attack_mode == "targeted(label)":
            raise ValueError("expected labels, the target classes in this mode, got None")
        spec.expect(images, spec.Images, "images")
        clean = images.detach().to(self.device or images.device).clamp(0, 1)
        logits = self._classified(clean)
        own, target = logits.argmax(dim=1), None
        if labels is not None:
            labels = _checked_classes(labels, logits, "labels")
        if self.targeted:
            chosen = self.get_target_label(clean, labels)
            target = _checked_classes(chosen, logits, "target labels")
        return Request(interpreter, clean, own, own if labels is None else labels, target)

    def _checked_interpreter(self) -> Interpreter:
        """Return the interpreter; raise if it and the model do not go together."""
        interpreter: Any = self.interpreter
        call = f"{type(self).__name__}(model, {type(interpreter).__name__})"
        hint = f"pass its class to have it built: {call}"
        expect_explains(interpreter, self.model, "the attack's", hint)
        checked: Interpreter = interpreter
        return checked

    def _map_distance(self, interpreter: Interpreter, target_maps: Tensor | None) -> MapDistance:
        """Return the default interpretation loss, for an interpreter and the map aimed at."""
        far = target_maps is not None or not isinstance(self.target_map, Benign)
        shape = self._distance.shape if interpreter.scaled else 0.0
        # A far map would outweigh the prediction for as long as it is far.
        return replace(self._distance, shape=shape, gate=_GATE if far else 0.0)

    def _target_maps(
        self, request: Request, passed: Tensor | None, size: torch.Size, target: Tensor
    ) -> Tensor:
        """Return the target maps ``(B, 1, h, w)``, checked: those passed, or ``target_map``'s."""
        interpreter, clean, own, *_ = request
        maps = self.target_map(interpreter, clean, own, target) if passed is None else passed
        spec.expect(maps, spec.Maps, "target_maps")
        shape = (len(clean), 1, *size)
        if maps.shape != shape:
            raise ValueError(
                f"expected target_maps of shape {shape}, the interpreter's own, got "
                f"{tuple(maps.shape)}; resize them to its maps"
            )
        flat = maps.detach().flatten(1)
        constant = int((flat.amax(dim=1) == flat.amin(dim=1)).sum())
        if constant:
            doubt(
                f"{constant} of {len(maps)} target maps are constant: there is no shape to keep, "
                "and the distance says little"
            )
        return maps.detach().to(clean)

    @contextmanager
    def _reporting(self, total: int, unit: str) -> Iterator[Callable[[Progress], None]]:
        """Yield a function that passes progress on to the callback and the progress bar."""
        with progress_bar(total=total, desc=self.attack, unit=unit, shown=self.verbose) as bar:

            def report(progress: Progress) -> None:
                if self.callback is not None:
                    self.callback(progress)
                if not bar.disable:  # reading numbers off a GPU waits for it
                    confidence, distance = progress.confidence.mean(), progress.distance.mean()
                    shown = {"confidence": confidence.item(), "distance": distance.item()}
                    bar.set_postfix(shown, refresh=False)
                bar.update()

            yield report
            bar.total = bar.n  # complete, also where all images are finished early

    def get_random_target_label(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return random classes but the labels ``(N,)``, from ``generator`` where one was given."""
        if self.generator is None:
            target: Tensor = super().get_random_target_label(inputs, labels)
            return target
        logits = self.get_output_with_eval_nograd(inputs)
        labels = logits.argmax(dim=1) if labels is None else labels
        device = self.generator.device
        shift = torch.randint(
            1, logits.shape[1], labels.shape, generator=self.generator, device=device
        )
        return (labels + shift.to(labels.device)) % logits.shape[1]


@dataclass(eq=False, repr=False)
class DualAttack(CoupledAttack):
    """The common part of `ADV2` and `StADV2`: all but the threat model. See `ADV2`.

    Subclasses have the fields ``alpha``, ``steps`` and ``step`` of their own, in their own order.
    """

    _regular: ClassVar[Step]  # of the warm start: that of a regular attack

    _: KW_ONLY
    warmup: Index | None = None
    surrogate: Surrogate | None = None
    keep: Count | Literal["best", "final"] = "best"

    @abstractmethod
    def _framework(self) -> Framework:
        """Return the attack framework: the variable that is optimised, and its bounds."""

    def forward(
        self, images: Tensor, labels: Tensor | None = None, *, target_maps: Tensor | None = None
    ) -> Tensor:
        """Run the attack on images in [0, 1]; called by ``__call__``."""
        request = self._request(images, labels)
        with torch.enable_grad():
            return self._attack(request, target_maps).detach()

    def _classified(self, clean: Tensor) -> Tensor:
        """See `CoupledAttack`; raise where logits have no gradient."""
        expect_gradients()
        with outputs_checked(self.model, self.get_logits, clean):
            return differentiable_logits(self.get_logits, clean)

    def _checked_interpreter(self) -> Interpreter:
        """Return the interpreter; raise if it, the model and the steps do not go together."""
        interpreter = super()._checked_interpreter()
        if self.warmup is not None and self.warmup > self.steps:
            wanted = f"expected warmup at most {self.steps}, the steps, got {self.warmup}"
            raise ValueError(f"{wanted}; pass a shorter warmup, too")
        if self.surrogate and not hasattr(interpreter, self.surrogate.needs):
            name, given = type(interpreter).__name__, type(self.surrogate).__name__
            hint = "surrogate=None uses its own"
            raise TypeError(f"expected a surrogate for {name}, got {given}; {hint}")
        return interpreter

    def _attack(self, request: Request, target_maps: Tensor | None) -> Tensor:
        """Run both phases: the warm start on the prediction, the rest on prediction and map."""
        interpreter, clean, own, labels, target = request
        surrogate = self._differentiated(interpreter)
        distance = self._map_distance(interpreter, target_maps)
        with failures_explained(self.model, self.get_logits, clean):
            size = _probe(surrogate, interpreter, clean, own)
        choose_maps = partial(self._target_maps, request, target_maps, size)
        aim = labels if target is None else target  # untargeted: the classes to move away from
        maps = clean[:, :1]  # not used in the warm start
        if target is not None or target_maps is not None:
            maps = choose_maps(aim)  # before any step: it may raise
        warmup = self.steps // 20 if self.warmup is None else self.warmup
        with self._reporting(self.steps, "step") as report:
            regular = Problem(
                self.get_logits,
                self._framework(),
                self.alpha,
                warmup,
                interpreter,
                Batch(clean, aim, maps, torch.arange(len(clean), device=clean.device)),
                terms=(_CROSS_ENTROPY,),
                untargeted=target is None,
            )
            start = regular.framework.init(clean)
            variable, started = descend(regular, start, self._regular, range(warmup), report)
            if target is None:
                target = self._landed(started, labels)
                maps = choose_maps(target) if target_maps is None else maps
            batch = regular.batch._replace(target=target, target_maps=maps)
            dual = replace(
                regular,
                steps=self.steps - warmup,
                batch=batch,
                terms=(self.prediction, self.interpretation or distance, *self.terms),
                untargeted=False,
                surrogate=surrogate,
                state=surrogate.init(interpreter, started, target),
                floor=self.confidence,
                stop=self.stop,
                late=0 if isinstance(self.keep, str) else int(self.keep),
            )
            _, final = descend(dual, variable, self.step, range(warmup, self.steps), report)
        return final if self.keep == "final" else dual.better(final, batch)

    def _differentiated(self, interpreter: Interpreter) -> Surrogate:
        """Return what to differentiate in place of the interpreter."""
        return self.surrogate or interpreter.surrogate

    @torch.no_grad()
    def _landed(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the likeliest class but the label: where an untargeted attack has landed."""
        logits: Tensor = self.get_logits(images)
        return logits.scatter(1, labels[:, None], -torch.inf).argmax(dim=1)


def _checked_classes(classes: Tensor, logits: Tensor, name: str) -> Tensor:
    """Return classes ``(B,)``, one an image; raise if the model does not have them."""
    spec.expect(classes, spec.Classes, name)
    spec.expect_classes(classes, logits, name)
    # A copy, as tensors made in inference mode cannot be saved for a backward pass.
    return classes.to(logits.device).long().clone()


def _probe(
    surrogate: Surrogate, interpreter: Interpreter, images: Tensor, target: Tensor
) -> torch.Size:
    """Check that the maps of images can be attacked; return the maps' height and width."""
    leaf = images.detach().requires_grad_()
    state = surrogate.init(interpreter, leaf, target)
    maps = surrogate(interpreter, leaf, state, 0.0).maps
    name = type(interpreter).__name__
    if not maps.requires_grad:
        raise ValueError(
            f"expected a differentiable interpreter, got {name}, whose maps carry no graph; "
            "compute them without no_grad, detach and .data"
        )
    (gradient,) = torch.autograd.grad(maps.square().sum(), leaf, allow_unused=True)
    message = ""
    if gradient is None or not bool(gradient.any()):
        message = (
            f"the gradient of {name}'s map is zero: the attack cannot follow it (a ReLU network's "
            "gradients need smoothing; a constant map has no gradient)"
        )
    elif broken := int((~gradient.isfinite()).flatten(1).any(dim=1).sum()):
        message = (
            f"the gradient of {name}'s map is not finite for {broken} of {len(images)} images: the "
            f"attack cannot follow it (it was computed in {gradient.dtype}; pass another dtype, or "
            "the surrogate Smoothed(Auto()), from captum_adv2.interpreters.base and relu)"
        )
    if message:
        doubt(message)
    return maps.shape[-2:]
