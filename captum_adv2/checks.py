# SPDX-License-Identifier: MIT
"""Checks of what users pass in: each raises "expected ..., got ...; hint", before any work."""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = [
    "SoundnessWarning",
    "expect_classes",
    "expect_flag",
    "expect_floats",
    "expect_function",
    "expect_generator",
    "expect_images",
    "expect_indices",
    "expect_integer",
    "expect_labels",
    "expect_logits",
    "expect_maps",
    "expect_model",
    "expect_number",
    "expect_pair",
    "expect_size",
    "find_module",
]

# An image that went through (x - mean) / std and back may miss [0, 1] by a rounding error.
_SLACK = 1e-5


class SoundnessWarning(UserWarning):
    """The call is legal, but its result may not mean what it seems to mean."""


def expect_model(model: object) -> nn.Module:
    """Return ``model`` if it is a module; raise ``TypeError`` otherwise."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"expected model to be a torch.nn.Module, got {type(model).__name__}; "
            "wrap a function in a module"
        )
    return model


def _expect_values(value: object, name: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"expected {name} to be a torch.Tensor, got {type(value).__name__}")
    if value.is_meta:
        raise ValueError(
            f"expected {name} with values, got some on the meta device; move model and tensors to "
            "a real one"
        )
    return value


def expect_floats(value: object, name: str, ndim: int | None = None, *, hint: str = "") -> Tensor:
    """Return ``value`` if it is a floating tensor, of so many dimensions and not empty.

    Raises:
        TypeError: Not a tensor, or not of a floating dtype.
        ValueError: Other dimensions; empty, where their number is asked for.
    """
    found = _expect_values(value, name)
    if ndim is not None:
        _expect_dimensions(found, name, ndim)
    if not found.is_floating_point():
        raise TypeError(f"expected {name} of a floating dtype, got {found.dtype}{hint}")
    return found


def _expect_dimensions(value: Tensor, name: str, ndim: int) -> None:
    if value.ndim != ndim:
        raise ValueError(
            f"expected {name} with {ndim} dimensions, got shape {tuple(value.shape)}"
            + ("; add a batch dimension with [None]" if value.ndim == ndim - 1 else "")
        )
    if not value.numel():
        raise ValueError(f"expected at least one entry in {name}, got shape {tuple(value.shape)}")


def _expect_unit_range(value: Tensor, name: str, hint: str) -> None:
    low, high = (bound.item() for bound in value.detach().aminmax())
    if math.isnan(low) or math.isinf(low) or math.isinf(high):
        raise ValueError(f"expected finite {name}, got NaN or infinite values")
    if low < -_SLACK or high > 1 + _SLACK:
        raise ValueError(
            f"expected {name} in [0, 1], got values in [{low:.4g}, {high:.4g}]; {hint}"
        )


def expect_images(images: object, name: str = "images") -> Tensor:
    """Return ``images`` if they are a float batch ``(B, C, H, W)`` of finite values in [0, 1].

    Raises:
        TypeError: Not a tensor, or not of a floating dtype.
        ValueError: Wrong rank, empty, NaN or infinite, or outside [0, 1].
    """
    batch = expect_floats(images, name, 4, hint=f"; use {name}.float() / 255")
    _expect_unit_range(
        batch, name, "normalise inside the model, or call attack.set_normalization_used(mean, std)"
    )
    return batch


def expect_labels(
    labels: object, batch: int | None, classes: int | None = None, name: str = "labels"
) -> Tensor:
    """Return ``labels`` as a long tensor ``(B,)`` if they are class indices of a batch.

    Without ``batch``, of a batch of any size.

    Raises:
        TypeError: Not a tensor of an integer dtype.
        ValueError: Wrong shape, or an index outside [0, classes).
    """
    found = expect_indices(labels, batch, name)
    low, high = (int(bound) for bound in found.aminmax())
    if low < 0 or (classes is not None and high >= classes):
        bound = "0 and above" if classes is None else f"[0, {classes - 1}]"
        raise ValueError(f"expected {name} in {bound}, got values in [{low}, {high}]")
    return found


def expect_indices(labels: object, batch: int | None, name: str) -> Tensor:
    """Return ``labels`` as a long tensor ``(B,)``, without a look at its values.

    A look has a step of an attack wait for the GPU.

    Raises:
        TypeError: Not a tensor of an integer dtype.
        ValueError: Wrong shape, or empty.
    """
    labels = _expect_values(labels, name)
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"expected {name} of an integer dtype, got {labels.dtype}; use .long()")
    if tuple(labels.shape) != (labels.numel() if batch is None else batch,) or not len(labels):
        raise ValueError(
            f"expected {name} of shape ({'B' if batch is None else batch},), one class an image, "
            f"got {tuple(labels.shape)}"
        )
    # What was made in inference mode cannot be kept for a backward pass.
    return (labels.clone() if labels.is_inference() else labels).long()


def expect_pair(images: object, target: object) -> Tensor:
    """Return classes ``(B,)`` long, on the images' device, if they go with a batch of images.

    Raises:
        TypeError: Images or classes of a wrong type.
        ValueError: Images or classes of a wrong shape or range.
    """
    batch = expect_images(images)
    return expect_labels(target, len(batch), name="target").to(batch.device)


def expect_maps(maps: object, shape: tuple[int, ...] | None, source: str, name: str) -> Tensor:
    """Return ``maps`` if they are finite, in [0, 1] and of the interpreter's native resolution.

    Args:
        maps: What the user passed.
        shape: The shape wanted, ``(B, 1, h, w)``; ``None``: any with four dimensions.
        source: Name of the interpreter whose resolution it is.
        name: Name of the argument.

    Raises:
        TypeError: Not a tensor of a floating dtype.
        ValueError: Another shape, NaN or infinite, or outside [0, 1].
    """
    batch = expect_floats(maps, name, 4)
    if shape is not None and tuple(batch.shape) != shape:
        raise ValueError(
            f"expected {name} of shape {shape} from {source}, got {tuple(batch.shape)}; "
            "pass the interpreter's native resolution"
        )
    _expect_unit_range(batch, name, "1 means important; scale the maps")
    return batch


def expect_logits(output: object, batch: int) -> Tensor:
    """Return a model's output if it is logits ``(B, classes)`` with two classes or more.

    Raises:
        TypeError: The model returned something else than a tensor.
        ValueError: The tensor has another shape.
    """
    if not isinstance(output, Tensor):
        raise TypeError(
            f"expected the model to return logits of shape ({batch}, classes), "
            f"got {type(output).__name__}; wrap it in a module that returns the logits alone"
        )
    if output.ndim != 2 or output.shape[0] != batch or output.shape[1] < 2:
        raise ValueError(
            f"expected the model to return logits of shape ({batch}, classes) with at least two "
            f"classes, got {tuple(output.shape)}"
        )
    return output


def expect_classes(logits: Tensor, target: Tensor) -> Tensor:
    """Return logits ``(B, classes)`` if all target classes are among them.

    Raises:
        ValueError: A class is too large.
    """
    highest = int(target.amax())
    if highest >= logits.shape[1]:
        raise ValueError(
            f"expected target in [0, {logits.shape[1] - 1}], the model's classes, got {highest}"
        )
    return logits


def expect_number(
    value: Any, name: str, *, low: float, high: float = math.inf, above: bool = False
) -> float:
    """Return ``value`` if it is a finite number in [low, high] (in (low, high] with ``above``)."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"expected {name} to be a number, got {type(value).__name__}")
    # Tensors cannot take a longer integer, nor a float one that is longer still.
    size: Any = abs(value)
    long = isinstance(value, numbers.Rational) and size >= 2**63
    number = math.inf if long else float(value)
    below = number <= low if above else number < low
    if not math.isfinite(number) or below or number > high:
        bound = f"{'above' if above else 'at least'} {low:g}"
        bound += f" and at most {high:g}" if math.isfinite(high) else " and below 2**63" * long
        raise ValueError(f"expected {name} {bound}, got {value}")
    return number


