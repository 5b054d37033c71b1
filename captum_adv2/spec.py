# SPDX-License-Identifier: MIT
"""What arguments may be, said once, in their types; `checked` holds each public call to them.

>>> @checked
... def halve(share: Unit, times: Count = 1) -> float:
...     return share / 2**times
>>> halve(2.0)
Traceback (most recent call last):
ValueError: expected share in [0, 1], got 2.0
"""

from __future__ import annotations

import functools
import inspect
import math
import numbers
import sys
import typing
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Literal, TypeAlias, TypeVar, Union

import torch
from torch import Tensor, nn

T = TypeVar("T")

_WORDS = {
    Tensor: "a torch.Tensor",
    bool: "True or False",
    nn.Module: "a torch.nn.Module",
    torch.Generator: "a torch.Generator",
    Mapping: "a dictionary",
    Sequence: "a list or a tuple",
}
_HINTS = {
    "Generator": "; torch.Generator().manual_seed(0) makes one",
    "Interpreter": "; wrap a Captum method in CaptumInterpreter",
    "Module": "; pass the network itself, not a function or another library's wrapper of it",
}
_ROUNDING = 1e-5  # (x - mean) / std and back may miss [0, 1] by this much
_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_LONGEST = 120  # characters of a value in a message


class SoundnessWarning(UserWarning):
    """The call is legal, but its result may not mean what it seems to mean."""


def doubt(message: str) -> None:
    """Warn of a result, in the name of the function that called the caller."""
    warnings.warn(message, SoundnessWarning, stacklevel=3)


@dataclass(frozen=True)
class Range:
    """Finite numbers from ``low`` to ``high``, themselves excluded where ``above`` or ``below``.

    Integers have at most 64 bits. A number above ``usual`` is legal, and a `SoundnessWarning`.
    """

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False
    integer: bool = False
    usual: float = math.inf

    def __str__(self) -> str:
        if math.isfinite(self.high):
            left, right = "(" if self.above else "[", ")" if self.below else "]"
            return f"in {left}{self.low:g}, {self.high:g}{right}"
        if math.isfinite(self.low):
            return f"{'above' if self.above else 'at least'} {self.low:g}"
        return "to be finite"

    def check(self, value: Any, name: str) -> None:
        """Raise unless a value is a number of the range."""
        integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        # PyTorch does not take fractions.
        real = isinstance(value, numbers.Real) and not isinstance(value, numbers.Rational)
        if not (integer or (real and not self.integer)):
            wanted = "an integer" if self.integer else "a number"
            raise TypeError(f"expected {name} to be {wanted}, got {type(value).__name__}")
        number = int(value) if integer else float(value)  # NumPy's compare in their own precision
        largest = 2**63 - 1 if self.integer else sys.float_info.max
        low = self.low < number if self.above else self.low <= number
        high = number < self.high if self.below else number <= self.high
        if not (low and high and abs(number) <= largest):
            raise ValueError(f"expected {name} {self}, got {shown(value, str)}")
        if number > self.usual:
            doubt(
                f"{name} is {value}, more than the whole range [0, {self.usual:g}] of images; "
                "n of 255 levels are n / 255"
            )


@dataclass(frozen=True)
class Array:
    """Dense tensors of ``ndim`` dimensions, none empty; in [0, 1] where ``unit``.

    Where ``logits``, probabilities are legal, and a `SoundnessWarning`.
    """

    ndim: int
    floating: bool = True
    unit: bool = False
    logits: bool = False
    hint: str = ""

    def check(self, value: Any, name: str) -> None:
        """Raise unless a value is such a tensor."""
        _expect_instance(value, Tensor, name)
        expect_dense(value, name, values=self.unit or not self.floating)
        integer = not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
        if not (value.dtype in _FLOATING if self.floating else integer):
            kind = "a floating" if self.floating else "an integer"
            raise TypeError(f"expected {name} of {kind} dtype, got {value.dtype}{self.hint}")
        if value.ndim != self.ndim or not value.numel():
            wanted = f"{self.ndim} dimensions and at least one entry"
            raise ValueError(f"expected {name} with {wanted}, got shape {tuple(value.shape)}")
        if self.unit:
            low, high = torch.stack(value.detach().aminmax()).tolist()
            if not (low >= -_ROUNDING and high <= 1 + _ROUNDING):  # so that NaN fails, too
                found = f"values in [{low:.4g}, {high:.4g}]" if low <= high else "NaN"
                raise ValueError(f"expected {name} in [0, 1], got {found}{self.hint}")
        if self.logits and not value.is_meta:
            warn_of_probabilities(value)


