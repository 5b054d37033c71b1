# SPDX-License-Identifier: MIT
r"""ReLUs whose derivative is smooth, so that a map made of gradients can be differentiated.

A network of ReLUs is piecewise linear: almost everywhere, the gradient of its logits does not
change with the image, and an attack on GRAD gets a zero or useless second derivative. The paper
(§3.2) smooths the derivative :math:`r(z) = 1_{z > 0}` of ReLU by

.. math:: h(z) = \begin{cases} 1 + z / \sqrt{z^2 + \tau} & z < 0 \\
                               z / \sqrt{z^2 + \tau} & z \ge 0 \end{cases}

or by the logistic function :math:`\sigma(z)`. The forward pass remains the exact ReLU, so
prediction and map share it. As printed, h jumps from 1 to 0 at z = 0; the attack uses
:math:`h'(z) = \tau / (z^2 + \tau)^{3/2} > 0`. The width of either is an absolute number, while
pre-activations are near 1 in one network and in the tens in another: so the default,
``smoothing="auto"``, is :math:`\sigma(z / w)` with w a share of each layer's own size.

`smooth_relu` is a context in which every ReLU has another derivative, however it is written:
modules, in-place and functional ReLUs, ``ReLU6``, ``hardtanh``, ``clamp``, ``maximum``, leaky and
parametric ReLUs, ``hardsigmoid``. The model is not changed. Smooth activations (GELU, SiLU,
softplus) need nothing; ``Hardswish`` keeps its own derivative.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import disable_saved_tensors_hooks

from captum_adv2.interpreters.tap import Mode, eagerly
from captum_adv2.spec import Positive, checked

Derivative: TypeAlias = Callable[[Tensor], Tensor]
"""A function of pre-activations z that returns the derivative of ReLU there, elementwise."""

_HOOKED = (
    "expected a model without activation checkpointing, got one that saves tensors by hooks; it "
    "would run its ReLUs again, with their own derivative, when this context is left; turn it off"
)


def step(z: Tensor) -> Tensor:
    """Return r(z), the derivative of ReLU itself: 1 where z > 0, else 0 (§3.2).

    >>> step(torch.tensor([-1.0, 0.0, 2.0])).tolist()
    [0.0, 0.0, 1.0]
    """
    return (z > 0).to(z.dtype)


def h(z: Tensor, tau: float = 1e-4) -> Tensor:
    """Return the smooth derivative of §3.2, which tends to r(z), for z != 0, as ``tau`` tends to 0.

    >>> z = torch.tensor([-3.0, 0.0, 3.0], dtype=torch.float64)
    >>> h(z, tau=16.0).round(decimals=6).tolist()
    [0.4, 0.0, 0.6]
    """
    return z * (z * z + tau).rsqrt() + (z < 0).to(z.dtype)


def sigma(z: Tensor, width: float | Tensor = 1.0) -> Tensor:
    """Return the logistic function of z / width; of width 1, the paper's alternative to h (§3.2).

    >>> sigma(torch.tensor([0.0])).item()
    0.5
    """
    return (z / width).sigmoid()


class Slope(ABC):
    """Chooses the derivative of ReLU in a layer."""

    @abstractmethod
    def __call__(self, z: Tensor, progress: float) -> Derivative:
        """Return the derivative, for pre-activations ``(B, ...)`` and the attack's progress."""


Smoothing: TypeAlias = Literal["auto"] | Positive | Slope | Derivative | None
"""``"auto"``, the tau of h(z), another derivative of ReLU, or ``None`` for ReLU's own."""


class Everywhere(Slope):
    """The same derivative in each layer."""

    def __init__(self, derivative: Derivative) -> None:
        self.derivative = derivative

    def __call__(self, z: Tensor, progress: float) -> Derivative:
        """See `Slope`."""
        return self._elementwise

    def _elementwise(self, z: Tensor) -> Tensor:
        slope = self.derivative(z)
        got = getattr(slope, "shape", type(slope).__name__)
        if got != z.shape:
            raise ValueError(
                f"expected smoothing to return the derivative of ReLU at each z, of shape "
                f"{tuple(z.shape)}, got {got if isinstance(got, str) else tuple(got)}; write it "
                "elementwise, as torch.sigmoid"
            )
        return slope


