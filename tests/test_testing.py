# SPDX-License-Identifier: MIT
"""The testing kit finds planted faults, each by its name, and none in sound interpreters."""

from __future__ import annotations

import copy
import importlib
import itertools
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICES, ROOT
from hypothesis import given
from hypothesis import strategies as st
from test_docs import blocks
from torch import Tensor, nn

from captum_adv2 import testing
from captum_adv2.interpreters import CAM, Gradient, IntegratedGradients, Interpreter, Surrogate
from captum_adv2.interpreters.base import Explanation, detached, differentiable_input, min_max
from captum_adv2.interpreters.gradient import log_odds
from captum_adv2.testing import CHECKS, check_interpreter
from captum_adv2.testing.checks import _integrated
from captum_adv2.testing.drawn import KINDS, Network, image_batch


class Healthy(Interpreter):
    """|log-odds gradient * image|, pooled, min-max scaled; in parts that a fault can replace."""

    def see(self, x: Tensor) -> Tensor:
        return x

    def score(self, logits: Tensor, target: Tensor) -> Tensor:
        return log_odds(logits, target)

    def gradient(self, score: Tensor, x: Tensor, create_graph: bool) -> Tensor:
        return torch.autograd.grad(score.sum(), x, create_graph=create_graph)[0]

    def finish(self, maps: Tensor) -> Tensor:
        return min_max(maps)

    def explain(self, images: Tensor, target: Tensor) -> Explanation:
        with differentiable_input(images) as (x, create_graph):
            x = self.see(x)
            logits = self.logits(x)
            gradient = self.gradient(self.score(logits, target), x, create_graph)
            maps = F.avg_pool2d((gradient * x).abs().sum(dim=1, keepdim=True), 2)
            explanation = Explanation(self.finish(maps), logits)
        return explanation if create_graph else detached(explanation)


def faulty(name: str, **parts: Any) -> type[Healthy]:
    """Return an interpreter with a fault in some of its parts."""
    return type(name, (Healthy,), parts)


def doing(part: str, action: Any) -> Any:
    """Return a part of the healthy interpreter that does something else first."""
    healthy = getattr(Healthy, part)
    return lambda self, *args: (action(self, *args), healthy(self, *args))[1]


def hook(model: nn.Module) -> None:
    model.body.register_forward_hook(lambda *_: None)


def nan_on_constant(self: Healthy, maps: Tensor) -> Tensor:
    low = maps.amin(dim=(1, 2, 3), keepdim=True)
    high = maps.amax(dim=(1, 2, 3), keepdim=True)
    return (maps - low) / (high - low)


def hook_after_an_exception(self: Healthy, images: Tensor) -> Tensor:
    handle = self.model.fc.register_forward_hook(lambda *_: None)
    logits = Healthy.logits(self, images)
    handle.remove()
    return logits


def other_logits(self: Healthy, images: Tensor, target: Tensor) -> Explanation:
    return Healthy.explain(self, images, target)._replace(logits=self.logits(images / 2))


class EverySecond(Healthy):
    made = itertools.count()

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.power = 1 + next(self.made) % 2

    def finish(self, maps: Tensor) -> Tensor:
        return min_max(maps) ** self.power


class Inverted(Surrogate):
    def __call__(self, interpreter: Any, images: Tensor, state: Any, progress: float) -> Any:
        explanation = interpreter.explain(images, state)
        return explanation._replace(maps=1 - explanation.maps)


class Coupled(Surrogate):
    """Its state couples the images of a batch."""

    def init(self, interpreter: Any, images: Tensor, target: Tensor) -> Any:
        return target, 1.0

    def advance(self, interpreter: Any, images: Tensor, state: Any, progress: float) -> Any:
        return state[0], images.mean()

    def __call__(self, interpreter: Any, images: Tensor, state: Any, progress: float) -> Any:
        explanation = interpreter.explain(images, state[0])
        return explanation._replace(maps=explanation.maps * state[1])