Real: TypeAlias = Annotated[float, Range()]
NonNegative: TypeAlias = Annotated[float, Range(0)]
Positive: TypeAlias = Annotated[float, Range(0, above=True)]
Unit: TypeAlias = Annotated[float, Range(0, 1)]
Fraction: TypeAlias = Annotated[float, Range(0, 1, below=True)]
Change: TypeAlias = Annotated[float, Range(0, usual=1)]  # of a pixel of images in [0, 1]
Count: TypeAlias = Annotated[int, Range(1, integer=True)]
Index: TypeAlias = Annotated[int, Range(0, 2**63 - 1, integer=True)]
Bits: TypeAlias = Annotated[int, Range(1, 8, integer=True)]
Images: TypeAlias = Annotated[
    Tensor, Array(4, unit=True, hint="; scale images to [0, 1], and normalise inside the model")
]
Maps: TypeAlias = Annotated[
    Tensor, Array(4, unit=True, hint="; 1 means important: scale maps to [0, 1]")
]
Classes: TypeAlias = Annotated[Tensor, Array(1, floating=False, hint="; use .long()")]
Logits: TypeAlias = Annotated[Tensor, Array(2, logits=True)]


def checked(thing: T) -> T:
    """Hold the arguments of a function, or of a class's constructor, to their annotations."""
    function: Any = thing.__init__ if inspect.isclass(thing) else thing
    signature = inspect.signature(function)
    # Called late: annotations may name what is defined further down.
    hints = functools.cache(functools.partial(typing.get_type_hints, function, include_extras=True))

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            arguments = signature.bind(*args, **kwargs).arguments
        except TypeError as error:
            made = function.__name__ == "__init__" and bool(args)
            whose = type(args[0]).__name__ if made else function.__qualname__
            taken = ", ".join([*signature.parameters][made:])
            raise TypeError(f"expected {whose}({taken}): {error}") from None
        for name, value in arguments.items():
            if name in hints():
                expect(value, hints()[name], name)
        return function(*args, **kwargs)

    if inspect.isclass(thing):
        thing.__init__ = call  # type: ignore[method-assign]
        return thing
    return call  # type: ignore[return-value]


