# SPDX-License-Identifier: MIT
"""What the attacks share: torchattacks' contract, and an attack on classifier and map (§3).

::

    warm start   regular attack steps, prediction loss only (§3.6)
    repeat       the surrogate's state advances; a step on prediction and map (Eq. 3)
    result       each image's best iterate, judged on the reported map after 8-bit rounding
"""

from __future__ import annotations

import functools
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple, Self, get_type_hints

import torch
from torch import Tensor, nn
from torchattacks.attack import Attack
from tqdm.auto import tqdm

from captum_adv2.attacks.frameworks import Framework
from captum_adv2.attacks.loop import Batch, Callback, Problem, Progress, Step, descend
from captum_adv2.attacks.targets import Benign, TargetMap
from captum_adv2.attacks.terms import CrossEntropy, MapDistance, Term
from captum_adv2.interpreters.base import Interpreter, Surrogate, eval_mode
from captum_adv2.interpreters.gradient import Gradient
from captum_adv2.spec import (
    Classes,
    Images,
    Index,
    Maps,
    SoundnessWarning,
    Unit,
    expect,
    expect_classes,
    expect_logits,
)

_CROSS_ENTROPY = CrossEntropy(0.0)
_hints = functools.cache(functools.partial(get_type_hints, include_extras=True))


class CarefulAttack(Attack, ABC):  # type: ignore[misc]  # torchattacks is untyped
    """An attack that checks its settings, and leaves the model as it was, whatever happens."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; check it where the class has an annotation for it."""
        hint = _hints(type(self)).get(name)
        if hint is not None:
            expect(value, hint, name)
        super().__setattr__(name, value)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return adversarial images; model and attack are left as they were."""
        with self._restored():
            adversarial: Tensor = super().__call__(*args, **kwargs)
        return adversarial

    def save(self, *args: Any, **kwargs: Any) -> Any:
        """Attack a data loader and save the result, as in torchattacks; the model is restored."""
        with self._restored():
            return super().save(*args, **kwargs)

    @torch.no_grad()
    def get_output_with_eval_nograd(self, inputs: Tensor) -> Tensor:
        """Return logits in eval mode; each module's mode is restored."""
        with eval_mode(self.model):
            logits: Tensor = self.get_logits(inputs)
        return logits

    @contextmanager
    def _restored(self) -> Iterator[None]:
        """Leave each module's mode, and the state of the normalisation, as they are now."""
        applied = self._normalization_applied
        try:
            with eval_mode(self.model, switch=not self._model_training):
                yield
        finally:
            self._set_normalization_applied(applied)


class Request(NamedTuple):
    """What an attack was called with, checked.

    Attributes:
        interpreter: The interpreter, as a function of images in [0, 1].
        clean: Images ``(B, C, H, W)``.
        own: The classes the model gives them ``(B,)``.
        labels: The labels passed ``(B,)``; by default, ``own``.
        target: The target classes ``(B,)``; ``None`` in an untargeted attack.
    """

    interpreter: Interpreter
    clean: Tensor
    own: Tensor
    labels: Tensor
    target: Tensor | None