# A fault, and the check that finds it.
PLANTED = {
    faulty(
        "BatchCoupling",
        finish=lambda self, maps: (maps - maps.amin()) / (maps.amax() - maps.amin() + 1e-12),
    ): "batch",
    faulty("LeakedHook", see=doing("see", lambda self, _: hook(self.model))): "untouched",
    faulty("NaNOnConstant", finish=nan_on_constant): "finite",
    faulty("UnseededNoise", see=lambda self, x: x + 0.01 * torch.randn_like(x)): "deterministic",
    faulty("Detached", finish=lambda self, maps: min_max(maps.detach())): "differentiable",
    faulty("WrongClass", score=lambda self, logits, _: log_odds(logits, logits.argmax(1))): "class",
}
OTHERS = {
    faulty("NextClass", score=lambda self, logits, y: log_odds(logits, (y + 1) % 4)): "relabel",
    faulty("ThreeDimensions", finish=lambda self, maps: min_max(maps)[:, 0]): "shape",
    faulty("SinglePrecision", finish=lambda self, maps: min_max(maps).float()): "shape",
    faulty("InfiniteGradient", finish=lambda self, maps: min_max(maps).sqrt()): "finite",
    faulty("OutOfRange", finish=lambda self, maps: 2 * min_max(maps) - 1): "range",
    faulty("NotScaled", finish=lambda self, maps: maps.sigmoid()): "range",
    faulty(
        "FilledGradients",
        gradient=doing("gradient", lambda self, score, *_: score.sum().backward(retain_graph=True)),
    ): "untouched",
    faulty(  # without a trace in the version counter
        "ChangedWeights", see=doing("see", lambda self, _: self.model.fc.weight.data.mul_(1.001))
    ): "deterministic",
    faulty("HookAfterAnException", logits=hook_after_an_exception): "untouched",
    faulty("TrainMode", finish=doing("finish", lambda self, _: self.model.train())): "untouched",
    faulty("ConstantFactor", gradient=lambda *a: Healthy.gradient(*a).detach()): "gradient",
    faulty(
        "ZeroGradient", finish=lambda self, maps: (min_max(maps) * 20).round() / 20
    ): "differentiable",
    faulty("OtherSurrogate", surrogate=Inverted()): "surrogate",
    faulty("CoupledSurrogate", surrogate=Coupled()): "batch",
    faulty("OtherLogits", explain=other_logits): "logits",
    faulty("HookAtBuilding", __init__=doing("__init__", lambda _, model: hook(model))): "build",
    EverySecond: "build",
    faulty(  # its gradient shifts weight between the logits as a constant is added to them
        "RawLogit", score=lambda self, z, y: log_odds(z, y) + z.square().sum(dim=1)
    ): "shift",
    faulty("Offset", gradient=lambda *a: Healthy.gradient(*a) + 0.1): "scaling",
}
faults = pytest.mark.parametrize(("fault", "check"), PLANTED.items())


def readme() -> dict[str, Any]:
    """Return the definitions of the README's test file."""
    pages = blocks((ROOT / "README.md").read_text(encoding="utf-8"), "python")
    (source,) = (source for _, source in pages if "check_interpreter" in source)
    assert len([line for line in source.splitlines() if line.strip()]) <= 5
    namespace: dict[str, Any] = {}
    exec(source, namespace)
    return namespace


def without(*checks: str) -> set[str]:
    return set(CHECKS) - set(checks)


