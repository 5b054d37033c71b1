# SPDX-License-Identifier: MIT
"""Arguments are what their types say: by property, for each hint; and at every public call."""

from __future__ import annotations

import dataclasses
import inspect
import math
import pickle
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_type_hints

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import captum_adv2
from captum_adv2 import attacks, defenses, evaluation, interpreters, spec
from captum_adv2.attacks.base import CarefulAttack
from captum_adv2.spec import Array, Bits, Classes, Count, Images, Index, Unit, checked, expect
from captum_adv2.testing.drawn import Network

NUMBERS = [
    spec.Real,
    spec.NonNegative,
    spec.Positive,
    spec.Fraction,
    spec.Change,
    Unit,
    Count,
    Index,
    Bits,
]
numbers = (
    st.integers()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.fractions()
    | st.integers(-2, 9)
    | st.floats(-0.5, 1.5)
)


def accepts(value: Any, hint: Any) -> bool:
    """Return whether a value is not refused, or not by a message of the usual form."""
    try:
        expect(value, hint, "x")
    except (TypeError, ValueError) as error:
        return not re.match(r"expected (each key of )?x(\[.*\])? .*, got ", str(error), re.DOTALL)
    return True


@pytest.mark.filterwarnings("ignore::captum_adv2.SoundnessWarning")
@given(numbers, st.sampled_from(NUMBERS))
def test_numbers(value: Any, hint: Any) -> None:
    (bounds,) = hint.__metadata__
    number = isinstance(value, int) or (isinstance(value, float) and not bounds.integer)
    above = value > bounds.low or (value == bounds.low and not bounds.above)
    below = value < bounds.high or (value == bounds.high and not bounds.below)
    largest = 2**63 - 1 if bounds.integer else sys.float_info.max
    right = number and above and below and abs(value) <= largest
    assert accepts(value, hint) is right
    assert accepts(value, hint | None) is right
    assert accepts([value, value], Sequence[hint]) is right
    assert accepts((value, "a"), tuple[hint, Literal["a", "b"]]) is right
    assert accepts({"a": value}, Mapping[Literal["a", "b"], hint]) is right


@given(
    st.lists(st.integers(0, 3), max_size=5),
    st.sampled_from([torch.float16, torch.float64, torch.uint8, torch.int64, torch.bool]),
    st.sampled_from([0.0, 0.5, 1.0, 1 + 1e-6, -1e-6, 1.01, -0.01, math.nan, math.inf]),
    st.sampled_from([Images, spec.Maps, Classes, spec.Logits]),
)
def test_tensors(shape: list[int], dtype: torch.dtype, value: float, hint: Any) -> None:
    kind: Array = hint.__metadata__[0]
    tensor = torch.zeros(shape, dtype=dtype)
    if tensor.is_floating_point() and tensor.numel():
        tensor.view(-1)[-1] = value
        value = tensor.view(-1)[-1].item()
    right = len(shape) == kind.ndim and 0 not in shape
    right &= dtype.is_floating_point if kind.floating else dtype in {torch.uint8, torch.int64}
    assert accepts(tensor, hint) is (right and (not kind.unit or -1e-5 <= value <= 1 + 1e-5))


@pytest.mark.parametrize(
    ("hint", "good", "bad"),
    [
        (Unit, [0, 1.0], ["1", True, None, torch.tensor(1.0)]),
        (Images, [torch.ones(1, 1, 1, 1)], [[[[[1.0]]]], True, None]),
        (bool, [True], [1, None]),
        (str | None, ["a", None], [1, b"a"]),
        (Literal["a", "b"], ["a"], ["c", 1, ["a"]]),
        (Sequence[str], [["a"], ("a",), []], ["a", ["a", 1], {"a"}]),
        (Sequence[int], [[1], range(2)], [b"a", bytearray(2), memoryview(b"a")]),
        (tuple[str, ...], [("a", "a"), ()], [["a"], ("a", 1)]),
        (tuple[Count, Count], [(1, 2)], [(1,), (1, 0), [1, 2]]),
        (Mapping[str, int], [{"a": 1}, {}], [{"a": "1"}, {1: 1}, [("a", 1)]]),
        (nn.Module, [nn.ReLU()], [nn.ReLU, torch.relu, None]),
        (Callable[[Tensor], Tensor], [torch.relu, nn.ReLU()], [nn.ReLU, "relu", None]),
        (Callable[[int], nn.Module], [nn.Identity, torch.relu], [int, 1]),
        (Tensor | float, [torch.ones(()), 1.0], ["1", None]),
        (Iterator[int], [iter([1])], [[1], 1]),  # of other generics, the class alone
        (Any, [1, None, nn.ReLU], []),
    ],
)
def test_other_types(hint: Any, good: list[Any], bad: list[Any]) -> None:
    assert all(accepts(value, hint) for value in good)
    assert not any(accepts(value, hint) for value in bad)


