# SPDX-License-Identifier: MIT
"""The two contracts: `Interpreter` (images and classes to maps) and `Surrogate` (what to attack).

An interpreter is a function of images that can be differentiated. Where the map users see has no
useful derivative, `Interpreter.surrogate` gives an attacker something that has: GRAD's surrogate
smooths ReLU, MASK's looks ahead along its own optimisation. The default is the interpreter itself.
"""

from __future__ import annotations

import copy
import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ClassVar, Self, final

import torch
from torch import Tensor, nn

from captum_adv2.checks import (
    expect_classes,
    expect_floats,
    expect_function,
    expect_indices,
    expect_labels,
    expect_logits,
    expect_number,
    expect_pair,
)
from captum_adv2.types import Explanation

__all__ = [
    "Direct",
    "Interpreter",
    "Surrogate",
    "background",
    "detached",
    "differentiable_input",
    "eval_mode",
    "expect_baseline",
    "expect_interpreter",
    "min_max",
]


# A spread whose derivative, about its inverse squared, would leave float32 counts as none.
_FLAT = 1e-18


class Surrogate(ABC):
    """What an attacker differentiates in place of an interpreter, for one batch and its target."""

    def advance(self, images: Tensor) -> None:  # noqa: B027  (most surrogates have no move)
        """Make the follower's move in answer to the iterate ``(B, C, H, W)``; once an iteration."""

    def take(self, index: Tensor) -> None:
        """Go on with some images only: an attack with ``stop`` lets finished ones leave.

        Args:
            index: Positions, in the batch as it is now, of the images that stay ``(b,)`` long.

        Raises:
            TypeError: The surrogate does not say how.
        """
        raise TypeError(
            f"expected a surrogate with a method take(index), got {type(self).__name__}; give it "
            "one that keeps the target, and whatever else it holds for each image, at these "
            "positions of the batch, or attack with stop=None"
        )

    @abstractmethod
    def __call__(self, images: Tensor) -> Explanation:
        """Return the explanation to differentiate: one map an image, or one a look-ahead step."""


@final
class Direct(Surrogate):
    """A surrogate that is a function of images and classes, at a fixed class an image.

    Args:
        explain: The function; it holds nothing for each image.
        target: Classes ``(B,)``.

    Raises:
        TypeError: Something of a wrong type.
        ValueError: Classes of a wrong shape, or negative.
    """

    def __init__(self, explain: Callable[[Tensor, Tensor], Explanation], target: Tensor) -> None:
        self._explain: Callable[[Tensor, Tensor], Explanation] = expect_function(explain, "explain")
        self._target = expect_labels(target, None, name="target")

    def take(self, index: Tensor) -> None:
        """Go on with some images."""
        self._target = self._target[index]

    def __call__(self, images: Tensor) -> Explanation:
        """Explain images ``(B, C, H, W)``, as many as there are classes."""
        if len(images) != len(self._target):
            raise ValueError(
                f"expected {len(self._target)} images, one for each class, got {len(images)}"
            )
        return self._explain(images, self._target)


class Interpreter(ABC):
    """Turns images and classes into attribution maps, differentiably.

    Subclasses fill in `explain`, and `surrogate` where the map itself is not what to attack.
    Subclasses are final: vary behaviour by wrapping, not by overriding.

    Convention:
        Images in [0, 1]; maps ``(B, 1, h, w)`` in [0, 1], 1 = important, at native resolution.

    Args:
        model: The classifier explained; returns logits ``(B, classes)``. ``None`` where the
            interpreter explains a function and cannot tell which model is behind it.

    Attributes:
        scaled: Whether maps are min-max scaled per image, or natively in [0, 1].
    """

    scaled: ClassVar[bool] = True

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

    def surrogate(self, images: Tensor, target: Tensor) -> Surrogate:
        """Return what an attacker should differentiate; by default the interpreter itself.

        Args:
            images: Where the attack on the map starts ``(B, C, H, W)``.
            target: Class to explain ``(B,)``.

        Raises:
            TypeError: Images or classes of a wrong type.
            ValueError: Images or classes of a wrong shape or range.
        """
        return Direct(self.explain, expect_pair(images, target))

    @final
    def __call__(self, images: Tensor, target: Tensor) -> Tensor:
        """Return attribution maps ``(B, 1, h, w)``, differentiable with respect to ``images``.

        The model runs in eval mode and is left as it was.

        Args:
            images: ``(B, C, H, W)``, floating, in [0, 1].
            target: Class to explain, one an image, ``(B,)`` integer.

        Raises:
            TypeError: Images or classes of a wrong type.
            ValueError: Images or classes of a wrong shape or range.
        """
        target = expect_pair(images, target)
        with eval_mode(self.model):
            return self.explain(images, target).maps

    def after(self, preprocess: Callable[[Tensor], Tensor]) -> Self:
        """Return a copy that explains the model on ``preprocess(images)`` as a function of images.

        ``torchattacks`` normalises outside the model (``set_normalization_used``); the function
        attacked, and so the one explained, is then the two together.

        Raises:
            TypeError: No function.
        """
        expect_function(preprocess, "preprocess")
        clone = copy.copy(self)
        clone._preprocess = preprocess
        return clone

    def logits(self, images: Tensor, target: Tensor | None = None) -> Tensor:
        """Run the model on images; return logits ``(B, classes)`` that have the target classes.

        Raises:
            TypeError: Images or classes of a wrong type, or an interpreter without a model.
            ValueError: Images or classes of a wrong shape, no logits, or a class not among them.
        """
        expect_floats(images, "images", 4)
        if target is not None:
            expect_indices(target, None, "target")
        if self.model is None:
            raise TypeError(f"expected {type(self).__name__} to have a model, got None")
        logits = expect_logits(self.model(self.prepare(images)), len(images))
        return logits if target is None else expect_classes(logits, target)

    def prepare(self, images: Tensor) -> Tensor:
        """Return what the model sees of images: themselves, or what `after` was given makes."""
        return images if self._preprocess is None else self._preprocess(images)