class TestFaults:
    @faults
    def test_the_readmes_five_lines_find_it(self, fault: type[Interpreter], check: str) -> None:
        page = readme()
        page["CAM"] = fault
        with pytest.raises(AssertionError, match=f"^{check}: expected .*, got ") as caught:
            page["test_cam"]()
        # The example is code, to be pasted.
        assert any("network=Network(" in note for note in caught.value.__notes__)

    @pytest.mark.parametrize(("fault", "check"), OTHERS.items())
    def test_others(self, fault: type[Interpreter], check: str) -> None:
        with pytest.raises(AssertionError, match=f"^{check}: expected .*, got "):
            check_interpreter(fault, max_examples=10)  # so that images of each precision are drawn

    @faults
    def test_on_a_model_of_ones_own(
        self, fault: type[Interpreter], check: str, smooth: nn.Module, data: Any
    ) -> None:
        with pytest.raises(AssertionError, match=f"^{check}: expected .*, got "):
            check_interpreter(fault(smooth), data[0][:2], max_examples=3)

    def test_every_check_has_found_a_fault(self) -> None:
        assert {*PLANTED.values(), *OTHERS.values(), "completeness"} == set(CHECKS)

    def test_completeness(self) -> None:
        def gradients(interpreter: Any, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
            values, promised = _integrated(interpreter, images, target)
            return values / images.clamp(min=0.1), promised

        rest = without("completeness")
        assert check_interpreter(IntegratedGradients, skip=rest).held == ["completeness"]
        with pytest.raises(AssertionError, match="^completeness: expected attributions that add"):
            check_interpreter(IntegratedGradients, skip=rest, attributions=gradients)

    def test_a_trace_of_the_first_call_alone(self, smooth: nn.Module) -> None:
        class Once(Healthy):
            done = False

            def see(self, x: Tensor) -> Tensor:
                if not self.done:
                    self.done, _ = True, hook(self.model)
                return x

        with pytest.raises(AssertionError, match="_forward_hooks"):
            check_interpreter(Once(smooth), max_examples=1)

    def test_an_exception_names_the_check(self) -> None:
        class Picky(Healthy):
            def finish(self, maps: Tensor) -> Tensor:
                if not maps.any():
                    raise ValueError("an empty map")
                return min_max(maps)

        with pytest.raises(ValueError, match="an empty map") as caught:
            check_interpreter(Picky)
        assert "raised in the check 'finite'" in caught.value.__notes__


class TestSound:
    def test_on_drawn_networks(self) -> None:
        report = check_interpreter(Healthy, max_examples=2)
        assert set(report.held) == without("completeness")
        readme()["test_cam"]()

    @pytest.mark.parametrize("device", DEVICES)
    def test_on_a_trained_model(self, model: nn.Module, data: Any, device: str) -> None:
        net = copy.deepcopy(model).to(device)
        for build, images in ((Healthy, data[0][:3]), (CAM, None)):
            with testing.unchanged(net):
                report = check_interpreter(build(net), images, max_examples=1)
            assert {"batch", "gradient", "class", "untouched"} <= set(report.held)
            assert "needs drawn networks" in report.skipped["surrogate"]

    def test_in_train_mode_and_of_two_classes(self) -> None:
        net = Network(norm=True, classes=2).train()
        net.body.eval()
        report = check_interpreter(Gradient(net), max_examples=2)
        assert "two classes" in report.skipped["class"]
        assert net.training
        assert not net.body.training

    def test_without_a_model(self) -> None:
        class Brightness(Interpreter):
            def explain(self, images: Tensor, target: Tensor) -> Explanation:
                return Explanation(min_max(images.mean(dim=1, keepdim=True)), None)

        report = check_interpreter(Brightness(None), max_examples=2)
        assert report.skipped.keys() >= {"class", "logits"}
        assert "gradient" in report.held

    def test_without_double_precision(self, trained: nn.Module) -> None:
        class Narrow(Healthy):
            def see(self, x: Tensor) -> Tensor:
                if x.dtype == torch.float64:
                    raise RuntimeError("no double precision here")
                return x

        report = check_interpreter(Narrow(trained), max_examples=2)
        assert "batch" in report.held
        assert "needs double precision" in report.skipped["gradient"]


class TestCall:
    def test_reasons(self) -> None:
        assert set(check_interpreter(CAM, skip=without("shape")).skipped.values()) == {"as asked"}
        report = check_interpreter(CAM, skip=dict.fromkeys(without("shape"), "I know why"))
        assert str(report).splitlines()[:2] == ["CAM: 1 of 16 checks hold", "  held: shape"]
        assert "  not checked: finite (I know why)" in str(report).splitlines()
        with pytest.raises(ValueError, match=r"expected skip from .*, got \['batches'\]"):
            check_interpreter(CAM, skip=["batches"])

    @pytest.mark.parametrize(
        ("images", "shape"),
        [
            (torch.rand(5, 1, 8, 8), (1, 8, 8)),
            ((1, 7, 9), (1, 7, 9)),
            (st.just(torch.rand(1, 3, 8, 8)), (3, 8, 8)),
        ],
    )
    @pytest.mark.parametrize("own", [False, True])
    def test_images_are_those_given(self, images: Any, shape: tuple[int, ...], own: bool) -> None:
        seen: list[Tensor] = []
        watching = faulty("Watching", see=doing("see", lambda _, x: seen.append(x)))
        subject = watching(Network(channels=shape[0])) if own else watching
        check_interpreter(subject, images, max_examples=1, skip=without("shape", "range"))
        assert {x.shape[1:] for x in seen} == {shape}

    def test_the_same_examples_at_every_run(self) -> None:
        def drawn(seed: int | None) -> list[list[float]]:
            seen: list[Tensor] = []
            watching = faulty("Watching", see=doing("see", lambda _, x: seen.append(x)))
            check_interpreter(watching, seed=seed, skip=without("shape"))
            return [x.flatten().tolist() for x in seen]

        assert drawn(0) == drawn(0) != drawn(1)
        assert drawn(None)


class TestStrategies:
    @given(testing.images(), testing.classes(7, 3))
    def test_values(self, images: Tensor, labels: Tensor) -> None:
        assert images.shape[1] == 3
        assert images.dtype in {torch.float32, torch.float64}
        assert ((images >= 0) & (images <= 1)).all()
        assert labels.shape == (7,)
        assert labels.dtype == torch.long
        assert ((labels >= 0) & (labels < 3)).all()

    @pytest.mark.parametrize("kind", KINDS)
    def test_kinds(self, kind: str) -> None:
        images, made = image_batch((3, 3, 6, 6)), image_batch((3, 3, 6, 6), kind=kind)
        assert torch.equal(made, images) is (kind == "random")
        spread = made.flatten(1).amax(dim=1) - made.flatten(1).amin(dim=1)
        assert (spread == 0).all() == (kind in {"black", "white", "constant"})
        apart = (made - made[:1]).abs().amax()
        assert (apart < 1e-5) == (kind in {"black", "white", "nearly constant", "nearly equal"})

    @given(testing.networks(channels=2, classes=5), st.integers(1, 3))
    def test_networks(self, network: Network, batch: int) -> None:
        assert not network.training
        logits = network(image_batch((batch, 2, 7, 6)))
        assert logits.shape == (batch, 5)
        assert logits.isfinite().all()
        assert logits.std() > 1e-3

    def test_a_network_is_its_seed(self) -> None:
        with testing.unchanged(None):
            one, other = (Network("dense", norm=True, seed=seed) for seed in (1, 2))
        images = image_batch()
        assert torch.equal(one(images), Network("dense", norm=True, seed=1)(images))
        assert not torch.equal(one(images), other(images))


class TestUnchanged:
    @pytest.mark.parametrize(
        ("spoil", "named"),
        [
            (lambda model, x: model.fc.weight.data.mul_(2), "the values of fc.weight"),
            (lambda model, x: model(x).sum().backward(), "the gradient of tensor 0"),
            (lambda model, x: model.body.train(), "body.training"),
            (lambda model, x: model.fc.requires_grad_(False), "the state of fc.weight"),
            (lambda model, x: setattr(model, "note", 1), "the model.note"),
            (lambda model, x: model.register_forward_hook(print), "the model._forward_hooks"),
            (lambda model, x: torch.rand(1), "torch's generator"),
            (lambda model, x: x.requires_grad_(False), "the state of tensor 0"),
            (lambda model, x: x.data.mul_(2), "the values of tensor 0"),
        ],
    )
    def test_names_the_change(self, spoil: Any, named: str) -> None:
        x, model = image_batch().requires_grad_(), Network(activation="GELU")
        with pytest.raises(AssertionError) as caught, testing.unchanged(model, x):
            spoil(model, x)
        assert named in str(caught.value)

    def test_passes_exceptions_on(self) -> None:
        with pytest.raises(KeyError), testing.unchanged(Network()):
            raise KeyError


def test_without_hypothesis(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    monkeypatch.delitem(sys.modules, "captum_adv2.testing")
    with pytest.raises(ImportError, match=r"got none; pip install captum_adv2\[test\]"):
        importlib.import_module("captum_adv2.testing")
