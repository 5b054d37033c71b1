# SPDX-License-Identifier: MIT
"""The two contracts: `Interpreter` (images and classes to maps) and `Surrogate` (what to attack).

An interpreter is a differentiable function of images. Where the reported map has no useful
derivative, the interpreter's `Surrogate` is differentiated instead: GRAD's smooths ReLU, MASK's
looks ahead along its own optimisation. A surrogate has settings and no memory: what it remembers of
a batch is a state, which the attack keeps and passes in.

One model is for one thread at a time: during a call, an interpreter puts its model into eval mode
and may register hooks on it.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self, final

import torch
from torch import Tensor, nn

from captum_adv2.interpreters.boundary import (
    differentiable_logits,
    expect_gradients,
    outputs_checked,
)
from captum_adv2.interpreters.relu import Slope, smooth_relu
from captum_adv2.spec import Classes, Images, checked, doubt, expect_shape

# Spreads below this count as 0: their derivative, about 1 / spread**2, would overflow float32.
_FLAT = 1e-18
# Of the images that go through a model at a time: 13 colour images of 224x224.
_NUMBERS = 2**21


class Explanation(NamedTuple):
    """Attribution maps of a batch, and the model's output in the same forward pass.

    Attributes:
        maps: Attribution maps ``(B, 1, h, w)`` in [0, 1].
        logits: The model's output ``(B, classes)`` on exactly these images, or ``None`` where the
            interpreter has no forward pass of them to share.
        penalty: A further loss ``(B,)`` of an attack on this interpreter, or ``None``.
    """

    maps: Tensor
    logits: Tensor | None
    penalty: Tensor | None = None


class Surrogate(ABC):
    """What an attacker differentiates in place of an interpreter; it has settings and no memory.

    Its state is a tensor with the batch first, a number, or a tuple of these, so that finished
    images can be taken out of it. ``interpreter`` is the interpreter under attack, throughout.

    Attributes:
        needs: Name of an attribute that an interpreter must have for it.
    """

    needs: ClassVar[str] = "explain"

    def init(self, interpreter: Any, images: Tensor, target: Tensor) -> Any:
        """Return the state to start from; by default, the classes ``(B,)`` to explain."""
        return target

    def advance(self, interpreter: Any, images: Tensor, state: Any, progress: float) -> Any:
        """Return the state for an iterate ``(B, C, H, W)``, once an iteration, before `__call__`.

        ``images`` carry no graph; ``progress`` is the share of the attack done, in [0, 1).
        """
        return state

    @abstractmethod
    def __call__(
        self, interpreter: Any, images: Tensor, state: Any, progress: float
    ) -> Explanation:
        """Return the explanation to differentiate with respect to ``images``.

        Its maps are ``(B, J, h, w)``: one map an image, or one for each of J steps ahead.
        """


@final
@dataclass(frozen=True)
class Exact(Surrogate):
    """The interpreter itself."""

    def __call__(
        self, interpreter: Interpreter, images: Tensor, state: Tensor, progress: float
    ) -> Explanation:
        """See `Surrogate`."""
        return interpreter.explain(images, state)


@final
@dataclass(frozen=True)
class Smoothed(Surrogate):
    """The interpreter on a network whose ReLUs have another derivative; see `smooth_relu`.

    It is differentiated by PyTorch: where the map is made of gradients, by a double backward.
    """

    slope: Slope

    def init(self, interpreter: Interpreter, images: Tensor, target: Tensor) -> Tensor:
        """See `Surrogate`."""
        warn_of_scripts(interpreter.model)
        return target

    def __call__(
        self, interpreter: Interpreter, images: Tensor, state: Tensor, progress: float
    ) -> Explanation:
        """See `Surrogate`."""
        with smooth_relu(self.slope, progress) as smoothed:
            explanation = interpreter.explain(images, state)
        if progress == 0 and not smoothed.found and interpreter.model is not None:
            warn_of_linear(interpreter.logits, images[:1])
        return explanation


def warn_of_scripts(model: nn.Module | None) -> None:
    """Warn where TorchScript hides ReLUs, which then keep their own derivative."""
    modules = () if model is None else model.modules()
    scripts = (module for module in modules if isinstance(module, torch.jit.ScriptModule))
    if any("relu" in str(script.inlined_graph) for script in scripts):
        doubt(
            "ReLUs inside TorchScript cannot be smoothed, so an attack follows the map badly; pass "
            "the model as it was before torch.jit"
        )


def warn_of_linear(function: Callable[[Tensor], Tensor], point: Tensor) -> None:
    """Warn where logits are piecewise linear in the image, at a point ``(1, C, H, W)``."""
    with torch.enable_grad():
        x = point.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(function(x)[:, 0].sum(), x, create_graph=True)
        curved = gradient.requires_grad
        if curved:
            try:
                change = torch.autograd.grad(gradient.square().sum(), x, materialize_grads=True)
                curved = bool(change[0].any())
            except RuntimeError:  # fused attention has no second derivative, and is curved
                pass
    if not curved:
        doubt(
            "the logits are piecewise linear in the image, and no ReLU was found to smooth: an "
            "attack cannot follow the map; write activations as nn.ReLU or F.relu, and pass the "
            "model as it was before torch.jit or nn.DataParallel"
        )


class Interpreter(ABC):
    """Turns images and classes into attribution maps, differentiably.

    A subclass implements `explain`, and sets `surrogate` where an attacker should differentiate
    something other than the map. Subclasses are final: vary behaviour by wrapping.

    Convention:
        Images in [0, 1]; maps ``(B, 1, h, w)`` in [0, 1], 1 = important, at native resolution.

    Args:
        model: The classifier explained; returns logits ``(B, classes)``. ``None`` where the
            interpreter explains a function and cannot tell which model is behind it.

    Attributes:
        scaled: Whether maps are min-max scaled per image, or natively in [0, 1].
        surrogate: What an attacker should differentiate; by default the interpreter itself.
    """

    scaled: ClassVar[bool] = True
    surrogate: Surrogate = Exact()

    def __init__(self, model: nn.Module | None) -> None:
        self.model = model
        self._preprocess: Callable[[Tensor], Tensor] | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self.model).__name__})"

    @abstractmethod
    def explain(self, images: Tensor, target: Tensor) -> Explanation:
        """Return maps ``(B, 1, h, w)`` and, where one forward pass yields both, the logits.

        Both are differentiable with respect to images. Arguments are those of a call, ``target`` as
        ``int64``; unlike a call, this neither checks them nor changes the model's mode.
        """

    @final
    @checked
    def __call__(self, images: Images, target: Classes) -> Tensor:
        """Return attribution maps ``(B, 1, h, w)``, differentiable with respect to ``images``.

        The model runs in eval mode and is left as it was.

        Args:
            images: ``(B, C, H, W)``, floating, in [0, 1].
            target: Class to explain, one an image, ``(B,)`` integer.
        """
        expect_shape(target, images.shape[:1], "target")
        target = target.to(images.device, torch.long)
        with eval_mode(self.model), outputs_checked(self.model, self.logits, images, target):
            maps = self.explain(images, target).maps
            if self.model is not None and not bool(maps.any()):
                differentiable_logits(self.logits, images)  # raises if the model rounds
            return maps

    def after(self, preprocess: Callable[[Tensor], Tensor]) -> Self:
        """Return a copy that explains the model on ``preprocess(images)`` as a function of images.

        ``torchattacks`` can normalise outside the model (``set_normalization_used``); what is
        attacked, and so explained, is then the composition of the two.
        """
        clone = copy.copy(self)
        clone._preprocess = preprocess
        return clone

    def logits(self, images: Tensor) -> Tensor:
        """Run the model on images in [0, 1]; return logits ``(B, classes)``."""
        model: Any = self.model  # an interpreter without one runs a function of its own
        logits: Tensor = model(self.prepare(images))
        return logits

    def prepare(self, images: Tensor) -> Tensor:
        """Return the model's input for images: the images, or what `after`'s function returns."""
        return images if self._preprocess is None else self._preprocess(images)


@contextmanager
def eval_mode(model: nn.Module | None, switch: bool = True) -> Iterator[None]:
    """Put a model into eval mode, if ``switch``; restore the mode of each module on leaving.

    Meanwhile the model runs on copies of its input: it may normalise in place.
    """
    if model is None:
        yield
        return
    modes = [(module, module.training) for module in model.modules()]
    try:
        hook = model.register_forward_pre_hook(_copied, prepend=True, with_kwargs=True)
    except RuntimeError as error:
        got = f"{type(model).__name__}; wrap it: nn.Sequential(model)"
        raise TypeError(f"expected a model that takes hooks, got {got}") from error
    with hook:
        try:
            if switch:
                _switch_to_eval(model)
            yield
        finally:
            for module, training in modes:
                module.training = training


def _switch_to_eval(model: nn.Module) -> None:
    try:
        model.eval()
    except NotImplementedError:  # exported graphs have one mode only
        for module in model.modules():
            module.training = False


def _copied(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    def copied(value: Any) -> Any:
        return value.clone() if isinstance(value, Tensor) else value

    return tuple(map(copied, args)), {name: copied(value) for name, value in kwargs.items()}


@contextmanager
def differentiable_input(images: Tensor) -> Iterator[tuple[Tensor, bool]]:
    """Yield images to take an inner gradient at, and whether to keep the gradient's own graph.

    Under ``torch.no_grad()``, or where the images require no gradient, these are a new leaf and no
    graph is kept, which halves the memory.
    """
    expect_gradients()
    create_graph = torch.is_grad_enabled() and images.requires_grad
    with torch.enable_grad():
        yield (images if create_graph else images.detach().requires_grad_()), create_graph


def detached(explanation: Explanation) -> Explanation:
    """Return an explanation without its graph."""
    maps, *others = explanation
    return Explanation(maps.detach(), *(None if o is None else o.detach() for o in others))


def min_max(maps: Tensor) -> Tensor:
    """Scale each map ``(B, 1, h, w)`` to [0, 1] by its own extremes; a constant one becomes zeros.

    >>> min_max(torch.tensor([[[[1.0, 3.0], [2.0, 5.0]]]])).flatten().tolist()
    [0.0, 0.5, 0.25, 1.0]
    """
    low = maps.amin(dim=(1, 2, 3), keepdim=True)
    spread = maps.amax(dim=(1, 2, 3), keepdim=True) - low
    flat = spread <= _FLAT
    return ((maps - low) / spread.masked_fill(flat, 1)).masked_fill(flat, 0)


def at_once(image: Tensor, batch: int) -> int:
    """Return how many copies ``(C, H, W)`` go through a model at a time: a batch at the least."""
    return max(batch, _NUMBERS // image.numel())


def background(baseline: float | Tensor, images: Tensor) -> Tensor:
    """Return a baseline, a grey value or an image, expanded to the shape of images."""
    return torch.as_tensor(baseline, dtype=images.dtype, device=images.device).expand_as(images)
