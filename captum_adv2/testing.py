# SPDX-License-Identifier: MIT
"""Is an interpreter sound, and can it be attacked? `check_interpreter` finds out, with hypothesis.

A test file needs no more than ``testing.check_interpreter(MyInterpreter)``: networks, images and
classes are drawn, and each of `CHECKS` is held against them. What fails is shrunk to a small
example, whose printed form is code that makes it again. The strategies and the single checks are
there for tests of your own.

Needs hypothesis, which the rest of the package does without: ``pip install captum_adv2[test]``.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias, get_args
from unittest import SkipTest

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

from captum_adv2.checks import (
    expect_flag,
    expect_floats,
    expect_function,
    expect_images,
    expect_integer,
)
from captum_adv2.interpreters.base import Interpreter, eval_mode
from captum_adv2.interpreters.gradient import IntegratedGradients, probability

try:
    import hypothesis
    from hypothesis import HealthCheck, Phase
    from hypothesis import strategies as st
    from hypothesis.strategies import SearchStrategy
except ImportError as error:
    raise ImportError(
        "expected hypothesis to be installed, got none; pip install captum_adv2[test]"
    ) from error

__all__ = [
    "CHECKS",
    "CheckReport",
    "Network",
    "check_batch",
    "check_build",
    "check_class",
    "check_completeness",
    "check_deterministic",
    "check_differentiable",
    "check_finite",
    "check_gradcheck",
    "check_gradient",
    "check_interpreter",
    "check_logits",
    "check_range",
    "check_relabel",
    "check_scaling",
    "check_shape",
    "check_shift",
    "check_surrogate",
    "check_untouched",
    "classes",
    "image_batch",
    "images",
    "networks",
    "target_maps",
    "unchanged",
    "variant",
]

Build: TypeAlias = Callable[[nn.Module], Interpreter]
"""What makes an interpreter from a model: a class, or a function."""

Attributions: TypeAlias = Callable[[Any, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Interpreter, images and target to signed attributions, and to what they should add up to."""

Images: TypeAlias = Tensor | tuple[int, int, int] | SearchStrategy[Tensor] | None
"""A batch of images, or the shape ``(C, H, W)`` of ones to draw, or how to draw them."""

Kind: TypeAlias = Literal[
    "random", "black", "white", "constant", "saturated", "nearly constant", "nearly equal"
]
Body: TypeAlias = Literal["plain", "residual", "dense"]
Activation: TypeAlias = Literal["ReLU", "SiLU", "GELU"]

_SEEDS = st.integers(0, 2**16 - 1)
_SMOOTH: tuple[Activation, ...] = ("SiLU", "GELU")
_CLASSES = 4


# What is drawn. Every value is made by a call with small arguments: it shrinks, and prints as code.


