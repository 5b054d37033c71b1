# SPDX-License-Identifier: MIT
"""Bad values at every public call: none passes as another error than the promised ones.

Each argument of each public callable gets each of a table of bad values, the others being right. A
call may accept a value, and then has to work; or it refuses it, with "expected" in the message.
"""

from __future__ import annotations

import inspect
import math
import traceback
import types
import warnings
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any, get_type_hints

import captum.attr as ca
import numpy as np
import pytest
import torch
from conftest import TinyNet
from test_spec import public
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import captum_adv2
from captum_adv2 import ADV2, StADV2, defenses, evaluate, interpreters, spec
from captum_adv2.attacks import adaptive, frameworks, terms
from captum_adv2.attacks.base import CarefulAttack
from captum_adv2.attacks.loop import Progress
from captum_adv2.optim import Adam


class Unprintable:
    """A value that no message can show."""

    def __repr__(self) -> str:
        raise RuntimeError("unprintable")


class Loud(str):
    """A string that is none of the options."""


def _nested(depth: int) -> Any:
    return [_nested(depth - 1)] if depth else 0.5


SCALARS = [
    *(None, True, False, 0, 1, 2, -1, -2, 3, 7, 10, 255, 2**31, 2**63, -(2**63), 2**64, 10**400),
    *(10**5000, 0.0, -0.0, 0.5, 1.0, 1.5, -0.5, 1e-320, 1e308, math.nan, math.inf, -math.inf, 1j),
    *(Decimal("0.5"), Decimal("NaN"), Fraction(1, 3), Fraction(-7, 2), Fraction(10**400)),
    *(np.float16(0.5), np.float32("nan"), np.float64("inf"), np.int8(-1), np.uint64(2**63)),
    *(np.bool_(True), np.str_("a"), np.datetime64("2020-01-01"), 1e400 - 1e400),
]
OTHERS = [
    *("", "a", "1", "nan", "x" * 100_000, "\0", "\ud800", b"", b"a", Loud("best"), Path("/"), ...),
    *([], [1], [0.5, "a"], [None], [math.nan, 1.0], [True], _nested(50), [[1, 2], [3]]),
    *((), (1,), (1, 2), (0.1, 0.2), (0, 0), (-1, 1), (math.nan, 0.5), (1, 2, 3), ("a", "b")),
    *({}, {1: 2}, {"a": 1}, {"a": None}, {None: None}, {(1, 2): [3]}, set(), {1}, frozenset("a")),
    *(range(3), range(0), iter([1]), (n for n in [0.5]), memoryview(b"a"), bytearray(2)),
    *(np.zeros(3), np.zeros((2, 3, 8, 8)), np.array(["a"]), np.array(None), np.zeros((0, 3))),
    *(object(), object, int, nn.ReLU, Unprintable(), type, NotImplemented, ValueError("a")),
    *(len, print, lambda: None, lambda *_: 1 / 0, math, types.SimpleNamespace(model=None)),
    *(nn.ReLU(), nn.Sequential(), nn.Linear(2, 2), nn.Identity(), nn.Module(), TinyNet),
    *(torch.float32, torch.device("cpu"), torch.Size([1]), torch.Generator(), torch.strided),
    *(interpreters.CAM, ca.Saliency, ca.Saliency(nn.ReLU()), captum_adv2, ADV2, RuntimeError),
]
X = torch.full((2, 3, 8, 8), 0.5)