def expect(value: Any, hint: Any, name: str) -> None:
    """Raise unless a value is what an annotation says: of its type, and in its range."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        args[1].check(value, name)
    elif origin in (Union, UnionType):
        _expect_one_of(value, args, name)
    elif origin is Literal:
        if not (isinstance(value, str) and value in args):
            error = ValueError if isinstance(value, str) else TypeError
            raise error(f"expected {name} to be one of {list(args)}, got {shown(value)}")
    elif origin in (tuple, Sequence):
        _expect_sequence(value, origin, args, name)
    elif origin is Mapping:
        _expect_instance(value, Mapping, name)
        for key, each in value.items():
            expect(key, args[0], f"each key of {name}")
            expect(each, args[1], f"{name}[{shown(key)}]")
    elif origin is Callable or getattr(hint, "_is_protocol", False):
        _expect_function(value, args[-1] if args else None, name)
    elif inspect.isclass(origin or hint) and hint is not Any:  # a class, too, since Python 3.11
        _expect_instance(value, origin or hint, name)


def _expect_one_of(value: Any, options: tuple[Any, ...], name: str) -> None:
    """Raise the most telling of the errors, unless one of the options fits."""
    errors: list[Exception] = []
    for option in options:
        try:
            return expect(value, option, name)
        except (TypeError, ValueError) as error:
            errors.append(error)
    raise next((error for error in errors if isinstance(error, ValueError)), errors[0])


def _expect_sequence(value: Any, kind: Any, args: tuple[Any, ...], name: str) -> None:
    _expect_instance(value, kind, name)
    fixed = kind is tuple and ... not in args
    if fixed and len(value) != len(args):
        raise ValueError(f"expected {name} to have {len(args)} entries, got {len(value)}")
    for number, each in enumerate(value):
        expect(each, args[number] if fixed else args[0], f"{name}[{number}]")


def _expect_function(value: Any, returned: Any, name: str) -> None:
    """Raise unless a value can be called; a class can only where it makes what is returned."""
    if inspect.isclass(value) and not (inspect.isclass(returned) and issubclass(value, returned)):
        got = f"the class {value.__name__}; pass {value.__name__}()"
        raise TypeError(f"expected {name} to be a function, got {got}")
    if not callable(value):
        raise TypeError(f"expected {name} to be a function, got {type(value).__name__}")


def _expect_instance(value: Any, kind: type, name: str) -> None:
    # To Python, True is a number, and a string or bytes a sequence; none of them is meant here.
    other = isinstance(value, bool | str | bytes | bytearray | memoryview)
    if isinstance(value, kind) and (kind in (bool, str) or not other):
        return
    article = "an" if kind.__name__[0] in "AEIOU" else "a"
    wanted = _WORDS.get(kind, f"{article} {kind.__name__}")
    got, hint = type(value).__name__, _HINTS.get(kind.__name__, "")
    if inspect.isclass(value):
        got = f"the class {value.__name__}"
        hint = f"; pass {value.__name__}(...)" if issubclass(value, kind) else hint
    raise TypeError(f"expected {name} to be {wanted}, got {got}{hint}")


def shown(value: Any, how: Callable[[Any], str] = repr) -> str:
    """Return a value as a message shows it: short, and without an error of its own."""
    try:
        text = how(value)
    except Exception:  # a number of too many digits, a representation that fails
        return f"a {type(value).__name__}"
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def expect_dense(value: Tensor, name: str, values: bool = True) -> None:
    """Raise unless a tensor is dense and, where its ``values`` are looked at, has any."""
    if value.is_nested or value.is_quantized or value.layout != torch.strided:
        raise TypeError(f"expected {name} to be a dense tensor, got one of another layout")
    if value.is_meta and values:
        raise TypeError(f"expected {name} to have values, got a tensor on the meta device")


def expect_shape(value: Tensor, shape: tuple[int, ...], name: str) -> None:
    """Raise unless a tensor has a shape."""
    if value.shape != shape:
        raise ValueError(f"expected {name} of shape {tuple(shape)}, got {tuple(value.shape)}")


def expect_logits(output: Any, batch: int) -> Tensor:
    """Return a model's output if it is logits ``(batch, classes)`` of two classes or more."""
    wanted = f"expected the model to return logits of shape ({batch}, classes)"
    if not isinstance(output, Tensor):
        got = type(output).__name__
        raise TypeError(f"{wanted}, got {got}; wrap it in a module that returns the logits")
    if output.dtype not in _FLOATING:
        raise TypeError(f"{wanted}, floating, got {output.dtype}")
    if output.ndim != 2 or len(output) != batch or output.shape[1] < 2:
        one = output.shape in ((batch,), (batch, 1))
        hint = "; one logit z is two, torch.stack([0 * z, z], dim=1) of z (batch,)" if one else ""
        got = f"{tuple(output.shape)}{hint}"
        raise ValueError(f"{wanted} with at least two classes, got {got}")
    return output


def warn_of_probabilities(logits: Tensor) -> None:
    """Warn if logits ``(B, classes)`` look like probabilities: the confidence would be wrong."""
    tolerance = max(1e-4, torch.finfo(logits.dtype).eps)
    total = logits.detach().double().sum(dim=1)
    if bool((logits >= 0).all() & ((total - 1).abs() <= tolerance).all()):
        doubt(
            "expected logits, got rows in [0, 1] that sum to 1: probabilities, whose softmax is "
            "never sure; leave the last softmax out, or take the logarithm"
        )


def warn_of_logits(logits: Tensor) -> None:
    """Warn if logits ``(B, classes)`` are not numbers, or look like probabilities."""
    broken = int((~(logits < torch.inf)).any(dim=1).sum())  # -infinity rules a class out
    if broken:
        doubt(
            f"the model's logits are NaN or infinite for {broken} of {len(logits)} images, which "
            "have no class: a map of them or an attack on them means nothing"
        )
    warn_of_probabilities(logits)


def expect_classes(labels: Tensor, logits: Tensor, name: str) -> None:
    """Raise unless labels ``(B,)`` are one class an image, of those of logits ``(B, classes)``."""
    batch, classes = logits.shape
    expect_shape(labels, (batch,), name)
    low, high = torch.stack(labels.long().aminmax()).tolist()
    if low < 0 or high >= classes:
        raise ValueError(f"expected {name} in [0, {classes - 1}], got values in [{low}, {high}]")