def image_batch(
    shape: tuple[int, ...] = (1, 3, 8, 8), seed: int = 0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return random images in [0, 1] of a shape ``(B, C, H, W)``.

    Raises:
        TypeError: Something of a wrong type.
        ValueError: A negative number.

    >>> image_batch((2, 1, 4, 4), seed=3).shape
    torch.Size([2, 1, 4, 4])
    """
    sizes = [expect_integer(n, "shape", low=0) for n in shape]
    generator = torch.Generator().manual_seed(expect_integer(seed, "seed", low=0))
    return torch.rand(sizes, generator=generator, dtype=dtype)


def variant(images: Tensor, kind: Kind) -> Tensor:
    """Return images ``(B, C, H, W)`` made into some kind of degenerate ones, or as they are.

    Raises:
        TypeError: Images that are not a floating tensor.
        ValueError: Images without four dimensions, or an unknown kind.

    >>> variant(image_batch(), "saturated").unique().tolist()
    [0.0, 1.0]
    """
    expect_floats(images, "images", 4)
    _expect_from(kind, "kind", get_args(Kind))
    match kind:
        case "random":
            return images
        case "black":
            return torch.zeros_like(images)
        case "white":
            return torch.ones_like(images)
        case "constant":  # each image its own grey
            return images[:, :1, :1, :1].expand_as(images).clone()
        case "saturated":
            return images.round()
        case "nearly constant":
            return 0.5 + 1e-6 * (images - 0.5)
        case "nearly equal":
            return (images[:1] + 1e-6 * (images - 0.5)).clamp(0, 1)


def _expect_from(value: Any, name: str, known: Collection[str]) -> None:
    if not (isinstance(value, str) and value in known):
        raise ValueError(f"expected {name} from {list(known)}, got {value!r}")


def images(
    shape: tuple[int, int, int] | None = None,
    *,
    batch: tuple[int, int] = (1, 3),
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.float64),
    kinds: Sequence[Kind] = get_args(Kind),
) -> SearchStrategy[Tensor]:
    """Draw batches of images in [0, 1], plain and degenerate: `variant` has the kinds.

    Args:
        shape: ``(C, H, W)``; default: three channels, sides from 6 to 10.
        batch: Least and largest number of images.
        dtypes: Drawn from these.
        kinds: Drawn from these.
    """
    return _variants(_plain(shape, batch, dtypes), kinds)


def _plain(
    shape: tuple[int, int, int] | None,
    batch: tuple[int, int] = (1, 3),
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.float64),
) -> SearchStrategy[Tensor]:
    sides = st.integers(6, 10)
    each = (st.just(3), sides, sides) if shape is None else map(st.just, shape)
    return st.builds(
        image_batch,
        shape=st.tuples(st.integers(*batch), *each),
        seed=_SEEDS,
        dtype=st.sampled_from(dtypes),
    )


def _variants(plain: SearchStrategy[Tensor], kinds: Sequence[Kind]) -> SearchStrategy[Tensor]:
    if tuple(kinds) == ("random",):
        return plain  # prints shorter
    return st.builds(variant, images=plain, kind=st.sampled_from(kinds))


def classes(batch: int = 3, count: int = _CLASSES) -> SearchStrategy[Tensor]:
    """Draw classes ``(batch,)`` long, out of ``count``."""
    return st.builds(
        torch.tensor, st.lists(st.integers(0, count - 1), min_size=batch, max_size=batch)
    )


def target_maps(
    size: tuple[int, int] = (8, 8), *, batch: tuple[int, int] = (1, 3)
) -> SearchStrategy[Tensor]:
    """Draw maps ``(B, 1, h, w)`` in [0, 1] to aim an attack at: random, empty, full, binary."""
    return images((1, *size), batch=batch, dtypes=(torch.float32,))


class Network(nn.Module):
    """A small random classifier in eval mode: ``stem``, ``body``, average pooling, ``fc``.

    Args:
        body: ``"plain"``, ``"residual"`` or ``"dense"``: layers in a row, added to what they saw,
            or set beside it.
        activation: ``"ReLU"`` (in place), ``"SiLU"`` or ``"GELU"``.
        norm: Whether layers have batch norm, with statistics as if trained.
        seed: Of the weights.
        channels: Of the images.
        classes: Number of logits.

    Raises:
        TypeError: Something of a wrong type.
        ValueError: A number out of range, or an unknown body or activation.

    >>> Network("dense", "SiLU", seed=3)(image_batch()).shape
    torch.Size([1, 4])
    """

    def __init__(
        self,
        body: Body = "plain",
        activation: Activation = "ReLU",
        norm: bool = False,
        seed: int = 0,
        *,
        channels: int = 3,
        classes: int = _CLASSES,
    ) -> None:
        super().__init__()
        _expect_from(body, "body", get_args(Body))
        _expect_from(activation, "activation", get_args(Activation))
        expect_flag(norm, "norm")
        expect_integer(seed, "seed", low=0)
        expect_integer(channels, "channels", low=1)
        expect_integer(classes, "classes", low=1)
        width = 6

        def layer(inputs: int) -> nn.Sequential:
            convolution = nn.Conv2d(inputs, width, 3, padding=1)
            between = [nn.BatchNorm2d(width)] if norm else []
            act = nn.ReLU(inplace=True) if activation == "ReLU" else getattr(nn, activation)()
            return nn.Sequential(convolution, *between, act)

        with torch.random.fork_rng(devices=[]):  # modules draw weights, which are not kept
            self.stem = nn.Sequential(*layer(channels), nn.AvgPool2d(2))
            inputs = [width, 2 * width if body == "dense" else width]
            self.body = nn.Sequential(*(_Block(body, layer(count)) for count in inputs))
            self.fc = nn.Linear(width + (2 * width if body == "dense" else 0), classes)
        self._describe = f"{body!r}, {activation!r}, {norm}, seed={seed}"
        self._randomise(torch.Generator().manual_seed(seed))
        self.eval()

    def __repr__(self) -> str:
        return f"Network({self._describe})"

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(B, classes)`` of images ``(B, channels, H, W)``."""
        logits: Tensor = self.fc(self.body(self.stem(x)).mean(dim=(2, 3)))
        return logits

    @torch.no_grad()
    def _randomise(self, generator: torch.Generator) -> None:
        for name, value in (*self.named_parameters(), *self.named_buffers()):
            if not value.is_floating_point():
                continue  # batch norm counts batches
            noise = torch.randn(value.shape, generator=generator)
            if value.ndim > 1:  # He's scale: signals neither die nor explode
                value.copy_(noise * (2 / value[0].numel()) ** 0.5)
            elif "running_var" in name:
                value.copy_(0.5 + noise.abs())
            else:
                value.copy_(0.1 * noise + (value == 1))


class _Block(nn.Module):
    """A layer, and what becomes of its input."""

    def __init__(self, body: Body, layer: nn.Module) -> None:
        super().__init__()
        self.body, self.layer = body, layer

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        if self.body == "dense":
            return torch.cat([x, out], dim=1)
        return x + out if self.body == "residual" else out


def networks(
    *,
    bodies: Sequence[Body] = get_args(Body),
    activations: Sequence[Activation] = get_args(Activation),
    channels: int = 3,
    classes: int = _CLASSES,
) -> SearchStrategy[Network]:
    """Draw small random classifiers, with and without batch norm: see `Network`."""
    return st.builds(
        Network,
        body=st.sampled_from(bodies),
        activation=st.sampled_from(activations),
        norm=st.booleans(),
        seed=_SEEDS,
        channels=st.just(channels),
        classes=st.just(classes),
    )


# What must be left as it was


def _traces(model: nn.Module | None, tensors: Sequence[Tensor]) -> dict[str, Any]:
    """Describe all that a call might leave behind on a model, on tensors or in the process."""
    found: dict[str, Any] = {}
    held = [(f"tensor {i}", tensor) for i, tensor in enumerate(tensors)]
    if model is not None:
        for name, module in model.named_modules():
            for key, value in vars(module).items():
                found[f"{name or 'the model'}.{key}"] = (
                    (tuple(value), tuple(map(id, value.values())))
                    if isinstance(value, dict)
                    else value
                    if key == "training"
                    else id(value)
                )
        held += [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in held:
        found[f"the values of {name}"] = tensor.detach().clone()
        gradient = tensor.grad if tensor.is_leaf else None
        found[f"the gradient of {name}"] = gradient is None or (id(gradient), gradient._version)
        hooks = bool(tensor._backward_hooks)
        found[f"the state of {name}"] = tensor.requires_grad, tensor._version, hooks
    found["random's generator"] = random.getstate()
    found["NumPy's generator"] = repr(np.random.get_state())  # noqa: NPY002  (it is looked at)
    found["torch's generator"] = torch.get_rng_state()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        found["CUDA's generators"] = torch.stack(torch.cuda.get_rng_state_all())
    found["the gradient mode"] = torch.is_grad_enabled()
    found["the default dtype"] = torch.get_default_dtype()
    found["autocast"] = torch.is_autocast_enabled("cpu")
    modes = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    found["the function modes"] = list(map(id, modes))  # identity, torch's own included
    return found


def _same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) else bool(one == other)


@contextmanager
def unchanged(model: nn.Module | None, *tensors: Tensor) -> Iterator[None]:
    """Hold that a block leaves a model, tensors and the process as they were.

    That is: weights, buffers, gradients, hooks, flags and attributes of every module; values,
    gradients and flags of the tensors; the global generators; gradient mode, default dtype,
    autocast, function modes. An exception in the block passes through unhindered.

    Raises:
        AssertionError: Something is another; it is named.

    >>> with unchanged(nn.Linear(2, 2)):
    ...     torch.get_rng_state()[0].item() >= 0
    True
    """
    before = _traces(model, tensors)
    yield
    after = _traces(model, tensors)
    changed = [key for key in before | after if not _same(before.get(key), after.get(key))]
    if changed:
        several = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise AssertionError(
            f"expected all to be left as it was, got a change of {', '.join(changed[:3])}{several}"
        )


# The checks


def _apart(one: Tensor, other: Tensor) -> Tensor:
    """Return the largest difference per image, ``(B,)``."""
    return (one - other).detach().abs().flatten(1).amax(dim=1)


def _tolerance(images: Tensor) -> float:
    """Return how far maps may be apart that are equal but for rounding."""
    return {torch.float64: 1e-6, torch.float32: 1e-3}.get(images.dtype, 5e-2)


_NO_GRAPH = (
    "expected maps to be differentiable with respect to the images, got no graph that leads there; "
    "look for detach, data, no_grad, or a leaf made inside"
)


def _hold(good: Tensor, target: Tensor, expected: str, got: Tensor, of: str = "") -> None:
    """Raise for the first image ``(B,)`` that is not good."""
    if bool(good.all()):
        return
    index = int((~good).nonzero()[0])
    raise AssertionError(
        f"expected {expected}, got {of}{got[index].item():.4g} for image {index} of a batch of "
        f"{len(good)} (class {int(target[index])})"
    )


def _hold_equal(
    apart: Tensor, target: Tensor, expected: str, tolerance: float, of: str = "one apart by "
) -> None:
    """Raise for the first image whose difference ``(B,)`` is too large, or NaN."""
    _hold(apart <= tolerance, target, expected, apart, of)


def _attacked(
    interpreter: Interpreter, images: Tensor, target: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Return the surrogate's maps and the gradient of a weighted sum of them, if they have one."""
    x = images.clone().requires_grad_()
    with eval_mode(interpreter.model):
        maps = interpreter.surrogate(images, target)(x).maps
        return maps.detach(), _gradient(maps, x)


def _gradient(maps: Tensor, x: Tensor) -> Tensor | None:
    # That a map requires grad proves nothing: it may hang on the parameters alone.
    if not maps.requires_grad:
        return None
    return torch.autograd.grad(_weighted(maps).sum(), x, allow_unused=True)[0]


def _weighted(maps: Tensor) -> Tensor:
    """Return a sum of each image's map ``(B,)`` in which every pixel counts, and another."""
    weights = torch.linspace(1, 2, maps[0].numel(), dtype=maps.dtype, device=maps.device)
    return maps.flatten(1) @ weights


def _slope(interpreter: Interpreter, images: Tensor, target: Tensor) -> Tensor:
    """Return the gradient of the reported map; skip the check where it has none by design."""
    x = images.clone().requires_grad_()
    with eval_mode(interpreter.model):
        gradient = _gradient(interpreter.explain(x, target).maps, x)
    if gradient is not None:
        return gradient
    if _attacked(interpreter, images, target)[1] is None:
        raise AssertionError(_NO_GRAPH)
    raise SkipTest("the map has no derivative; the surrogate's, which an attack sees, is made")


def check_shape(interpreter: Interpreter, images: Tensor, target: Tensor) -> None:
    """Maps are ``(B, 1, h, w)``, of the images' dtype, on their device."""
    maps = interpreter(images, target)
    batch = len(images)
    if maps.ndim != 4 or maps.shape[:2] != (batch, 1):
        raise AssertionError(
            f"expected maps of shape ({batch}, 1, h, w), got {tuple(maps.shape)} for images of "
            f"shape {tuple(images.shape)}"
        )
    if (maps.dtype, maps.device) != (images.dtype, images.device):
        raise AssertionError(
            f"expected maps of {images.dtype} on {images.device}, as the images, got {maps.dtype} "
            f"on {maps.device}"
        )


def check_finite(interpreter: Interpreter, images: Tensor, target: Tensor) -> None:
    """Maps and the surrogate's gradient have no NaN and no infinity, on degenerate images too."""
    found = {"map": interpreter(images, target)}
    seen, gradient = _attacked(interpreter, images, target)
    found["surrogate's map"] = seen
    if gradient is not None:
        found["surrogate's gradient"] = gradient
    for name, values in found.items():
        wrong = (~values.isfinite()).flatten(1).sum(dim=1)
        of = "NaN or infinite entries, in number "
        _hold(wrong == 0, target, f"a finite {name}", wrong, of)


def check_range(interpreter: Interpreter, images: Tensor, target: Tensor) -> None:
    """Maps are in [0, 1]; scaled ones reach both ends, or are constant and 0."""
    maps = interpreter(images, target).detach()
    low, high = (bound.flatten() for bound in maps.flatten(1).aminmax(dim=1))
    slack = min(1e-5, _tolerance(images))
    _hold(low >= -slack, target, "a map of at least 0", low)
    _hold(high <= 1 + slack, target, "a map of at most 1", high)
    if interpreter.scaled:
        _hold(low <= slack, target, "a scaled map's smallest value to be 0", low)
        ends = (high >= 1 - slack) | (high == 0)
        hint = "; natively in [0, 1]? then set scaled = False"
        _hold(ends, target, f"a scaled map's largest value to be 1{hint}", high)


def check_deterministic(interpreter: Interpreter, images: Tensor, target: Tensor) -> None:
    """The same images give the same maps, whatever was called before and the global seed is."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(1)
        first = interpreter(images, target)
        interpreter(images.flip(0)[:1], target.flip(0)[:1])
        torch.default_generator.manual_seed(2)
        apart = _apart(interpreter(images, target), first)
    # A GPU adds up in another order each time.
    slack = 0.0 if images.device.type == "cpu" else _tolerance(images)
    _hold_equal(apart, target, "the same map at a second call", slack)


def check_batch(interpreter: Interpreter, images: Tensor, target: Tensor) -> None:
    """A batch gives the maps, and the surrogate's gradients, of its images one by one."""
    if len(images) == 1:
        images, target = torch.cat([images, images.flip(3)]), target.repeat(2)
    pairs = [(images[i : i + 1], target[i : i + 1]) for i in range(len(images))]
    apart = _apart(interpreter(images, target), torch.cat([interpreter(*pair) for pair in pairs]))
    tolerance = _tolerance(images)
    _hold_equal(apart, target, "in a batch the map of the image alone", tolerance)
    gradients = [_attacked(interpreter, *pair)[1] for pair in pairs]
    together = _attacked(interpreter, images, target)[1]
    if together is None:
        return
    alone = torch.cat([torch.zeros_like(images[:1]) if g is None else g for g in gradients])
    size = alone.abs().flatten(1).amax(dim=1).clamp(min=1)
    apart = _apart(together, alone) / size
    _hold_equal(apart, target, "in a batch the gradient of the image alone", tolerance)


def check_class(interpreter: Interpreter, images: Tensor, target: Tensor) -> None:
    """Another class has another map, on one of the images at least."""
    count = _count(interpreter, images)
    if count < 3:
        raise SkipTest("of two classes the maps may be the same, as the gradient of p is of 1 - p")
    first = interpreter(images, target)
    others = [interpreter(images, (target + by) % count) for by in range(1, min(count, 4))]
    apart = max(float(_apart(first, other).amax()) for other in others)
    if not apart > 1e-3:
        raise AssertionError(
            f"expected maps that depend on the class, got maps of classes {target.tolist()} and of "
            f"{len(others)} others each that differ by {apart:.2g} at most; is target used?"
        )


def _count(interpreter: Interpreter, images: Tensor) -> int:
    """Return how many classes the model has; where it is not known, the least it can have."""
    if interpreter.model is None:
        return 2
    with eval_mode(interpreter.model), torch.no_grad():
        return interpreter.logits(images[:1]).shape[1]


def check_differentiable(interpreter: Interpreter, images: Tensor, target: Tensor) -> None:
    """The surrogate's map has a graph that leads to the images, and a gradient that is not 0."""
    maps, gradient = _attacked(interpreter, images, target)
    if gradient is None:
        raise AssertionError(_NO_GRAPH)
    size = gradient.abs().flatten(1).amax(dim=1)
    constant = maps.flatten(1).amax(dim=1) == maps.flatten(1).amin(dim=1)
    _hold((size > 0) | constant, target, "a gradient of the map that is not 0", size)


def check_gradient(interpreter: Interpreter, images: Tensor, target: Tensor) -> None:
    """The map's gradient is its slope, by finite differences along random directions."""
    if images.dtype != torch.float64:
        raise SkipTest("needs double precision, in which the interpreter cannot be copied or run")
    gradient = _slope(interpreter, images, target)
    misses = []
    with eval_mode(interpreter.model), torch.no_grad():
        # Along a direction one of many ReLUs may switch, however small the step: the map of a
        # gradient jumps there. A wrong gradient is wrong along each of four.
        for seed in range(4):
            direction = torch.randn(
                images.shape, generator=torch.Generator().manual_seed(seed), dtype=images.dtype
            ).to(images.device)
            step = 1e-9 * direction
            ahead, back = (
                _weighted(interpreter.explain(x, target).maps)
                for x in (images + step, images - step)
            )
            slope, claimed = (ahead - back) / 2e-9, (gradient * direction).flatten(1).sum(dim=1)
            size = torch.maximum(gradient.flatten(1).norm(dim=1), slope.abs())
            misses.append((claimed - slope).abs() / (size + 1e-3))  # rounding: about 1e-6
    least = torch.stack(misses).amin(dim=0)
    expected = "a gradient of the map that agrees with finite differences"
    _hold_equal(least, target, expected, 1e-2, "a relative error of ")


def check_gradcheck(interpreter: Interpreter, images: Tensor, target: Tensor) -> None:
    """``torch.autograd.gradcheck`` of the map holds; on a smooth network, in float64."""
    _slope(interpreter, images, target)

    def maps(x: Tensor) -> Tensor:
        return interpreter.explain(x, target).maps

    x = images.clone().requires_grad_()
    with eval_mode(interpreter.model):
        try:  # hooks see undefined gradients in the check of those; they are none of ours
            torch.autograd.gradcheck(maps, (x,), check_undefined_grad=False, fast_mode=True)
        except RuntimeError as error:
            first = str(error).strip().splitlines()[0]
            raise AssertionError(f"expected gradcheck of the map to hold, got: {first}") from error


def check_surrogate(interpreter: Interpreter, images: Tensor, target: Tensor) -> None:
    """Where an attack starts, the surrogate's map is near the reported one, on a smooth network.

    Near: their L1 distance is 0.05 at most. (On ReLUs a smoothed gradient may be far from the
    exact one, and is not held to this.)
    """
    _slope(interpreter, images, target)
    maps, seen = interpreter(images, target), _attacked(interpreter, images, target)[0]
    if (len(seen), *seen.shape[2:]) != (len(maps), *maps.shape[2:]):
        raise AssertionError(
            f"expected the surrogate's maps at the map's resolution, {tuple(maps.shape)}, got "
            f"{tuple(seen.shape)}"
        )
    apart = (seen[:, :1] - maps).detach().abs().mean(dim=(1, 2, 3))
    _hold_equal(apart, target, "the surrogate's map near the reported one", 0.05)


def check_logits(interpreter: Interpreter, images: Tensor, target: Tensor) -> None:
    """Logits that come with a map are the model's, of these very images."""
    with eval_mode(interpreter.model), torch.no_grad():
        own = interpreter.explain(images, target).logits
        seen = interpreter.surrogate(images, target)(images).logits
        if interpreter.model is None or (own is None and seen is None):
            raise SkipTest("no logits come with the maps")
        expected = interpreter.logits(images, target)
    for logits in (own, seen):
        if logits is not None:
            apart = _apart(logits, expected) / (1 + expected.abs().amax(dim=1))
            _hold_equal(apart, target, "the model's logits", _tolerance(images), "ones apart by ")


class _Planted(Exception):
    """What the check of exceptions raises inside the model."""


def check_untouched(interpreter: Interpreter, images: Tensor, target: Tensor) -> None:
    """A call leaves everything as it was: see `unchanged`; also where the model raises."""
    model = interpreter.model
    modules = [] if model is None else [m for m in model.modules() if not any(m.children())]

    def attack(x: Tensor, target: Tensor) -> None:
        with eval_mode(model):
            _gradient(interpreter.surrogate(x, target)(x).maps, x)

    def fail(*_: Any) -> None:
        raise _Planted

    _leaves_alone(interpreter, (interpreter, attack), images, target)
    for module in modules[:1] + modules[-1:]:
        handle = module.register_forward_hook(fail)
        try:
            _leaves_alone(interpreter, (interpreter, attack), images, target)
        except AssertionError as error:
            error.args = (f"{error}, after an exception in {type(module).__name__}",)
            raise
        finally:
            handle.remove()
    trained = [] if model is None else [m for m in model.modules() if not m.training][::2]
    try:  # some in train mode: a call puts each one back; a surrogate leaves modes to the attack
        for module in trained:
            module.training = True
        _leaves_alone(interpreter, (interpreter,), images, target)
    finally:
        for module in trained:
            module.training = False


def _leaves_alone(
    interpreter: Interpreter,
    calls: Sequence[Callable[[Tensor, Tensor], Any]],
    images: Tensor,
    target: Tensor,
) -> None:
    for call in calls:
        x = images.clone().requires_grad_()
        with unchanged(interpreter.model, x, target), suppress(_Planted):
            call(x, target)


def _built(build: Build, network: nn.Module) -> Interpreter:
    """Build an interpreter; weights of its own, if it has any, are the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return build(network)


def check_build(build: Build, network: Network, images: Tensor, target: Tensor) -> None:
    """To build an interpreter leaves the model as it was; another one gives the same maps."""
    with unchanged(network):
        interpreter = _built(build, network)
    maps = interpreter(images, target)
    apart = _apart(_built(build, network)(images, target), maps)
    _hold_equal(apart, target, "the same map from a second interpreter", _tolerance(images))


def _hold_invariant(
    build: Build,
    network: Network,
    images: Tensor,
    target: Tensor,
    what: str,
    change: Callable[[Network], Any],
    *,
    changed: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Hold that a changed network has the same maps, of the same images or of changed ones."""
    other = copy.deepcopy(network)
    with torch.no_grad():
        change(other)
    theirs = _built(build, other)(*(changed or (images, target)))
    apart = _apart(_built(build, network)(images, target), theirs)
    _hold_equal(apart, target, f"the same map {what}", _tolerance(images))


def check_shift(build: Build, network: Network, images: Tensor, target: Tensor) -> None:
    """A constant added to all logits changes no probability, and no map."""

    def change(network: Network) -> None:
        network.fc.bias.add_(1.5)

    _hold_invariant(build, network, images, target, "with 1.5 added to all logits", change)


def check_relabel(build: Build, network: Network, images: Tensor, target: Tensor) -> None:
    """Classes numbered from behind have the same maps, each under its new number."""

    def change(network: Network) -> None:
        for parameter in network.fc.parameters():
            parameter.copy_(parameter.flip(0))  # a rotation would not tell on "the next class"

    renamed = images, len(network.fc.weight) - 1 - target
    what = "with classes numbered from behind"
    _hold_invariant(build, network, images, target, what, change, changed=renamed)


def check_scaling(build: Build, network: Network, images: Tensor, target: Tensor) -> None:
    """Images half as bright, for a network with first weights twice as large: the same maps."""

    def change(network: Network) -> None:
        next(network.stem.parameters()).mul_(2)

    what = "of images half as bright, by a network with first weights twice as large"
    _hold_invariant(build, network, images, target, what, change, changed=(images / 2, target))


def check_completeness(
    interpreter: Interpreter,
    images: Tensor,
    target: Tensor,
    attributions: Attributions | None = None,
) -> None:
    """Signed attributions add up to what the method promises, up to 5 % of their size.

    Args:
        interpreter: What to check.
        images: ``(B, C, H, W)``.
        target: ``(B,)``.
        attributions: Interpreter, images and target to attributions, batch first, and the sums
            ``(B,)`` they promise; default: those of `IntegratedGradients`, which are known.
    """
    if attributions is None:
        if not isinstance(interpreter, IntegratedGradients):
            raise SkipTest("completeness is no promise of this method; if it is, attributions=")
        attributions = _integrated
    with eval_mode(interpreter.model):
        values, promised = attributions(interpreter, images, target)
    total, size = values.flatten(1).sum(dim=1), values.abs().flatten(1).sum(dim=1)
    apart = (total - promised).abs()
    good = apart <= 0.05 * torch.maximum(size, promised.abs()) + 1e-6
    _hold(good, target, "attributions that add up to what they promise", apart, "a sum apart by ")


def _integrated(interpreter: Any, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    x = images.clone().requires_grad_()
    values, logits = interpreter._attribute(x, target, create_graph=False)
    with torch.no_grad():
        start = torch.as_tensor(interpreter.baseline).to(images).expand_as(images)
        before = probability(interpreter.logits(start), target)
        return values, probability(logits, target) - before


class _Check(NamedTuple):
    """A check, and what it is to be run on.

    Attributes:
        function: ``(interpreter, images, target)``, or with ``rebuilt`` ``(build, network, images,
            target)``.
        degenerate: On degenerate images too.
        exact: In double precision, so that what is equal but for rounding is told from what is not.
        smooth: On networks with derivatives of every order, where networks are drawn.
        rebuilt: On interpreters that it builds itself.
        drawn: On drawn networks only.
    """

    function: Callable[..., None]
    degenerate: bool = False
    exact: bool = False
    smooth: bool = False
    rebuilt: bool = False
    drawn: bool = False


# In this order: a fault that several checks would see is called by its name.
CHECKS: dict[str, _Check] = {
    "shape": _Check(check_shape),
    "finite": _Check(check_finite, degenerate=True),
    "deterministic": _Check(check_deterministic),
    "untouched": _Check(check_untouched),
    "batch": _Check(check_batch, exact=True),
    "range": _Check(check_range, degenerate=True),
    "class": _Check(check_class, exact=True),
    "differentiable": _Check(check_differentiable, exact=True, smooth=True),
    "gradient": _Check(check_gradient, exact=True, smooth=True),
    "gradcheck": _Check(check_gradcheck, exact=True, smooth=True, drawn=True),
    "surrogate": _Check(check_surrogate, exact=True, smooth=True, drawn=True),
    "logits": _Check(check_logits, exact=True),
    "build": _Check(check_build, rebuilt=True, drawn=True),
    "shift": _Check(check_shift, exact=True, rebuilt=True, drawn=True),
    "relabel": _Check(check_relabel, exact=True, rebuilt=True, drawn=True),
    "scaling": _Check(check_scaling, exact=True, rebuilt=True, drawn=True),
    "completeness": _Check(check_completeness, exact=True, smooth=True),
}


_Trial: TypeAlias = tuple[Callable[..., None], list[dict[str, SearchStrategy[Any]]]]
_Trials: TypeAlias = Callable[[_Check], _Trial]


@dataclass(frozen=True)
class CheckReport:
    """What was checked of an interpreter, and what was not; prints as a list.

    Attributes:
        interpreter: What was checked.
        held: Names of the checks that hold.
        skipped: Names of the checks that were not made, each with the reason.
    """

    interpreter: str
    held: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.interpreter}: {len(self.held)} of {len(CHECKS)} checks hold"]
        lines += [f"  held: {', '.join(self.held)}"]
        lines += [f"  not checked: {name} ({reason})" for name, reason in self.skipped.items()]
        return "\n".join(lines)


def check_interpreter(
    interpreter: Interpreter | Build,
    images: Images = None,
    *,
    max_examples: int = 10,
    skip: Collection[str] | Mapping[str, str] = (),
    seed: int | None = 0,
    attributions: Attributions | None = None,
) -> CheckReport:
    """Hold every check that applies against an interpreter; raise at the first that fails.

    Args:
        interpreter: A class, or function, that makes an interpreter from a model: then networks are
            drawn, of `Network`'s kinds. Or an interpreter, on your own model: then images alone.
        images: A batch ``(B, C, H, W)``; or ``(C, H, W)``, the shape of random ones; or a strategy
            for batches (of three channels, where networks are drawn). Default: small ones, for an
            interpreter 32 x 32. Degenerate variants are made of them where a check wants these.
        max_examples: Of each check.
        skip: Names of checks to leave out, or a mapping from names to reasons.
        seed: Of hypothesis: the same examples at every run, and no example database. With ``None``
            they are drawn anew each time, and failures are remembered, as the profile in use says.
        attributions: For a method that promises completeness; see `check_completeness`.

    Returns:
        Which checks hold, and which were not made, and why.

    Raises:
        AssertionError: A check fails: its name, what was expected, what came, and for which image;
            the example, shrunk, is in the notes.
        TypeError: Neither an interpreter nor what makes one, or something else of a wrong type.
        ValueError: ``skip`` names no check, or a number is out of range.

    >>> from captum_adv2.interpreters import CAM
    >>> report = check_interpreter(CAM, max_examples=1, skip={"scaling": "to show a reason"})
    >>> print(str(report).splitlines()[-2])
      not checked: scaling (to show a reason)
    """
    if not callable(interpreter):
        raise TypeError(
            "expected an interpreter, or a function of a model that returns one, got "
            f"{type(interpreter).__name__}"
        )
    expect_integer(max_examples, "max_examples", low=1)
    if seed is not None:
        expect_integer(seed, "seed", low=0)
    if attributions is not None:
        expect_function(attributions, "attributions")
    if not isinstance(skip, Collection) or not all(isinstance(name, str) for name in skip):
        raise TypeError(f"expected skip to be names of checks, got {skip!r}")
    if not isinstance(images, Tensor | SearchStrategy | None):
        images = _expect_shape(images)
    reasons = dict(skip) if isinstance(skip, Mapping) else dict.fromkeys(skip, "as asked")
    if unknown := reasons.keys() - CHECKS.keys():
        raise ValueError(f"expected skip from {list(CHECKS)}, got {sorted(unknown)}")
    if isinstance(interpreter, Interpreter):
        model, trial = interpreter.model, _on_own(interpreter, images)
    else:
        model, trial = None, _on_drawn(interpreter, images)
    report = CheckReport(getattr(interpreter, "__name__", repr(interpreter)))
    # Around all: what only the very first call leaves behind, no single check would see.
    with unchanged(model):
        for name, check in CHECKS.items():
            if check.function is check_completeness:
                check = check._replace(function=partial(check.function, attributions=attributions))
            try:
                if name in reasons:
                    raise SkipTest(reasons[name])
                _run(name, *trial(check), max_examples, seed)
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


def _expect_shape(shape: object) -> tuple[int, int, int]:
    if not isinstance(shape, tuple | list) or len(shape) != 3:
        raise TypeError(
            f"expected images to be a batch, a shape (C, H, W) or a strategy, got {shape!r}"
        )
    channels, height, width = (expect_integer(n, "images' shape", low=1) for n in shape)
    return channels, height, width


def _on_drawn(build: Build, images: Images) -> _Trials:
    """Return how to run a check where networks are drawn."""
    plain, channels = _source(images, None)

    def trial(check: _Check) -> _Trial:
        def test(network: Network, images: Tensor, target: Tensor) -> None:
            images = images.double() if check.exact else images
            network, target = network.to(images.dtype), _fit(target, images)
            if check.rebuilt:
                check.function(build, network, images, target)
            else:
                check.function(_built(build, network), images, target)

        activations = _SMOOTH if check.smooth else get_args(Activation)
        drawn = networks(activations=activations, channels=channels)
        return test, _draws(check, plain, _CLASSES, network=drawn)

    return trial


def _on_own(interpreter: Interpreter, images: Images) -> _Trials:
    """Return how to run a check on an interpreter as it is."""
    parameters = [] if interpreter.model is None else list(interpreter.model.parameters())
    like = parameters[0].detach() if parameters else torch.zeros(())
    channels = next((p.shape[1] for p in parameters if p.ndim == 4), 3)
    plain, _ = _source(images, (channels, 32, 32))
    probe = hypothesis.find(plain, lambda _: True).to(like)
    count = _count(interpreter, probe)
    wide = _widened(interpreter, probe)

    def trial(check: _Check) -> _Trial:
        if check.drawn:
            raise SkipTest("needs drawn networks; pass what makes the interpreter from a model")

        def test(images: Tensor, target: Tensor) -> None:
            images = images.to(like)
            target = _fit(target, images)
            if check.exact and wide is not None:
                check.function(wide, images.double(), target)
            else:
                check.function(interpreter, images, target)

        return test, _draws(check, plain, count)

    return trial


def _source(
    images: Images, default: tuple[int, int, int] | None
) -> tuple[SearchStrategy[Tensor], int]:
    """Return a strategy for the images that are meant, and how many channels they have."""
    if isinstance(images, SearchStrategy):
        return images, 3
    if isinstance(images, Tensor):
        return st.just(expect_images(images)), images.shape[1]
    shape = images or default
    return _plain(shape), 3 if shape is None else shape[0]


def _draws(
    check: _Check, plain: SearchStrategy[Tensor], count: int, **others: SearchStrategy[Any]
) -> list[dict[str, SearchStrategy[Any]]]:
    """Return what to draw images and classes from; once for each kind, that none is left out."""
    kinds = get_args(Kind) if check.degenerate else get_args(Kind)[:1]
    return [
        {**others, "images": _variants(plain, (kind,)), "target": classes(count=count)}
        for kind in kinds
    ]


def _fit(target: Tensor, images: Tensor) -> Tensor:
    """Return as many classes as there are images, on their device."""
    return target.repeat(len(images))[: len(images)].to(images.device)


def _widened(interpreter: Interpreter, images: Tensor) -> Interpreter | None:
    """Return a copy in double precision, or ``None`` where it cannot be copied, or not be run."""
    copied: dict[int, Any] = {}
    try:
        wide = copy.deepcopy(interpreter, copied)
        # All that the copy holds: weights, buffers, and tensors in no module.
        for value in copied.values():
            if isinstance(value, Tensor) and value.is_floating_point():
                value.data = value.data.double()
        wide(images.double(), torch.zeros(len(images), dtype=torch.long))
    except Exception:
        return None
    return wide


def _run(
    name: str,
    test: Callable[..., None],
    draws: list[dict[str, SearchStrategy[Any]]],
    max_examples: int,
    seed: int | None,
) -> None:
    """Run a test on examples, some from each of several draws; raise the first failure, shrunk."""
    test.__name__ = f"check_{name}"  # hypothesis prints it
    memory: dict[str, Any] = {} if seed is None else {"database": None}
    settings = hypothesis.settings(
        max_examples=-(-max_examples // len(draws)),
        deadline=None,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        phases=[Phase.reuse, Phase.generate, Phase.shrink],
        **memory,
    )
    for each in draws:
        run = settings(hypothesis.given(**each)(test))
        (run if seed is None else hypothesis.seed(seed)(run))()