@dataclass(eq=False, repr=False)
class DualAttack(CarefulAttack):
    """What `ADV2` and `StADV2` share: all but what the attacker may change. See `ADV2`.

    Subclasses have the fields ``alpha``, ``steps`` and ``step`` of their own, in their own order.

    Attributes:
        _regular: The step rule of the warm start: that of a regular attack.
        _distance: The default interpretation loss, for maps that are min-max scaled.
    """

    _regular: ClassVar[Step]
    _distance: ClassVar[MapDistance]

    model: nn.Module
    interpreter: Interpreter | Callable[[nn.Module], Interpreter] | None = None
    _: KW_ONLY
    warmup: Index | None = None
    target_map: TargetMap = Benign()
    prediction: Term = CrossEntropy()
    interpretation: Term | None = None
    terms: Sequence[Term] = ()
    surrogate: Surrogate | None = None
    keep: Literal["best", "final"] = "best"
    confidence: Unit = 0.9
    stop: Unit | None = None
    generator: torch.Generator | None = None
    callback: Callback | None = None
    verbose: bool = False

    def __post_init__(self) -> None:
        """Set up torchattacks' part; build the interpreter where a class or function was given."""
        build = self.interpreter or Gradient
        self._build = None if isinstance(build, Interpreter) else build
        super().__init__(type(self).__name__, self.model)
        self.supported_mode = ["default", "targeted"]

    @abstractmethod
    def _framework(self) -> Framework:
        """Return what is optimised."""

    @classmethod
    def from_preset(
        cls,
        model: nn.Module,
        interpreter: Interpreter | Callable[[nn.Module], Interpreter] | None,
        preset: Mapping[str, Any],
        **overrides: Any,
    ) -> Self:
        """Return an attack with a preset's settings; keyword arguments win over the preset's.

        Args:
            model: Model to attack.
            interpreter: Interpreter to fool.
            preset: Keyword arguments, for example ``presets.PAPER["CAM"]``.
            **overrides: Further keyword arguments.
        """
        return cls(model, interpreter, **{**preset, **overrides})

    def set_model(self, model: nn.Module) -> None:
        """Attack another model; an interpreter given as a class or function is built on it."""
        super().set_model(model)
        if self._build is not None:
            self.interpreter = self._build(model)

    def forward(
        self, images: Tensor, labels: Tensor | None = None, *, target_maps: Tensor | None = None
    ) -> Tensor:
        """Run the attack on images in [0, 1]; called by ``__call__``."""
        request = self._request(images, labels)
        with torch.enable_grad():
            return self._attack(request, target_maps).detach()

    def _request(self, images: Tensor, labels: Tensor | None) -> Request:
        """Check what was passed, and ask the model which classes the images are of."""
        interpreter = self._checked_interpreter()
        expect(images, Images, "images")
        clean = images.detach().to(self.device or images.device).clamp(0, 1)
        if labels is not None:
            expect(labels, Classes, "labels")
            labels = labels.to(clean.device).long()
        elif self.attack_mode == "targeted(label)":
            raise ValueError("expected labels, the target classes in this mode, got None")
        with torch.no_grad():
            logits = expect_logits(self.get_logits(clean), len(clean))
        own, target = logits.argmax(dim=1), None
        if labels is not None:
            expect_classes(labels, logits, "labels")
        if self.targeted:
            target = self.get_target_label(clean, labels).to(clean.device)
            expect_classes(target, logits, "target labels")
        return Request(interpreter, clean, own, own if labels is None else labels, target)

    def _checked_interpreter(self) -> Interpreter:
        """Check how settings go together; return the interpreter of images in [0, 1]."""
        interpreter = self.interpreter
        if not isinstance(interpreter, Interpreter):
            raise TypeError(f"expected an Interpreter, got {type(interpreter).__name__}")
        if interpreter.model not in (None, self.model):
            raise ValueError(
                "expected an interpreter built on the attack's model, got one built on another "
                f"{type(interpreter.model).__name__}; pass its class to have it built: "
                f"{type(self).__name__}(model, {type(interpreter).__name__})"
            )
        if self.warmup is not None and self.warmup > self.steps:
            raise ValueError(f"expected warmup at most {self.steps}, got {self.warmup}")
        if torch.is_inference_mode_enabled():
            raise RuntimeError(
                "expected gradients to be available, got torch.inference_mode(); use no_grad()"
            )
        if self._normalization_applied is False:
            return interpreter.after(self.normalize)
        return interpreter

    def _attack(self, request: Request, target_maps: Tensor | None) -> Tensor:
        """Run both phases: the warm start on the prediction, the rest on prediction and map."""
        interpreter, clean, own, labels, target = request
        surrogate = self.surrogate or interpreter.surrogate
        aim = self._aim(request, target_maps, _probe(surrogate, interpreter, clean[:1], own[:1]))
        maps = None if target is None else aim(target)  # before any step: it may be refused
        warmup = self.steps // 20 if self.warmup is None else self.warmup
        framework, rows = self._framework(), torch.arange(len(clean), device=clean.device)
        phase = functools.partial(Problem, self.get_logits, framework, self.alpha)
        wanted = Batch(clean, labels if target is None else target, clean[:, :1], rows)
        warm = phase(warmup, interpreter, wanted, (_CROSS_ENTROPY,), untargeted=target is None)
        with tqdm(total=self.steps, desc=self.attack, unit="step", disable=not self.verbose) as bar:
            tell = _teller(bar, self.callback)
            variable, started = descend(
                warm, framework.init(clean), self._regular, range(warmup), tell
            )
            if target is None or maps is None:  # untargeted: the class it landed on
                target = self._landed(started, labels)
                maps = aim(target)
            whole = Batch(clean, target, maps, rows)
            dual = phase(
                self.steps - warmup,
                interpreter,
                whole,
                (self.prediction, self._interpretation(interpreter), *self.terms),
                surrogate,
                surrogate.init(interpreter, started, target),
                floor=self.confidence,
                stop=self.stop,
            )
            _, final = descend(dual, variable, self.step, range(warmup, self.steps), tell)
            bar.total = bar.n  # complete, also where all images are finished early
        return final if self.keep == "final" else dual.better(final, whole)

    def _aim(
        self, request: Request, target_maps: Tensor | None, size: tuple[int, int]
    ) -> Callable[[Tensor], Tensor]:
        """Return what gives the target maps ``(B, 1, h, w)`` for target classes ``(B,)``."""
        interpreter, clean, own, _, _ = request
        shape = (len(clean), 1, *size)
        if target_maps is not None:
            passed = _expect_target_maps(target_maps, shape, interpreter).to(clean)
            return lambda target: passed

        def choose(target: Tensor) -> Tensor:
            maps = self.target_map(interpreter, clean, own, target)
            return _expect_target_maps(maps, shape, interpreter).to(clean)

        return choose

    def _interpretation(self, interpreter: Interpreter) -> Term:
        if self.interpretation is not None:
            return self.interpretation
        return self._distance if interpreter.scaled else replace(self._distance, shape=0.0)

    @torch.no_grad()
    def _landed(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the likeliest class but the label: where an untargeted attack has landed."""
        logits: Tensor = self.get_logits(images)
        return logits.scatter(1, labels[:, None], -torch.inf).argmax(dim=1)

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


def _probe(
    surrogate: Surrogate, interpreter: Interpreter, image: Tensor, target: Tensor
) -> tuple[int, int]:
    """Check on one image that the map can be attacked; return the maps' height and width."""
    leaf = image.detach().requires_grad_()
    state = surrogate.init(interpreter, leaf, target)
    maps = surrogate(interpreter, leaf, state, 0.0).maps
    name = type(interpreter).__name__
    if not maps.requires_grad:
        raise ValueError(
            f"expected a differentiable interpreter, got {name}, whose maps carry no graph; "
            "compute them without no_grad, detach and .data"
        )
    (gradient,) = torch.autograd.grad(maps.square().sum(), leaf, allow_unused=True)
    if gradient is None or not bool(gradient.any()):
        warnings.warn(
            f"the gradient of {name}'s map is zero: the attack cannot follow it (a ReLU network's "
            "gradients need smoothing; a constant map has no gradient)",
            SoundnessWarning,
            stacklevel=2,
        )
    height, width = maps.shape[-2:]
    return height, width


def _teller(bar: Any, callback: Callback | None) -> Callable[[Progress], None]:
    """Return what passes progress on to the callback and the progress bar."""

    def tell(progress: Progress) -> None:
        if callback is not None:
            callback(progress)
        bar.update()
        if not bar.disable:  # reading numbers off a GPU waits for it
            bar.set_postfix(
                confidence=f"{progress.confidence.mean().item():.3f}",
                distance=f"{progress.distance.mean().item():.4f}",
            )

    return tell


def _expect_target_maps(maps: Any, shape: tuple[int, ...], interpreter: Interpreter) -> Tensor:
    """Return target maps if they are of the shape of the interpreter's; warn of constant ones."""
    expect(maps, Maps, "target_maps")
    if tuple(maps.shape) != shape:
        raise ValueError(
            f"expected target_maps of shape {shape} from {type(interpreter).__name__}, got "
            f"{tuple(maps.shape)}; pass maps at the interpreter's native resolution"
        )
    flat = maps.detach().flatten(1)
    if bool((flat.amax(dim=1) == flat.amin(dim=1)).any()):
        warnings.warn(
            "at least one target map is constant: its distance says little",
            SoundnessWarning,
            stacklevel=2,
        )
    detached: Tensor = maps.detach()
    return detached
