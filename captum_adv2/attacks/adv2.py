# SPDX-License-Identifier: MIT
r"""ADV2: one image that fools a classifier and the interpreter coupled to it (§3).

.. math:: \min_x \; \ell_{prd}(f(x), c_t) + \lambda \, \ell_{int}(g(x; f), m_t)
          \quad \text{s.t.} \; \|x - x_0\|_\infty \le \epsilon \qquad (3)

The attack is a `torchattacks.attack.Attack`: it has torchattacks' modes, normalisation, ``save``,
and works inside ``MultiAttack``. One loop serves every interpreter, framework and step rule::

    warm start   regular attack steps, prediction loss only (§3.6)
    follower     what to differentiate in place of the interpreter
    repeat       the follower moves; step on prediction and map; keep the best iterate per image

Differs from the official code: every quantity is per image, so a batch equals its images; the step
decays and has momentum; the iterate returned is each image's best, judged on the reported map of
its 8-bit rounding. ``ADV2.from_preset`` gives the paper's and the official settings.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torchattacks.attack import Attack
from tqdm.auto import tqdm

from captum_adv2.attacks.frameworks import LinfBall
from captum_adv2.attacks.objectives import CrossEntropy, MapDistance
from captum_adv2.attacks.presets import Preset
from captum_adv2.attacks.run import Batch, Callback, Dual, Progress, Regular, Run
from captum_adv2.attacks.steps import SignDescent, Step
from captum_adv2.attacks.targets import Benign
from captum_adv2.checks import (
    SoundnessWarning,
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
from captum_adv2.types import SurrogateFactory, TargetMap, Term

__all__ = ["ADV2", "Progress"]


class ADV2(Attack):  # type: ignore[misc]  # torchattacks is untyped
    r"""ADV2 on pixels: fools the classifier and its interpreter within an L-infinity ball.

    [https://www.usenix.org/conference/usenixsecurity20/presentation/zhang-xinyang]

    Distance Measure : Linf

    In torchattacks' targeted modes the class is the target; in its default mode the warm start runs
    untargeted and the class it lands on becomes the target of the rest. By default the map aimed at
    is the clean image's own.

    Args:
        model: Model to attack; images in [0, 1] to logits (or see ``set_normalization_used``).
        interpreter: Interpreter to fool, built on ``model``; or what builds one from a model, such
            as the class ``CAM``, which then follows ``set_model``. Default: ``Gradient(model)``.
        eps: Maximum perturbation.
        alpha: Step size.
        steps: Number of gradient evaluations, the warm start's included.
        warmup: Regular attack steps at the start, with plain constant sign steps of ``alpha``
            whatever ``step`` is; default: a twentieth of ``steps``.
        target_map: What the map should look like; see `TargetMap`.
        prediction: Prediction loss; the default smooths labels by rho from 0.05 to 0.01.
        interpretation: Interpretation loss, with its weight; default: `MapDistance`, without its
            ``shape`` part where maps are not min-max scaled.
        terms: Further terms of the loss, each a function of a `Candidate` returning ``(B,)``.
        step: Step rule.
        surrogate: What to differentiate in place of the interpreter, a function of interpreter,
            images and target that returns a `Surrogate`; default: ``interpreter.surrogate``.
        keep: ``"best"`` returns each image's best iterate: least distance of the surrogate's map
            among iterates of the target class with enough confidence, or the last iterate, where
            that is better on the reported map after 8-bit rounding. ``"final"`` returns the last.
        confidence: Probability of the target class that is enough, in [0, 1]. An image that never
            gets there is returned all the same, at its most confident.
        random_start: Start at a random point of the ball.
        generator: Source of the random start, and of random targets; default: a fixed seed for the
            former, torchattacks' own (global) one for the latter.
        callback: Called with a `Progress` at each gradient evaluation.
        verbose: Show a progress bar.

    Raises:
        TypeError: A model, interpreter or number of a wrong type.
        ValueError: A number out of range, or an interpreter built on another model.

    Shape:
        - images: ``(N, C, H, W)``, floating, in [0, 1].
        - labels: ``(N,)``, integer; ``None`` means the model's own predictions.
        - target_maps (keyword of the call): ``(N, 1, h, w)`` in [0, 1], for this batch.
        - output: ``(N, C, H, W)``.

    >>> from captum_adv2.interpreters import CAM
    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    ...                       nn.Linear(4, 3))
    >>> attack = ADV2(model, CAM(model), eps=8/255, alpha=2/255, steps=10)
    >>> attack.set_mode_targeted_random(quiet=True)
    >>> attack(torch.rand(2, 1, 8, 8), torch.tensor([0, 1])).shape
    torch.Size([2, 1, 8, 8])
    """

    def __init__(
        self,
        model: nn.Module,
        interpreter: Interpreter | Callable[[nn.Module], Interpreter] | None = None,
        eps: float = 8 / 255,
        alpha: float = 2 / 255,
        steps: int = 100,
        *,
        warmup: int | None = None,
        target_map: TargetMap = Benign(),  # noqa: B008  (immutable)
        prediction: Term = CrossEntropy(),  # noqa: B008
        interpretation: Term | None = None,
        terms: tuple[Term, ...] = (),
        step: Step = SignDescent(),  # noqa: B008
        surrogate: SurrogateFactory | None = None,
        keep: Literal["best", "final"] = "best",
        confidence: float = 0.9,
        random_start: bool = False,
        generator: torch.Generator | None = None,
        callback: Callback | None = None,
        verbose: bool = False,
    ) -> None:
        super().__init__("ADV2", expect_model(model))
        self.eps = eps
        self.alpha = alpha
        self.steps = steps
        self.warmup = warmup
        self.target_map = target_map
        self.prediction = prediction
        self.interpretation = interpretation
        self.terms = tuple(terms)
        self.step = step
        self.surrogate = surrogate
        self.keep = keep
        self.confidence = confidence
        self.random_start = random_start
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
        self._check()

    @classmethod
    def from_preset(
        cls,
        model: nn.Module,
        interpreter: Interpreter | Callable[[nn.Module], Interpreter] | None,
        preset: Preset,
        **overrides: Any,
    ) -> Self:
        """Return an attack with a preset's settings; see `presets`.

        Args:
            model: Model to attack.
            interpreter: Interpreter to fool.
            preset: For example ``presets.PAPER["CAM"]``.
            **overrides: Keyword arguments that win over the preset's.
        """
        return cls(model, interpreter, **(preset.settings() | overrides))

    def set_model(self, model: nn.Module) -> None:
        """Attack another model; an interpreter given as a class or function is built on it."""
        super().set_model(model)
        factory = self.__dict__.get("_factory")  # torchattacks calls this before we have any
        if factory is not None:
            self.interpreter = factory(model)

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

    def save(self, *args: Any, **kwargs: Any) -> Any:
        """Attack a data loader and save the result, as in torchattacks; the model is restored."""
        with self._restored():
            return super().save(*args, **kwargs)

    def forward(
        self, images: Tensor, labels: Tensor | None = None, *, target_maps: Tensor | None = None
    ) -> Tensor:
        """Run the attack on images in [0, 1]; called by ``__call__``."""
        self._check()
        if torch.is_inference_mode_enabled():
            raise RuntimeError(
                "expected gradients to be available, got torch.inference_mode(); use no_grad()"
            )
        interpreter = self.interpreter
        if self._normalization_applied is False:
            interpreter = interpreter.after(self.normalize)
        with torch.enable_grad():
            batch = self._batch(interpreter, images, labels)
            if target_maps is not None:
                target_maps = _expect_target_maps(target_maps, interpreter, batch, "target_maps")
            return self._attack(interpreter, batch, target_maps).detach()

    def _attack(self, interpreter: Interpreter, batch: Batch, target_maps: Tensor | None) -> Tensor:
        warmup = self.steps // 20 if self.warmup is None else self.warmup
        interpretation = self.interpretation
        if interpretation is None:
            interpretation = MapDistance() if interpreter.scaled else MapDistance(shape=0.0)
        with tqdm(total=self.steps, desc="ADV2", unit="step", disable=not self.verbose) as bar:
            ball = LinfBall(self.eps, self.random_start, self._generator)
            run = Run(ball, batch.clean, self.alpha, self._callback, bar)
            if target_maps is None and batch.target is not None:
                target_maps = self._aim(interpreter, batch, batch.target)
            regular = Regular(self.get_logits, batch)
            run.descend(regular, SignDescent(momentum=0.0, final=1.0), range(warmup))
            target = self._landed(run.images, batch) if batch.target is None else batch.target
            if target_maps is None:
                target_maps = self._aim(interpreter, batch, target)
            dual = Dual(
                self.get_logits,
                self._follow(interpreter, run.images, target),
                target,
                target_maps,
                (self.prediction, interpretation, *self.terms),
                self.confidence,
            )
            run.descend(dual, self.step, range(warmup, self.steps))
        if self.keep == "final":
            return run.images
        reported = Direct(interpreter.explain, target)
        return dual.best.better(run.images, lambda images: dual.judge(reported, images))

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
        return self.surrogate(interpreter, images, target)

    def _probe(self, interpreter: Interpreter, image: Tensor, target: Tensor) -> tuple[int, int]:
        """Check on one image that the map can be attacked; return the maps' height and width."""
        leaf = image.detach().requires_grad_()
        maps = self._follow(interpreter, leaf, target)(leaf).maps
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

    @torch.no_grad()
    def _landed(self, images: Tensor, batch: Batch) -> Tensor:
        """Return the likeliest class but the label: where an untargeted warm start has landed."""
        logits: Tensor = self.get_logits(images)
        return logits.scatter(1, batch.labels[:, None], -torch.inf).argmax(dim=1)

    @torch.no_grad()
    def get_output_with_eval_nograd(self, inputs: Tensor) -> Tensor:
        """Return logits in eval mode; every module's mode is restored one by one."""
        with eval_mode(self.model):
            logits: Tensor = self.get_logits(inputs)
        return logits

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
        expect_number(self.eps, "eps", low=0.0)
        expect_number(self.alpha, "alpha", low=0.0)
        expect_integer(self.steps, "steps", low=1)
        if self.warmup is not None:
            expect_integer(self.warmup, "warmup", low=0, high=self.steps)
        expect_number(self.confidence, "confidence", low=0.0, high=1.0)
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
                f"its class: ADV2(model, {type(self.interpreter).__name__})"
            )

    @contextmanager
    def _restored(self) -> Iterator[None]:
        """Leave each module's mode, and the state of the normalisation, as they are now."""
        modes = [(module, module.training) for module in self.model.modules()]
        applied = self._normalization_applied
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
            self._set_normalization_applied(applied)


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