# Modules that were in train mode, and the calls that hold each of them in eval mode.
_held: dict[nn.Module, set[object]] = {}
_holding = threading.Lock()


@contextmanager
def eval_mode(model: nn.Module | None) -> Iterator[None]:
    """Put a model into eval mode; put each of its modules back as it was, whatever happens.

    Where several calls, in one thread or in several, hold a module, the last to leave puts it back.
    """
    call, modules = object(), [] if model is None else list(model.modules())
    try:
        with _holding:
            for module in modules:
                if module.training or module in _held:
                    _held.setdefault(module, set()).add(call)
                    module.training = False
        yield
    finally:
        with _holding:
            for module in modules:
                calls = _held.get(module, set())
                if calls == {call}:
                    del _held[module]
                    module.training = True
                calls.discard(call)


@contextmanager
def differentiable_input(images: Tensor) -> Iterator[tuple[Tensor, bool]]:
    """Yield images to take an inner gradient at, and whether the caller will differentiate that.

    A caller under ``torch.no_grad()``, or whose images need no gradient, gets a leaf of its own
    and no graph of the gradient: half the memory.

    Raises:
        TypeError: Images that are no floating tensor.
        RuntimeError: Under ``torch.inference_mode()``, where no gradient can be taken.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "expected gradients to be available, got torch.inference_mode(); use torch.no_grad()"
        )
    expect_floats(images, "images")
    create_graph = torch.is_grad_enabled() and images.requires_grad
    with torch.enable_grad():
        yield (images if create_graph else images.detach().requires_grad_()), create_graph


def detached(explanation: Explanation) -> Explanation:
    """Return an explanation without its graph."""
    if not isinstance(explanation, Explanation):
        raise TypeError(f"expected an Explanation, got {type(explanation).__name__}")
    maps, *others = explanation
    return Explanation(maps.detach(), *(None if o is None else o.detach() for o in others))


def min_max(maps: Tensor) -> Tensor:
    """Scale each map to [0, 1] by its own minimum and maximum; a constant map becomes zeros.

    Args:
        maps: ``(B, 1, h, w)``, any range.

    Raises:
        TypeError: Not a tensor of a floating dtype.
        ValueError: Other dimensions.

    >>> min_max(torch.tensor([[[[1.0, 3.0], [2.0, 5.0]]]])).flatten().tolist()
    [0.0, 0.5, 0.25, 1.0]
    """
    expect_floats(maps, "maps", 4)
    low = maps.amin(dim=(1, 2, 3), keepdim=True)
    spread = maps.amax(dim=(1, 2, 3), keepdim=True) - low
    flat = spread <= _FLAT
    return ((maps - low) / spread.masked_fill(flat, 1)).masked_fill(flat, 0)


def expect_interpreter(value: object, name: str = "interpreter") -> Interpreter:
    """Return ``value`` if it is an interpreter; raise ``TypeError`` otherwise."""
    if not isinstance(value, Interpreter):
        raise TypeError(
            f"expected {name} to be an Interpreter, got {type(value).__name__}; "
            "build it on the model: CAM(model)"
        )
    return value


def expect_baseline(baseline: float | Tensor) -> float | Tensor:
    """Return a baseline if it is finite: a number, or a tensor of real ones."""
    if not isinstance(baseline, Tensor):
        return expect_number(baseline, "baseline", low=-math.inf)
    if baseline.is_complex() or baseline.dtype == torch.bool:
        raise TypeError(f"expected a baseline of a real dtype, got {baseline.dtype}")
    if not bool(baseline.isfinite().all()):
        raise ValueError("expected a finite baseline, got NaN or infinite values")
    return baseline


def background(baseline: float | Tensor, images: Tensor) -> Tensor:
    """Return a baseline as wide as the images, if it can be."""
    wide = torch.as_tensor(baseline, dtype=images.dtype, device=images.device)
    pairs = zip(reversed(wide.shape), reversed(images.shape), strict=False)
    if wide.ndim > images.ndim or any(here not in (1, there) for here, there in pairs):
        raise ValueError(
            f"expected a baseline for images {tuple(images.shape)}, got shape {tuple(wide.shape)}"
        )
    return wide.expand_as(images)