@checked
@dataclass(frozen=True)
class Auto(Slope):
    """The logistic function, as wide as the layer's pre-activations are large in each image.

    Its width, as a share of a layer's root mean square, falls with the progress of the attack from
    ``wide`` to ``narrow`` along a cosine, towards the derivative of ReLU itself. Images are along
    the first dimension of a layer's pre-activations.

    >>> z = torch.tensor([[-2.0, 2.0]])
    >>> [Auto()(scale * z, progress=0.0)(scale * z).round(decimals=2) for scale in (1.0, 8.0)]
    [tensor([[0.0300, 0.9700]]), tensor([[0.0300, 0.9700]])]
    """

    wide: Positive = 0.3
    narrow: Positive = 0.005

    @torch.no_grad()
    def __call__(self, z: Tensor, progress: float) -> Derivative:
        """See `Slope`."""
        fall = (1 + math.cos(math.pi * progress)) / 2
        share = self.narrow + (self.wide - self.narrow) * fall
        rows = z.reshape(len(z), -1) if z.ndim else z.view(1, 1)
        # In single precision at least: the squares of half precision overflow.
        dtype = torch.promote_types(z.dtype, torch.float32)
        size = torch.linalg.vector_norm(rows, dim=1, dtype=dtype) / math.sqrt(rows.shape[1])
        size = size.masked_fill(size < torch.finfo(dtype).tiny ** 0.5, 1)  # of an empty layer
        width = (share * size).to(z.dtype)
        return partial(sigma, width=width.view(-1, *[1] * (z.ndim - 1)) if z.ndim else width[0])


def as_slope(smoothing: Smoothing) -> Slope:
    """Return the `Slope` of a smoothing."""
    if isinstance(smoothing, Slope):
        return smoothing
    if smoothing == "auto":
        return Auto()
    if smoothing is None:
        return Everywhere(step)
    return Everywhere(smoothing if callable(smoothing) else partial(h, tau=smoothing))


class Bend(NamedTuple):
    """Where a piecewise linear activation bends, and its slopes: a leak, and the gain between."""

    low: float | Tensor
    high: float | Tensor = math.inf
    leak: float | Tensor = 0.0
    gain: float | Tensor = 1.0

    def slope(self, derivative: Derivative, z: Tensor) -> Tensor:
        """Return the activation's derivative at z, where ReLU has the given one."""
        slope = derivative(z if _is(self.low, 0.0) else z - self.low)
        if not _is(self.high, math.inf):
            slope = slope - derivative(z - self.high)
        if not _is(self.gain, 1.0):
            slope = self.gain * slope
        return slope if _is(self.leak, 0.0) else self.leak + slope


def _is(value: float | Tensor, number: float) -> bool:
    return not isinstance(value, Tensor) and value == number


