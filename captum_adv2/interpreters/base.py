# SPDX-License-Identifier: MIT
"""The two contracts: `Interpreter` (images and classes to maps) and `Surrogate` (what to attack).

An interpreter is a function of images that can be differentiated. Where the map users see has no
useful derivative, its `Surrogate` gives an attacker something that has: GRAD's smooths ReLU, MASK's
looks ahead along its own optimisation. A surrogate has settings and no memory: what it has to know
of a batch is a state that the attack keeps and hands to it.

One model is for one thread at a time: an interpreter puts its model into eval mode, and may put
hooks on it, for the length of a call.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self, final

import torch
from torch import Tensor, nn

from captum_adv2.interpreters.relu import Derivative, smooth_relu
from captum_adv2.spec import Classes, Images, checked, expect_logits

# Spreads below this count as none: their derivative, about 1 / spread**2, would overflow float32.
_FLAT = 1e-18


class Explanation(NamedTuple):
    """What an interpreter says of a batch, and what the model said in the same forward pass.

    Attributes:
        maps: Attribution maps ``(B, 1, h, w)`` in [0, 1].
        logits: The model's output ``(B, classes)`` on the very images explained, or ``None``
            where the interpreter has no forward pass of them to share.
        penalty: What else an attack on this interpreter should make small, ``(B,)``, or ``None``.
    """

    maps: Tensor
    logits: Tensor | None
    penalty: Tensor | None = None


class Surrogate(ABC):
    """What an attacker differentiates in place of an interpreter; it has settings and no memory.

    A state is a tensor with the batch first, a number, or a tuple of these, so that images which
    are finished can be taken out of it.
    """

    def init(self, interpreter: Any, images: Tensor, target: Tensor) -> Any:
        """Return the state to start from; by default, the classes ``(B,)`` to explain."""
        return target

    def advance(self, interpreter: Any, images: Tensor, state: Any, progress: float) -> Any:
        """Return the state to explain the next iterate with; called once an iteration.

        Args:
            interpreter: The interpreter under attack.
            images: The iterate ``(B, C, H, W)``, without a graph.
            state: The state so far.
            progress: Share of the attack that is done, in [0, 1).
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
        self, interpreter: Any, images: Tensor, state: Tensor, progress: float
    ) -> Explanation:
        """Explain images for their classes."""
        explanation: Explanation = interpreter.explain(images, state)
        return explanation


@final
@dataclass(frozen=True)
class Smoothed(Surrogate):
    """The interpreter on a network whose ReLUs have another derivative; see `smooth_relu`."""

    derivative: Derivative

    def __call__(
        self, interpreter: Any, images: Tensor, state: Tensor, progress: float
    ) -> Explanation:
        """Explain images for their classes."""
        with smooth_relu(self.derivative):
            explanation: Explanation = interpreter.explain(images, state)
        return explanation


class Interpreter(ABC):
    """Turns images and classes into attribution maps, differentiably.

    A subclass implements `explain`, and sets `surrogate` where an attacker should differentiate
    something else than the map. Subclasses are final: vary behaviour by wrapping.

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
        """Explain why the model would say ``target``; differentiable with respect to ``images``.

        Unlike calling the interpreter, this neither checks its input nor changes the model's mode.

        Args:
            images: ``(B, C, H, W)`` in [0, 1].
            target: Class to explain, one an image, ``(B,)`` long.

        Returns:
            Maps ``(B, 1, h, w)`` and, where one forward pass yields both, the logits.
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
        if target.shape != images.shape[:1]:
            raise ValueError(
                f"expected target of shape ({len(images)},), one class an image, got "
                f"{tuple(target.shape)}"
            )
        with eval_mode(self.model), _outputs_checked(self.model, target):
            return self.explain(images, target.to(images.device).long()).maps

    def after(self, preprocess: Callable[[Tensor], Tensor]) -> Self:
        """Return a copy that explains the model on ``preprocess(images)`` as a function of images.

        ``torchattacks`` normalises outside the model (``set_normalization_used``); the function
        attacked, and so the one explained, is then the two together.
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
        """Return what the model sees of images: themselves, or what `after` was given makes."""
        return images if self._preprocess is None else self._preprocess(images)


@contextmanager
def eval_mode(model: nn.Module | None, switch: bool = True) -> Iterator[None]:
    """Put a model into eval mode; put each of its modules back as it was, whatever happens."""
    modes = [] if model is None else [(module, module.training) for module in model.modules()]
    try:
        if model is not None and switch:
            model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _outputs_checked(model: nn.Module | None, target: Tensor) -> Iterator[None]:
    """Refuse outputs that are no logits, and classes that the model does not have.

    By a hook, since the number of classes is known only once the model has run, and an index out of
    range must not reach a GPU, where it ends the process's use of it.
    """
    low, high = torch.stack(target.aminmax()).tolist()

    def check(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        classes = expect_logits(output, len(inputs[0])).shape[1]
        if low < 0 or high >= classes:
            raise ValueError(
                f"expected target in [0, {classes - 1}], the model's classes, got values in "
                f"[{low}, {high}]"
            )

    with ExitStack() as stack:
        if model is not None:
            stack.callback(model.register_forward_hook(check).remove)
        yield


@contextmanager
def differentiable_input(images: Tensor) -> Iterator[tuple[Tensor, bool]]:
    """Yield images to take an inner gradient at, and whether the caller will differentiate that.

    A caller under ``torch.no_grad()``, or whose images need no gradient, gets a leaf of its own
    and no graph of the gradient: half the memory.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "expected gradients to be available, got torch.inference_mode(); use torch.no_grad()"
        )
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


def background(baseline: float | Tensor, images: Tensor) -> Tensor:
    """Return a baseline as wide as the images."""
    return torch.as_tensor(baseline, dtype=images.dtype, device=images.device).expand_as(images)


def expect_interpreter(value, name="interpreter"):  # temporary
    if not isinstance(value, Interpreter):
        raise TypeError(f"expected {name} to be an Interpreter, got {type(value).__name__}")
    return value
