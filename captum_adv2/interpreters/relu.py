# SPDX-License-Identifier: MIT
r"""ReLUs whose derivative is smooth, so that a map made of gradients can be differentiated.

A network of ReLUs is piecewise linear: almost everywhere, the gradient of its logits does not
change with the image, and an attack on GRAD gets a zero or useless second derivative. The paper
(§3.2) smooths the derivative :math:`r(z) = 1_{z > 0}` of ReLU by

.. math:: h(z) = \begin{cases} 1 + z / \sqrt{z^2 + \tau} & z < 0 \\
                               z / \sqrt{z^2 + \tau} & z \ge 0 \end{cases}

The forward pass remains the exact ReLU, so prediction and map share it. As printed, h jumps from 1
to 0 at z = 0; the attack uses :math:`h'(z) = \tau / (z^2 + \tau)^{3/2} > 0`.

`smooth_relu` is a context in which every ReLU has another derivative: ``nn.ReLU``, in-place and
functional ReLUs, ``ReLU6``, ``hardtanh`` and ``clamp``. The model is not changed. Smooth
activations (GELU, SiLU, softplus) need nothing; ``Hardswish`` keeps its own derivative.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

Derivative: TypeAlias = Callable[[Tensor], Tensor]
"""A function of pre-activations z that returns the derivative of ReLU there, elementwise."""


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


def sigma(z: Tensor) -> Tensor:
    """Return the logistic function, the paper's alternative to h(z) (§3.2).

    >>> sigma(torch.tensor([0.0])).item()
    0.5
    """
    return z.sigmoid()


class _H:
    """`h` at a given tau; a class, so that interpreters can be pickled, copied and printed."""

    def __init__(self, tau: float) -> None:
        self.tau = tau

    def __call__(self, z: Tensor) -> Tensor:
        return h(z, self.tau)

    def __repr__(self) -> str:
        return f"{self.tau:g}"


def as_derivative(smoothing: float | Derivative | None) -> Derivative:
    """Return the derivative for the tau of h(z), a derivative, or ``None`` (ReLU's own)."""
    if smoothing is None:
        return step
    if callable(smoothing):
        return smoothing
    return _H(smoothing)


class _Clamp(torch.autograd.Function):
    """Clamps to [low, high]; its derivative is the given one, itself differentiable."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, low: float, high: float, derivative: Derivative) -> Tensor:
        ctx.save_for_backward(z)
        ctx.low, ctx.high, ctx.derivative = low, high, derivative
        return z.clamp(low, high)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (z,) = ctx.saved_tensors
        slope = ctx.derivative(z - ctx.low)
        if math.isfinite(ctx.high):
            slope = slope - ctx.derivative(z - ctx.high)
        return grads[0] * slope, None, None, None


def _bounds(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Return the bounds of a function that acts as a ReLU, by its name and further arguments.

    Of any other function the lower bound is ``None``, as it is of a clamp from above alone.
    """
    if name in ("relu", "relu6"):
        return 0.0, 6.0 if name == "relu6" else math.inf
    if name == "hardtanh":
        given = dict(zip(("min_val", "max_val"), args, strict=False)) | kwargs
        return given.get("min_val", -1.0), given.get("max_val", 1.0)
    if name in ("clamp", "clip", "clamp_min"):
        given = dict(zip(("min", "max"), args, strict=False)) | kwargs
        high = given.get("max")
        return given.get("min"), math.inf if high is None else high
    return None, None


class smooth_relu(TorchFunctionMode):  # noqa: N801  (a context manager, named like torch.no_grad)
    """Give every ReLU that runs inside the context another derivative; the values stay exact.

    Backward passes may run after the context is left.

    Args:
        derivative: `h`, `sigma`, `step` or any differentiable elementwise function of z.

    >>> z = torch.tensor([-3.0, 3.0], requires_grad=True)
    >>> with smooth_relu(sigma):
    ...     y = torch.relu(z)
    >>> y.tolist(), torch.autograd.grad(y.sum(), z)[0].round(decimals=2).tolist()
    ([0.0, 3.0], [0.05000000074505806, 0.949999988079071])
    """

    def __init__(self, derivative: Derivative = h) -> None:
        super().__init__()
        self.derivative = derivative

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        z = args[0] if args else kwargs.get("input")
        low, high = _bounds(name.removesuffix("_"), args[1:], kwargs)
        tensors = isinstance(low, Tensor) or isinstance(high, Tensor)  # not a ReLU
        if low is None or tensors or not isinstance(z, Tensor) or not z.is_floating_point():
            return func(*args, **kwargs)
        if not (name.endswith("_") or kwargs.get("inplace")):
            return _Clamp.apply(z, low, high, self.derivative)
        # _Clamp saves its input for the backward pass: it gets a copy, and z takes the result.
        return z.copy_(_Clamp.apply(z.clone(), low, high, self.derivative))