def _bend(name: str, z: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Bend | None:
    """Return where a function of z and further arguments bends; ``None`` for no ReLU."""

    def given(*names: str, **defaults: Any) -> list[Any]:
        values = defaults | dict(zip(names, args, strict=False)) | kwargs
        return [values.get(key) for key in names]

    if name in ("relu", "relu6"):
        return Bend(0.0, 6.0 if name == "relu6" else math.inf)
    if name == "hardsigmoid":
        return Bend(-3.0, 3.0, gain=1 / 6)
    if name == "hardtanh":
        return Bend(*given("min_val", "max_val", min_val=-1.0, max_val=1.0))
    if name in ("leaky_relu", "rrelu", "prelu"):
        return _leaky(name, z, given)
    if name == "threshold":
        low, value = given("threshold", "value")
        return Bend(low) if low == value else None
    if name in ("clamp", "clip", "clamp_min", "maximum"):
        low, high = given("other" if name == "maximum" else "min", "max")
        if low is not None and _fixed(low, z) and _fixed(high, z):
            return Bend(low, math.inf if high is None else high)
    return None


def _fixed(bound: Any, z: Tensor) -> bool:
    """Return whether a bound does not depend on the image, and leaves z its shape."""
    if not isinstance(bound, Tensor):
        return True
    short = bound.ndim <= z.ndim
    same = (b in (1, n) for b, n in zip(bound.shape[::-1], z.shape[::-1], strict=False))
    return not bound.requires_grad and short and all(same)


def _leaky(name: str, z: Tensor, given: Callable[..., list[Any]]) -> Bend | None:
    """Return the bend of a ReLU with a slope below 0; in train mode, `rrelu` draws that slope."""
    if name == "prelu":
        (leak,) = given("weight")
        leak = leak.detach()
        # One for each channel of (B, C, ...), or one for all.
        leak = leak.view(-1, *[1] * (z.ndim - 2)) if leak.numel() > 1 else leak
    elif name == "rrelu":
        low, high, training = given("lower", "upper", "training", lower=1 / 8, upper=1 / 3)
        if training:
            return None
        leak = (low + high) / 2
    else:
        (leak,) = given("negative_slope", negative_slope=0.01)
    return Bend(0.0, leak=leak, gain=1 - leak)


class ReLUMode(Mode):
    """A context that computes each ReLU in a way of its own, where gradients are taken."""

    def __init__(self, slope: Slope, progress: float) -> None:
        super().__init__()
        self.slope, self.progress = slope, progress
        self.found = 0  # ReLUs

    @abstractmethod
    def activate(
        self, bend: Bend, z: Tensor, exact: Callable[[Tensor], Tensor], in_place: bool
    ) -> Tensor:
        """Return an activation; ``exact`` computes its value, in place if it is written so."""

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """See `Mode`."""
        name = getattr(func, "__name__", "")
        if name in ("max", "maximum") and len(args) == 2 and isinstance(args[1], Tensor):
            # Of a constant and z, in either order; of one tensor, `max` is another function.
            name, func = "maximum", torch.maximum
            args = args if args[0].requires_grad else args[::-1]
        z = args[0] if args else kwargs.get("input")
        if not (isinstance(z, Tensor) and z.requires_grad):
            return func(*args, **kwargs)
        bend = _bend(name.strip("_"), z, args[1:], kwargs)
        if bend is None or not torch.is_grad_enabled():
            return self.other(func, name, args, kwargs)
        self.found += 1
        return self.activate(bend, *as_activation(func, name, args, kwargs))

    def other(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """Run a function that is no ReLU."""
        return func(*args, **kwargs)


def as_activation(
    func: Any, name: str, args: Any, kwargs: Any
) -> tuple[Tensor, Callable[[Tensor], Tensor], bool]:
    """Return an activation's input, a function of it alone, and whether that works in place."""
    further = {key: value for key, value in kwargs.items() if key != "input"}
    in_place = bool(name.endswith("_") or kwargs.get("inplace"))
    z = args[0] if args else kwargs["input"]
    return z, lambda z: func(z, *args[1:], **further), in_place


class _Smooth(torch.autograd.Function):
    """An activation with its exact value and the given derivative, itself differentiable."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, exact: Callable[[Tensor], Tensor], bend: Bend, derivative: Derivative
    ) -> Tensor:
        ctx.save_for_backward(z)
        ctx.bend, ctx.derivative = bend, derivative
        return exact(z.clone())  # it may work in place

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (z,) = ctx.saved_tensors
        return grads[0] * ctx.bend.slope(ctx.derivative, z), None, None, None


class _Smoothing(ReLUMode):
    """Gives each ReLU the derivative that a `Slope` chooses."""

    def activate(
        self, bend: Bend, z: Tensor, exact: Callable[[Tensor], Tensor], in_place: bool
    ) -> Tensor:
        """See `ReLUMode`."""
        # _Smooth saves its input for the backward pass: of an operation in place, it gets a copy.
        saved = z.clone() if in_place else z
        result: Tensor = _Smooth.apply(saved, exact, bend, self.slope(z, self.progress))
        return z.copy_(result) if in_place else result


@contextmanager
def smooth_relu(derivative: Smoothing = h, progress: float = 0.0) -> Iterator[ReLUMode]:
    """Give every ReLU that runs inside the context another derivative; the values stay exact.

    Backward passes may run after the context is left. Activation checkpointing, which would run the
    model again without it, is refused.

    Args:
        derivative: `h`, `sigma`, `step` or any differentiable elementwise function of z; a `Slope`,
            which chooses one for each layer; or another `Smoothing`.
        progress: What a `Slope` is told of the attack's progress.

    >>> z = torch.tensor([-3.0, 3.0], requires_grad=True)
    >>> with smooth_relu(sigma):
    ...     y = torch.relu(z)
    >>> y.tolist(), torch.autograd.grad(y.sum(), z)[0].round(decimals=2).tolist()
    ([0.0, 3.0], [0.05000000074505806, 0.949999988079071])
    """
    mode = _Smoothing(as_slope(derivative), progress)
    try:
        with disable_saved_tensors_hooks(_HOOKED), eagerly(), mode:
            yield mode
    except Exception as error:
        if _HOOKED in str(error):
            raise ValueError(_HOOKED) from error
        raise