def expect_integer(value: Any, name: str, *, low: int, high: float = math.inf) -> int:
    """Return ``value`` if it is an integer in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"expected {name} to be an integer, got {type(value).__name__}")
    expect_number(value, name, low=low, high=high)
    return int(value)


def expect_flag(value: Any, name: str) -> bool:
    """Return ``value`` if it is true or false; numbers will do, texts and tensors will not."""
    if not isinstance(value, bool | np.bool_ | numbers.Integral):
        raise TypeError(f"expected {name} to be True or False, got {type(value).__name__}")
    return bool(value)


def expect_size(size: Any, name: str) -> tuple[int, int]:
    """Return ``size`` if it is height and width, integers from 1 on."""
    if not isinstance(size, Sequence) or len(size) != 2:
        raise TypeError(f"expected {name} to be an integer for height and for width, got {size!r}")
    height, width = (expect_integer(side, name, low=1) for side in size)
    return height, width


def expect_function(value: Any, name: str) -> Callable[..., Any]:
    """Return ``value`` if it can be called, and is no class: those are to be made instances of."""
    if isinstance(value, type):
        raise TypeError(f"expected {name} to be a function, got a class; pass {value.__name__}()")
    if not callable(value):
        raise TypeError(f"expected {name} to be a function, got {type(value).__name__}")
    return value  # type: ignore[no-any-return]


def expect_generator(
    value: Any, hint: str = "torch.Generator().manual_seed(0) makes one"
) -> torch.Generator | None:
    """Return ``value`` if it is a generator, or ``None``."""
    if value is not None and not isinstance(value, torch.Generator):
        raise TypeError(
            f"expected generator to be a torch.Generator, got {type(value).__name__}; {hint}"
        )
    return value


def find_module(model: nn.Module, layer: nn.Module | str) -> nn.Module:
    """Return the module of ``model`` that ``layer`` is, or names (a dotted name).

    Raises:
        TypeError: ``layer`` is neither a module nor a string.
        ValueError: No such module in the model; near names are listed.
    """
    modules: dict[str, nn.Module] = dict(expect_model(model).named_modules())
    if isinstance(layer, str):
        if layer in modules and layer:
            return modules[layer]
        names = [name for name in modules if name]
        near = difflib.get_close_matches(layer, names, n=4, cutoff=0.4)
        hint = "near names: " + ", ".join(near) if near else "see model.named_modules()"
        raise ValueError(f"expected layer to name a module of the model, got {layer!r}; {hint}")
    if not isinstance(layer, nn.Module):
        raise TypeError(f"expected layer to be a module or its name, got {type(layer).__name__}")
    if not any(layer is module for module in modules.values()):
        raise ValueError(
            f"expected layer to be a module of the model, got another {type(layer).__name__}; "
            "pass its dotted name instead"
        )
    return layer
