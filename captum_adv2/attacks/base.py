# SPDX-License-Identifier: MIT
"""The attack on a classifier and its interpreter, whatever it may change: contract and one loop."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torchattacks.attack import Attack
from tqdm.auto import tqdm

from captum_adv2.attacks.frameworks import Framework
from captum_adv2.attacks.objectives import MapDistance
from captum_adv2.attacks.presets import Settings
from captum_adv2.attacks.run import Batch, Callback, Dual, Regular, Run
from captum_adv2.attacks.steps import Step
from captum_adv2.checks import (
    SoundnessWarning,
    expect_flag,
    expect_function,
    expect_generator,
    expect_images,
    expect_integer,
    expect_labels,
    expect_logits,
    expect_maps,
    expect_model,
    expect_number,
)
from captum_adv2.interpreters.base import Direct, Interpreter, Surrogate, eval_mode
from captum_adv2.interpreters.gradient import Gradient
from captum_adv2.storage import expect_file
from captum_adv2.types import Schedule, SurrogateFactory, TargetMap, Term

__all__ = ["CarefulAttack", "DualAttack"]


class CarefulAttack(Attack, ABC):  # type: ignore[misc]  # torchattacks is untyped
    """An attack that leaves the model as it was, also after an exception."""

    def __call__(
        self, inputs: Tensor, labels: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Return adversarial images ``(N, C, H, W)``; model and attack are left as they were.

        Args:
            inputs: Clean images ``(N, C, H, W)``.
            labels: Classes ``(N,)``.
            *args: None are known.
            **kwargs: ``target_maps``, the maps ``(N, 1, h, w)`` to aim at for this batch.
        """
        with self._restored():
            adversarial: Tensor = super().__call__(inputs, labels, *args, **kwargs)
        return adversarial

    def save(
        self,
        data_loader: Any,
        save_path: Any = None,
        verbose: bool = True,
        return_verbose: bool = False,
        save_predictions: bool = False,
        save_clean_inputs: bool = False,
        save_type: Literal["float", "int"] = "float",
    ) -> Any:
        """Attack a data loader and save the result, as in torchattacks; the model is restored.

        Raises:
            TypeError: A path that is none, a flag that is none.
            ValueError: A path that names no file.
        """
        flags = {
            "verbose": verbose,
            "return_verbose": return_verbose,
            "save_predictions": save_predictions,
            "save_clean_inputs": save_clean_inputs,
        }
        for name, flag in flags.items():
            expect_flag(flag, name)
        if save_path is not None and not hasattr(save_path, "write"):
            expect_file(save_path)
        with self._restored():
            return super().save(data_loader, save_path, **flags, save_type=save_type)

    def _set_mode_targeted(self, mode: str, quiet: bool) -> None:
        expect_flag(quiet, "quiet")
        super()._set_mode_targeted(mode, quiet)

    def set_mode_targeted_by_function(
        self, target_map_function: Callable[[Tensor, Tensor], Tensor], quiet: bool = False
    ) -> None:
        """Aim at the classes that a function of images and labels returns, as in torchattacks.

        Raises:
            TypeError: No function.
        """
        expect_function(target_map_function, "target_map_function")
        super().set_mode_targeted_by_function(target_map_function, quiet)

    def set_mode_targeted_least_likely(self, kth_min: int = 1, quiet: bool = False) -> None:
        """Aim at the class of k-th smallest probability, as in torchattacks.

        Raises:
            TypeError: ``kth_min`` is no integer.
            ValueError: ``kth_min`` below 1; at a call, as many as the classes or more.
        """
        super().set_mode_targeted_least_likely(expect_integer(kth_min, "kth_min", low=1), quiet)

    @torch.no_grad()
    def get_output_with_eval_nograd(self, inputs: Tensor) -> Tensor:
        """Return logits in eval mode; every module's mode is restored one by one."""
        with eval_mode(self.model):
            logits: Tensor = self.get_logits(inputs)
        return logits

    @torch.no_grad()
    def _landed(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the likeliest class but the label: where an untargeted attack has landed."""
        logits: Tensor = self.get_logits(images)
        return logits.scatter(1, labels[:, None], -torch.inf).argmax(dim=1)

    @contextmanager
    def _restored(self) -> Iterator[None]:
        """Leave each module's mode, and the state of the normalisation, as they are now."""
        applied = self._normalization_applied
        modes = _kept_modes if self._model_training else eval_mode
        try:
            with modes(self.model):
                yield
        finally:
            self._set_normalization_applied(applied)


@contextmanager
def _kept_modes(model: nn.Module) -> Iterator[None]:
    """Put each module back as it was, for torchattacks to set modes of its own."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


class DualAttack(CarefulAttack):
    """What `ADV2` and `StADV2` share: all but what the attacker may change.

    A subclass gives the framework, and the step rule of a regular attack on it. For what the
    arguments mean see `ADV2`.

    Attributes:
        alpha: Step size, in the framework's units.
    """

    alpha: float
    _preset: ClassVar[type[Settings]]

    def __init__(
        self,
        model: nn.Module,
        interpreter: Interpreter | Callable[[nn.Module], Interpreter] | None,
        steps: int,
        *,
        warmup: int | None,
        target_map: TargetMap,
        prediction: Term,
        interpretation: Term | None,
        terms: tuple[Term, ...],
        step: Step,
        surrogate: SurrogateFactory | None,
        keep: Literal["best", "final"],
        confidence: float,
        stop: float | None,
        generator: torch.Generator | None,
        callback: Callback | None,
        verbose: bool,
    ) -> None:
        super().__init__(type(self).__name__, expect_model(model))
        self.steps = steps
        self.warmup = warmup
        self.target_map = target_map
        self.prediction = prediction
        self.interpretation = interpretation
        self.terms = tuple(terms) if isinstance(terms, list) else terms
        self.step = step
        self.surrogate = surrogate
        self.keep = keep
        self.confidence = confidence
        self.stop = stop
        self.verbose = verbose
        self._generator = generator
        self._callback = callback
        self._factory: Callable[[nn.Module], Interpreter] | None = None
        if isinstance(interpreter, Interpreter):
            self.interpreter = interpreter
        elif interpreter is None or callable(interpreter):
            self._factory = interpreter or Gradient
            self.interpreter = self._factory(model)
        else:
            raise TypeError(
                "expected an Interpreter, or what builds one from a model, got "
                f"{type(interpreter).__name__}; wrap a Captum method in CaptumInterpreter"
            )
        self.supported_mode = ["default", "targeted"]

    @abstractmethod
    def _framework(self) -> Framework:
        """Return what is optimised."""

    @abstractmethod
    def _regular(self) -> Step:
        """Return the step rule of the warm start: that of a regular attack."""

    def _weight(self) -> float | Schedule:
        """Return the weight of the default map loss."""
        return MapDistance.weight

    @classmethod
    def from_preset(
        cls,
        model: nn.Module,
        interpreter: Interpreter | Callable[[nn.Module], Interpreter] | None,
        preset: Settings,
        **overrides: Any,
    ) -> Self:
        """Return an attack with a preset's settings; see `presets`.

        Args:
            model: Model to attack.
            interpreter: Interpreter to fool.
            preset: For example ``presets.PAPER["CAM"]``.
            **overrides: Keyword arguments that win over the preset's.

        Raises:
            TypeError: The preset is another attack's.
        """
        if not isinstance(preset, cls._preset):
            raise TypeError(
                f"expected a {cls._preset.__name__} for {cls.__name__}, got "
                f"{type(preset).__name__}; see captum_adv2.attacks.presets"
            )
        return cls(model, interpreter, **(preset.settings() | overrides))

    def set_model(self, model: nn.Module) -> None:
        """Attack another model; an interpreter given as a class or function is built on it."""
        super().set_model(model)
        factory = self.__dict__.get("_factory")  # torchattacks calls this before we have any
        if factory is not None:
            self.interpreter = factory(model)

    def forward(
        self, images: Tensor, labels: Tensor | None = None, *, target_maps: Tensor | None = None
    ) -> Tensor:
        """Run the attack on images in [0, 1]; called by ``__call__``."""
        with torch.enable_grad():
            return self._attack(*self._prepare(images, labels, target_maps)).detach()

    def _prepare(
        self, images: Tensor, labels: Tensor | None, target_maps: Tensor | None
    ) -> tuple[Interpreter, Batch, Tensor | None]:
        """Check settings and arguments; return the interpreter of images in [0, 1], and them."""
        self._check()
        if torch.is_inference_mode_enabled():
            raise RuntimeError(
                "expected gradients to be available, got torch.inference_mode(); use no_grad()"
            )
        interpreter = self.interpreter
        if self._normalization_applied is False:
            interpreter = interpreter.after(self.normalize)
        if target_maps is not None:  # its type and range, before the model has to run
            expect_maps(target_maps, None, type(interpreter).__name__, "target_maps")
        batch = self._batch(interpreter, images, labels)
        if target_maps is not None:
            target_maps = _expect_target_maps(target_maps, interpreter, batch, "target_maps")
        return interpreter, batch, target_maps

    def _attack(self, interpreter: Interpreter, batch: Batch, target_maps: Tensor | None) -> Tensor:
        warmup = self.steps // 20 if self.warmup is None else self.warmup
        interpretation = self.interpretation
        if interpretation is None:
            share = MapDistance.shape if interpreter.scaled else 0.0
            interpretation = MapDistance(self._weight(), shape=share)
        with tqdm(total=self.steps, desc=self.attack, unit="step", disable=not self.verbose) as bar:
            run = Run(self._framework(), batch.clean, self.alpha, self._callback, bar)
            if target_maps is None and batch.target is not None:
                target_maps = self._aim(interpreter, batch, batch.target)
            regular = Regular(self.get_logits, batch)
            started = run.descend(regular, self._regular(), range(warmup))
            target = self._landed(started, batch.labels) if batch.target is None else batch.target
            if target_maps is None:
                target_maps = self._aim(interpreter, batch, target)
            dual = Dual(
                self.get_logits,
                self._follow(interpreter, started, target),
                target,
                target_maps,
                (self.prediction, interpretation, *self.terms),
                self.confidence,
                self.stop,
            )
            final = run.descend(dual, self.step, range(warmup, self.steps))
        if self.keep == "final":
            return final
        reported = Direct(interpreter.explain, target)
        return dual.best.better(final, lambda images: dual.judge(reported, images))

    def _batch(self, interpreter: Interpreter, images: Tensor, labels: Tensor | None) -> Batch:
        """Check all that was passed, and learn what the model and the interpreter say of it."""
        clean = expect_images(images).detach()
        clean = clean.to(self.device or clean.device).clamp(0, 1)
        if labels is not None:
            labels = expect_labels(labels, len(clean)).to(clean.device)
        elif self.attack_mode == "targeted(label)":
            raise ValueError("expected labels, the target classes in this mode, got None")
        with torch.no_grad():
            logits = expect_logits(self.get_logits(clean), len(clean))
        own = logits.argmax(dim=1)
        if labels is not None:
            expect_labels(labels, len(clean), logits.shape[1])
        target = None
        if self.attack_mode == "targeted(least-likely)":
            expect_integer(self._kth_min, "kth_min", low=1, high=logits.shape[1] - 1)
        if self.targeted:
            chosen = self.get_target_label(clean, labels)
            target = expect_labels(chosen, len(clean), logits.shape[1], "target labels")
            target = target.to(clean.device)
        size = self._probe(interpreter, clean[:1], own[:1])
        return Batch(clean, own, own if labels is None else labels, target, size)

    def _follow(self, interpreter: Interpreter, images: Tensor, target: Tensor) -> Surrogate:
        """Return what to differentiate in place of an interpreter."""
        if self.surrogate is None:
            return interpreter.surrogate(images, target)
        surrogate: object = self.surrogate(interpreter, images, target)
        if not isinstance(surrogate, Surrogate):
            raise TypeError(
                f"expected surrogate to return a Surrogate, got {type(surrogate).__name__}; see "
                "captum_adv2.interpreters.Surrogate"
            )
        return surrogate

    def _probe(self, interpreter: Interpreter, image: Tensor, target: Tensor) -> tuple[int, int]:
        """Check on one image that the map can be attacked; return the maps' height and width."""
        leaf = image.detach().requires_grad_()
        surrogate = self._follow(interpreter, leaf, target)
        if self.stop is not None:
            surrogate.take(torch.zeros_like(target))  # of one image, the first is all of them
        maps = surrogate(leaf).maps
        if not maps.requires_grad:
            raise ValueError(
                f"expected a differentiable interpreter, got {type(interpreter).__name__}, whose "
                "maps carry no graph; compute them without no_grad, detach and .data"
            )
        (gradient,) = torch.autograd.grad(maps.square().sum(), leaf, allow_unused=True)
        if gradient is None or not bool(gradient.any()):
            warnings.warn(
                f"the gradient of {type(interpreter).__name__}'s map is zero: the attack will not "
                "see it (a ReLU network's logits need smoothing, a constant map has nothing to "
                "follow)",
                SoundnessWarning,
                stacklevel=2,
            )
        height, width = maps.shape[-2:]
        return height, width

    def _aim(self, interpreter: Interpreter, batch: Batch, target: Tensor) -> Tensor:
        """Return the maps that ``target_map`` chooses for a batch."""
        maps = self.target_map(interpreter, batch.clean, batch.own, target)
        return _expect_target_maps(maps, interpreter, batch, "target_map's maps")

    def get_random_target_label(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return random classes but the labels ``(N,)``, from ``generator`` where one was given."""
        generator = self._generator
        if generator is None:
            target: Tensor = super().get_random_target_label(inputs, labels)
            return target
        logits = self.get_output_with_eval_nograd(inputs)
        labels = logits.argmax(dim=1) if labels is None else labels
        classes = logits.shape[1]
        shift = torch.randint(
            1, classes, labels.shape, generator=generator, device=generator.device
        )
        return (labels + shift.to(labels.device)) % classes

    def _check(self) -> None:
        """Check every setting, also those assigned since the attack was made."""
        expect_integer(self.steps, "steps", low=1)
        if self.warmup is not None:
            expect_integer(self.warmup, "warmup", low=0, high=self.steps)
        expect_number(self.confidence, "confidence", low=0.0, high=1.0)
        if self.stop is not None:
            expect_number(self.stop, "stop", low=0.0, high=1.0)
        for name in ("prediction", "target_map", "step"):
            expect_function(getattr(self, name), name)
        if self.interpretation is not None:
            expect_function(self.interpretation, "interpretation")
        if not isinstance(self.terms, tuple | list):
            raise TypeError(f"expected terms to be a tuple, got {type(self.terms).__name__}")
        for term in self.terms:
            expect_function(term, "each of terms")
        for name, value in (("surrogate", self.surrogate), ("callback", self._callback)):
            if not (value is None or callable(value)):  # a class will do
                raise TypeError(f"expected {name} to be a function, got {type(value).__name__}")
        expect_generator(self._generator)
        expect_flag(self.verbose, "verbose")
        if self.keep not in ("best", "final"):
            raise ValueError(f"expected keep to be 'best' or 'final', got {self.keep!r}")
        if not isinstance(self.interpreter, Interpreter):
            raise TypeError(
                f"expected an Interpreter, got {type(self.interpreter).__name__}; wrap a Captum "
                "method in CaptumInterpreter"
            )
        if self.interpreter.model not in (None, self.model):
            raise ValueError(
                "expected an interpreter built on the attack's model, got one built on another "
                f"{type(self.interpreter.model).__name__}; build it on the same object, or pass "
                f"its class: {type(self).__name__}(model, {type(self.interpreter).__name__})"
            )


def _expect_target_maps(maps: object, interpreter: Interpreter, batch: Batch, name: str) -> Tensor:
    shape = (len(batch.clean), 1, *batch.map_size)
    source = type(interpreter).__name__
    checked = expect_maps(maps, shape, source, name).detach().to(batch.clean)
    flat = checked.flatten(1)
    if bool((flat.amax(dim=1) == flat.amin(dim=1)).any()):
        warnings.warn(
            f"at least one of the {name} is constant: its distance says little",
            SoundnessWarning,
            stacklevel=2,
        )
    return checked