@checked
def share(x: Unit, *rest: Any, name: str = "a", **more: Any) -> float:
    """Return x."""
    return x


@checked
@dataclasses.dataclass(frozen=True)
class Setting:
    x: Unit | Later = 0.5  # defined further down


Later = nn.ReLU


def test_checked_keeps_the_face_and_checks_each_call() -> None:
    assert str(inspect.signature(share)).startswith("(x: 'Unit', *rest")
    assert pickle.loads(pickle.dumps(share)) is share
    assert str(inspect.signature(Setting)).startswith("(x: 'Unit | Later' = 0.5)")
    assert pickle.loads(pickle.dumps(Setting(0.25))) == Setting(0.25)
    assert dataclasses.replace(Setting(Later()), x=1).x == 1
    for call in (share, Setting, lambda x: dataclasses.replace(Setting(), x=x)):
        with pytest.raises(ValueError, match=r"^expected x in \[0, 1\], got 2.0"):
            call(2.0)


def test_an_argument_that_does_not_exist_is_refused_with_the_function() -> None:
    with pytest.raises(TypeError, match=r"^expected share\(x, rest, name, more\): missing .* 'x'"):
        share()
    with pytest.raises(TypeError, match=r"^expected Setting\(x\): .*unexpected .* 'y'"):
        Setting(0.5, y=3)
    with pytest.raises(TypeError, match=r"^expected Gradient\(model, pool, smoothing\): .*'steps'"):
        interpreters.Gradient(Network(), steps=3)


@pytest.mark.parametrize("hint", [Unit, Literal["a", "b"]])
def test_a_message_shows_any_value_and_is_short(hint: Any) -> None:
    for value in (10**5000, "x" * 10_000, object()):
        with pytest.raises((TypeError, ValueError), match="^expected x ") as caught:
            expect(value, hint, "x")
        assert len(str(caught.value)) < 300


def public() -> Iterator[Any]:
    """Yield the functions and classes of the faces, without records and abstract classes."""
    for face in (captum_adv2, interpreters, attacks, defenses, evaluation):
        for thing in (getattr(face, name) for name in face.__all__):
            own = inspect.getmembers(thing, inspect.isfunction) if inspect.ismodule(thing) else []
            yield from (f for name, f in own if f.__module__ == thing.__name__ and name[0] != "_")
            record = inspect.isclass(thing) and issubclass(thing, tuple | Warning)
            if callable(thing) and not (record or inspect.isabstract(thing)):
                yield thing


@pytest.mark.parametrize("thing", dict.fromkeys(public()))
def test_every_public_call_checks_its_arguments(thing: Any) -> None:
    parameters = inspect.signature(thing).parameters
    if inspect.isclass(thing) and issubclass(thing, CarefulAttack):
        values = {"model": Network(), "attack": captum_adv2.ADV2(Network()), "bits": 3}
        attack = thing(**{name: values[name] for name in values.keys() & parameters.keys()})
        names = [name for name in get_type_hints(thing) if name in vars(attack) and name[0] != "_"]
        assert len(names) > 4
        for name in names:
            with pytest.raises((TypeError, ValueError), match=f"^expected {name} "):
                setattr(attack, name, object())
        return
    given = [p for p in parameters.values() if p.default is p.empty and p.kind != p.VAR_KEYWORD]
    if given:
        with pytest.raises((TypeError, ValueError), match=f"^expected .*{given[0].name}"):
            thing(*(object() for _ in given))
    function = thing.__init__ if inspect.isclass(thing) else thing
    for name, hint in get_type_hints(function, include_extras=True).items():
        if hasattr(function, "__wrapped__") and name != "return" and hint is not Any:
            assert not accepts(object(), hint), f"{name} of {thing} may be anything"