def _tensors() -> Iterator[Tensor]:
    shapes = ((), (0,), (1,), (2,), (3,), (2, 0), (2, 4), (1, 1, 1), (2, 3, 8, 8), (1, 3, 8, 8))
    for shape in (*shapes, (2, 1, 8, 8), (2, 1, 4, 4), (0, 3, 8, 8), (2, 0, 8, 8), (1,) * 6):
        for dtype in (torch.float32, torch.int64):
            yield torch.zeros(shape, dtype=dtype)
            yield torch.zeros(shape, dtype=dtype, device="meta")
    for value in (math.nan, math.inf, -math.inf, -1e-3, 1.001, 255.0, 1e38):
        yield torch.full((2, 3, 8, 8), value)
        yield torch.full((2, 1, 8, 8), value)
        yield torch.full((2, 4), value)
        yield X.index_fill(3, torch.tensor([7]), value)
    for number in (-1, 4, 2**31, 2**62):
        yield torch.tensor([0, number])
    for kind in (torch.uint8, torch.int8, torch.uint16, torch.uint64, torch.bool, torch.int32):
        yield torch.zeros(2, 3, 8, 8).to(kind)
        yield torch.ones(2).to(kind)
    floating = (torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn)
    for kind in (*floating, torch.complex64):
        yield X.to(kind)
        yield torch.ones(2, 4).to(kind)
        yield torch.ones(2).to(kind)
    yield X.clone().requires_grad_()
    yield X.to_sparse()
    yield torch.tensor([0, 1]).to_sparse()
    yield torch.zeros(2, 4).to_sparse()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield torch.quantize_per_tensor(X, 0.1, 0, torch.quint8)
        yield torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
        yield torch.nested.nested_tensor([torch.ones(3, 8, 8), torch.ones(3, 4, 4)])
        yield torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


VALUES = [*SCALARS, *OTHERS, *_tensors()]


# What is called, with arguments that are right


def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return TinyNet(nn.SiLU, width=2).eval()


NET = net()
Y, MAPS = torch.tensor([0, 1]), torch.rand(2, 1, 4, 4)
CAM = interpreters.CAM(NET)
MASKING = interpreters.MaskingModel(NET, layers=["body", "stem"], image_shape=(3, 8, 8))
ENSEMBLE = interpreters.Ensemble([CAM, interpreters.GradCAM(NET)])
SQUEEZERS = (defenses.BitDepth(3),)
DETECTOR = defenses.FeatureSqueezing(NET, SQUEEZERS).fit(torch.rand(4, 3, 8, 8))
REPORT = evaluate(NET, CAM, X, X, Y)
LOADER = DataLoader(TensorDataset(X, Y), batch_size=2)
RECORDS = [Progress(0, torch.rand(2), torch.rand(2), torch.arange(2))]
MATRIX = captum_adv2.evaluation.transfer.matrix(NET, {"CAM": CAM}, X, {"none": X}, Y)
RIGHT: dict[str, Any] = {
    "model": NET,
    "encoder": NET,
    "image_shape": (3, 8, 8),
    "interpreter": CAM,
    "images": X,
    "adversarial": X,
    "target": Y,
    "labels": Y,
    "maps": MAPS,
    "reference": MAPS,
    "logits": torch.zeros(2, 4),
    "values": torch.rand(3),
    "size": (8, 8),
    "found": torch.tensor([[0, 0, 2, 2]]),
    "truth": torch.tensor([[0, 0, 2, 2]]),
    "masking_model": MASKING,
    "attribution": ca.Saliency(NET),
    "interpreters": [CAM, interpreters.GradCAM(NET)],
    "ensemble": ENSEMBLE,
    "squeezers": SQUEEZERS,
    "bits": 3,
    "pool": X,
    "models": {"net": NET},
    "build": interpreters.CAM,
    "records": RECORDS,
    "rows": {"none": {"CAM": (X, MAPS)}},
    "loader": LOADER,
    "first": 1.0,
    "last": 2.0,
    "lengths": (1.0,),
    "eps": 0.1,
    "weight": 1.0,
    "probabilities": torch.full((2, 4), 0.25),
    "benign": X,
    "measure": "l1",
    "scores": NET,
    "budget": 10,
    "successes": 1,
    "count": 2,
    "inputs": {"none": {"CAM": (X, MAPS)}},
    "function": lambda images, target: images[:, :1, ::2, ::2],
}


def _right(thing: Any, name: str) -> Any:
    """Return a right value of a required argument."""
    special = {
        "BitDepthADV2.attack": ADV2(NET, CAM, steps=1),
        "matrix.adversarial": {"none": X},
        "across.adversarial": {"none": X},
        "matrix.interpreters": {"CAM": CAM},
        "Stages.values": (1.0,),
        "boxes.maps": MAPS,
        "errors.truth": torch.tensor([[0, 0, 2, 2]] * 2),
    }
    return special.get(f"{thing.__qualname__}.{name}", RIGHT.get(name))


def _called(call: Callable[..., Any], **right: Any) -> tuple[Callable[..., Any], dict[str, Any]]:
    return call, right


CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "Interpreter.__call__": _called(CAM, images=X, target=Y),
    "Gradient.__call__": _called(interpreters.Gradient(NET), images=X, target=Y),
    "Ensemble.disagreement": _called(ENSEMBLE.disagreement, images=X, target=Y),
    "Detector.score": _called(DETECTOR.score, images=X),
    "Detector.detect": _called(DETECTOR.detect, images=X),
    "Detector.detect_each": _called(DETECTOR.detect_each, images=X),
    "Detector.roc": _called(DETECTOR.roc, benign=X, adversarial=X),
    "Matrix.each": _called(MATRIX.each, measure="l1"),
    "Matrix.mean": _called(MATRIX.mean, measure="l1"),
}
for _attack in (ADV2(NET, CAM, steps=1), StADV2(NET, CAM, steps=1)):
    CALLS[type(_attack).__name__ + ".__call__"] = _called(
        lambda images, labels, target_maps=MAPS, attack=_attack: attack(
            images, labels, target_maps=target_maps
        ),
        images=X,
        labels=Y,
        target_maps=MAPS,
    )
MORE = (adaptive.Matching, frameworks.LinfBall, frameworks.Flow, terms.Linear, terms.Stages, Adam)
TRAINING = {"train_masking_model", "distill"}  # which take minutes where a value is accepted
SIZES = {
    "draws",
    "size",
    "image_shape",
    "classes",
    "width",
    "batch",
    "steps",
}  # of what is computed


def table() -> Iterator[Any]:
    """Yield callable, right arguments, and the argument that is spoiled."""
    for thing in (*dict.fromkeys(public()), *MORE):
        parameters = [
            p for p in inspect.signature(thing).parameters.values() if p.kind != p.VAR_KEYWORD
        ]
        right = {p.name: _right(thing, p.name) for p in parameters if p.default is p.empty}
        if thing is interpreters.MaskingModel:
            right |= {"layers": ["body", "stem"], "image_shape": (3, 8, 8)}
        if thing is captum_adv2.evaluation.robustness:
            right |= {"steps": 1}  # it takes as long as it has steps
        for p in parameters:
            yield pytest.param(thing, right, p.name, id=f"{thing.__qualname__}-{p.name}")
    for name, (call, right) in CALLS.items():
        for argument in right:
            yield pytest.param(call, right, argument, id=f"{name}-{argument}")


def legal(call: Any, name: str, value: Any) -> bool:
    """Return whether a value is what the argument's annotation says."""
    own = inspect.isclass(call) and not issubclass(call, CarefulAttack)
    function = call.__init__ if own else call
    hint = get_type_hints(function, include_extras=True).get(name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            spec.expect(value, hint, name)
    except (TypeError, ValueError):
        return False
    return hint is not None


def left_out(call: Any, name: str, value: Any) -> bool:
    """Return whether a value is right, and takes too long or has errors of its own."""
    most = 10 if (getattr(call, "__name__", ""), name) == ("robustness", "steps") else 300
    huge = name in SIZES and isinstance(value, int | float) and value > most
    builds = name in {"interpreter", "build", "attack"} and callable(value)
    trains = getattr(call, "__name__", "") in TRAINING
    return (huge or builds or trains) and legal(call, name, value)


def of_the_model(error: Exception, value: Any) -> bool:
    """Return whether a network raised an error, which then is its own."""
    names = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    return isinstance(value, nn.Module) or inspect.getfile(TinyNet) in names


@pytest.mark.parametrize(("call", "right", "name"), list(table()))
def test_bad_values(
    call: Any, right: dict[str, Any], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    wrong = []
    for number, value in enumerate(VALUES):
        if left_out(call, name, value):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                call(**{**right, name: value})
        except (ValueError, TypeError, OSError) as error:
            if "expected" not in str(error):
                wrong.append((number, error))
        except RuntimeError as error:
            if not of_the_model(error, value):
                wrong.append((number, error))
    assert not wrong
    assert not any(tmp_path.iterdir())


def test_the_right_values_are_right() -> None:
    for parameter in table():
        call, right, _ = parameter.values
        if getattr(call, "__name__", "") not in TRAINING:
            call(**right)
