# SPDX-License-Identifier: MIT
"""The testing kit: it finds planted faults, each by its name, and none in what is sound."""

from __future__ import annotations

import importlib
import inspect
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import INTERPRETERS, ROOT, Row, TinyNet
from hypothesis import given
from hypothesis import strategies as st
from test_docs import blocks
from torch import Tensor, nn

from captum_adv2 import interpreters, testing
from captum_adv2.interpreters import (
    CAM,
    Direct,
    GradCAM,
    Gradient,
    IntegratedGradients,
    Interpreter,
    Surrogate,
    min_max,
)
from captum_adv2.interpreters.base import detached, differentiable_input
from captum_adv2.interpreters.gradient import log_odds
from captum_adv2.testing import Network, check_interpreter
from captum_adv2.types import Explanation


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
            logits = self.logits(x, target)
            gradient = self.gradient(self.score(logits, target), x, create_graph)
            maps = F.avg_pool2d((gradient * x).abs().sum(dim=1, keepdim=True), 2)
            explanation = Explanation(self.finish(maps), logits)
        return explanation if create_graph else detached(explanation)


class BatchCoupling(Healthy):
    def finish(self, maps: Tensor) -> Tensor:
        return (maps - maps.amin()) / (maps.amax() - maps.amin()).clamp(min=1e-12)


class LeakedHook(Healthy):
    def see(self, x: Tensor) -> Tensor:
        self.model.body.register_forward_hook(lambda *_: None)
        return x


class NaNOnConstant(Healthy):
    def finish(self, maps: Tensor) -> Tensor:
        low, high = (bound.view(-1, 1, 1, 1) for bound in maps.flatten(1).aminmax(dim=1))
        return (maps - low) / (high - low)


class UnseededNoise(Healthy):
    def see(self, x: Tensor) -> Tensor:
        return x + 0.01 * torch.randn_like(x)


class Detached(Healthy):
    def finish(self, maps: Tensor) -> Tensor:
        return min_max(maps.detach())


class WrongClass(Healthy):
    def score(self, logits: Tensor, target: Tensor) -> Tensor:
        return log_odds(logits, logits.argmax(dim=1))


class NextClass(Healthy):
    def score(self, logits: Tensor, target: Tensor) -> Tensor:
        return log_odds(logits, (target + 1) % logits.shape[1])


class ThreeDimensions(Healthy):
    def finish(self, maps: Tensor) -> Tensor:
        return min_max(maps)[:, 0]


class SinglePrecision(Healthy):
    def finish(self, maps: Tensor) -> Tensor:
        return min_max(maps).float()


class InfiniteGradient(Healthy):
    def finish(self, maps: Tensor) -> Tensor:
        return min_max(maps).sqrt()


class OutOfRange(Healthy):
    def finish(self, maps: Tensor) -> Tensor:
        return 2 * min_max(maps) - 1


class NotScaled(Healthy):
    def finish(self, maps: Tensor) -> Tensor:
        return maps.sigmoid()


class FilledGradients(Healthy):
    def gradient(self, score: Tensor, x: Tensor, create_graph: bool) -> Tensor:
        score.sum().backward(retain_graph=True)
        return super().gradient(score, x, create_graph)


class ChangedWeights(Healthy):
    def see(self, x: Tensor) -> Tensor:
        self.model.fc.weight.data.mul_(1.001)  # no version counter tells
        return x


class HookAfterAnException(Healthy):
    def logits(self, images: Tensor, target: Tensor | None = None) -> Tensor:
        handle = self.model.fc.register_forward_hook(lambda *_: None)
        logits = super().logits(images, target)
        handle.remove()
        return logits


class TrainMode(Healthy):
    def see(self, x: Tensor) -> Tensor:
        self.model.train(False)
        return x

    def finish(self, maps: Tensor) -> Tensor:
        self.model.train(True)
        return min_max(maps)


class ConstantFactor(Healthy):
    def gradient(self, score: Tensor, x: Tensor, create_graph: bool) -> Tensor:
        return super().gradient(score, x, create_graph).detach()


class ZeroGradient(Healthy):
    def finish(self, maps: Tensor) -> Tensor:
        return (min_max(maps) * 20).round() / 20


class OtherSurrogate(Healthy):
    def surrogate(self, images: Tensor, target: Tensor) -> Surrogate:
        def inverted(images: Tensor, target: Tensor) -> Explanation:
            maps, logits, _ = self.explain(images, target)
            return Explanation(1 - maps, logits)

        return Direct(inverted, target)


class OtherLogits(Healthy):
    def explain(self, images: Tensor, target: Tensor) -> Explanation:
        return super().explain(images, target)._replace(logits=self.logits(images / 2, target))


class HookAtBuilding(Healthy):
    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        model.body.register_forward_hook(lambda *_: None)


class RawLogit(Healthy):
    def score(self, logits: Tensor, target: Tensor) -> Tensor:
        # Its gradient shifts weight between the logits as a constant is added to them.
        return log_odds(logits, target) + logits.square().sum(dim=1)


class Offset(Healthy):
    def gradient(self, score: Tensor, x: Tensor, create_graph: bool) -> Tensor:
        return super().gradient(score, x, create_graph) + 0.1


PLANTED = {
    BatchCoupling: "batch",
    LeakedHook: "untouched",
    NaNOnConstant: "finite",
    UnseededNoise: "deterministic",
    Detached: "differentiable",
    WrongClass: "class",
}
OTHERS = {
    NextClass: "relabel",
    ThreeDimensions: "shape",
    SinglePrecision: "shape",
    InfiniteGradient: "finite",
    OutOfRange: "range",
    NotScaled: "range",
    FilledGradients: "untouched",
    ChangedWeights: "deterministic",
    HookAfterAnException: "untouched",
    TrainMode: "untouched",
    ConstantFactor: "gradient",
    ZeroGradient: "differentiable",
    OtherSurrogate: "surrogate",
    OtherLogits: "logits",
    HookAtBuilding: "build",
    RawLogit: "shift",
    Offset: "scaling",
}


def readme() -> dict[str, Any]:
    """Return what the README's test file defines."""
    pages = blocks((ROOT / "README.md").read_text(encoding="utf-8"), "python")
    (source,) = (source for _, source in pages if "check_interpreter" in source)
    assert len([line for line in source.splitlines() if line.strip()]) <= 5
    namespace: dict[str, Any] = {}
    exec(source, namespace)
    return namespace


class TestFaults:
    @pytest.mark.parametrize(("fault", "check"), PLANTED.items())
    def test_the_readmes_five_lines_find_it(self, fault: type[Interpreter], check: str) -> None:
        page = readme()
        page["CAM"] = fault
        with pytest.raises(AssertionError, match=f"^{check}: expected .*, got ") as caught:
            page["test_cam"]()
        # The example is code; it may be pasted.
        assert any("Network('" in note for note in caught.value.__notes__)

    @pytest.mark.parametrize(("fault", "check"), OTHERS.items())
    def test_others(self, fault: type[Interpreter], check: str) -> None:
        with pytest.raises(AssertionError, match=f"^{check}: expected .*, got "):
            check_interpreter(fault, max_examples=5)

    @pytest.mark.parametrize(("fault", "check"), PLANTED.items())
    def test_on_a_model_of_ones_own(
        self, fault: type[Interpreter], check: str, smooth: nn.Module, data: Any
    ) -> None:
        with pytest.raises(AssertionError, match=f"^{check}: expected .*, got "):
            check_interpreter(fault(smooth), data[0][:2], max_examples=3)

    def test_every_check_has_found_a_fault(self) -> None:
        # gradcheck comes after the check that sees the same fault; completeness is below.
        found = {*PLANTED.values(), *OTHERS.values(), "gradcheck", "completeness"}
        assert found == set(testing.CHECKS)

    def test_gradcheck_alone_finds_a_wrong_gradient(self) -> None:
        rest = set(testing.CHECKS) - {"gradcheck"}
        with pytest.raises(AssertionError, match="^gradcheck: expected gradcheck of the map"):
            check_interpreter(ConstantFactor, skip=rest)

    def test_completeness(self) -> None:
        def gradients(interpreter: Any, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
            values, promised = testing._integrated(interpreter, images, target)
            return values / images.clamp(min=0.1), promised

        rest = set(testing.CHECKS) - {"completeness"}
        assert check_interpreter(IntegratedGradients, skip=rest).held == ["completeness"]
        with pytest.raises(AssertionError, match="^completeness: expected attributions that add"):
            check_interpreter(IntegratedGradients, skip=rest, attributions=gradients)

    def test_the_first_call_alone_is_seen_too(self, smooth: nn.Module) -> None:
        class Once(Healthy):
            done = False

            def see(self, x: Tensor) -> Tensor:
                if not self.done:
                    self.done, _ = True, self.model.body.register_forward_hook(lambda *_: None)
                return x

        with pytest.raises(AssertionError, match="_forward_hooks"):
            check_interpreter(Once(smooth), max_examples=1)

    def test_an_exception_says_where(self) -> None:
        class Picky(Healthy):
            def finish(self, maps: Tensor) -> Tensor:
                if not maps.any():
                    raise ValueError("an empty map")
                return min_max(maps)

        with pytest.raises(ValueError, match="an empty map") as caught:
            check_interpreter(Picky)
        assert "raised in the check 'finite'" in caught.value.__notes__


# Why a check does not apply.
NOISE = {"scaling": "the noise's std is in units of the image's range"}
BASELINE = {"scaling": "the baseline is a grey value, which does not scale with the image"}
SKIP = {
    "SmoothGrad": NOISE,
    "NoiseTunnel": NOISE,
    "GradientShap": BASELINE,
    "DeepLift": BASELINE,
    "FeatureAblation": BASELINE,
    "RTS": {"relabel": "the classes' order is in the masking model too"},
}
# The blur of a very small image is the image: MASK then sees no class.
IMAGES = {"MASK": (3, 16, 16)}


class TestSound:
    def test_ours(self, row: Row) -> None:
        report = check_interpreter(
            row.build, IMAGES.get(row.name), max_examples=2, skip=SKIP.get(row.name, {})
        )
        assert report.held[:5] == ["shape", "finite", "deterministic", "untouched", "batch"]
        assert ("gradcheck" in report.held) is row.differentiable

    def test_none_of_ours_is_forgotten(self, model: nn.Module) -> None:
        ours = [
            value
            for value in map(vars(interpreters).get, interpreters.__all__)
            if inspect.isclass(value) and issubclass(value, Interpreter)
        ]
        checked = {type(row.build(model)) for row in INTERPRETERS}
        assert checked == {value for value in ours if not inspect.isabstract(value)}

    def test_what_is_skipped_has_a_reason(self) -> None:
        assert SKIP.keys() | IMAGES.keys() <= {row.name for row in INTERPRETERS}
        for reasons in SKIP.values():
            assert reasons.keys() <= set(testing.CHECKS)
            assert all(len(reason.split()) > 3 for reason in reasons.values())

    def test_the_readmes_page(self) -> None:
        readme()["test_cam"]()

    def test_healthy(self) -> None:
        report = check_interpreter(Healthy, max_examples=2)
        assert set(testing.CHECKS) - {"completeness"} == set(report.held)
        assert report.skipped.keys() == {"completeness"}

    @pytest.mark.parametrize("build", [Healthy, CAM, GradCAM, Gradient])
    def test_a_trained_model_of_ones_own(self, build: Any, model: nn.Module, data: Any) -> None:
        for images in (data[0][:3], None):
            with testing.unchanged(model):
                report = check_interpreter(build(model), images, max_examples=1)
            assert {"batch", "gradient", "class", "untouched"} <= set(report.held)
            assert "needs drawn networks" in report.skipped["gradcheck"]

    def test_a_model_in_train_mode(self, trained: nn.Module) -> None:
        model = TinyNet().train()
        model.norm.eval()
        check_interpreter(Gradient(model), max_examples=2)
        assert model.dropout.training
        assert not model.norm.training

    def test_two_classes(self) -> None:
        report = check_interpreter(Gradient(Network(classes=2)), max_examples=2)
        assert "two classes" in report.skipped["class"]

    def test_what_cannot_be_widened_is_checked_as_it_is(self, trained: nn.Module) -> None:
        class Narrow(Healthy):
            def see(self, x: Tensor) -> Tensor:
                if x.dtype == torch.float64:
                    raise RuntimeError("no double precision here")
                return x

        report = check_interpreter(Narrow(trained), max_examples=2)
        assert "batch" in report.held
        assert "needs double precision" in report.skipped["gradient"]


class TestReport:
    def test_reasons(self) -> None:
        rest = set(testing.CHECKS) - {"shape"}
        assert set(check_interpreter(CAM, skip=rest).skipped.values()) == {"as asked"}
        report = check_interpreter(CAM, skip=dict.fromkeys(rest, "I know why"))
        assert str(report).splitlines()[:3] == [
            "CAM: 1 of 17 checks hold",
            "  held: shape",
            "  not checked: finite (I know why)",
        ]

    def test_arguments(self) -> None:
        with pytest.raises(ValueError, match=r"expected skip from .*, got \['batches'\]"):
            check_interpreter(CAM, skip=["batches"])
        with pytest.raises(TypeError, match="got str"):
            check_interpreter("CAM")
        with pytest.raises(ValueError, match="expected max_examples at least 1"):
            check_interpreter(CAM, max_examples=0)
        with pytest.raises(ValueError, match=r"expected images in \[0, 1\]"):
            check_interpreter(CAM, torch.full((1, 3, 8, 8), 2.0))

    @pytest.mark.parametrize(
        "images", [torch.rand(5, 1, 8, 8), (1, 7, 9), st.just(torch.rand(1, 3, 8, 8))]
    )
    def test_images_are_those_given(self, images: Any) -> None:
        seen = set()

        class Watching(Healthy):
            def see(self, x: Tensor) -> Tensor:
                seen.add(tuple(x.shape[1:]))
                return x

        check_interpreter(Watching, images, max_examples=1, skip=set(testing.CHECKS) - {"shape"})
        assert len(seen) == 1
        assert seen <= {(1, 8, 8), (1, 7, 9), (3, 8, 8)}

    def test_the_same_examples_at_every_run(self) -> None:
        def drawn(seed: int | None) -> list[Tensor]:
            seen = []

            class Watching(Healthy):
                def see(self, x: Tensor) -> Tensor:
                    seen.append(x.detach())
                    return x

            check_interpreter(Watching, seed=seed, skip=set(testing.CHECKS) - {"shape"})
            return seen

        first, again, other = drawn(0), drawn(0), drawn(1)
        assert all(map(torch.equal, first, again))
        assert not (len(first) == len(other) and all(map(testing._same, first, other)))
        assert drawn(None)


class TestStrategies:
    @given(testing.images(), testing.target_maps((4, 5)), testing.classes(7, 3))
    def test_values(self, images: Tensor, maps: Tensor, labels: Tensor) -> None:
        assert images.shape[1] == 3
        assert images.dtype in {torch.float32, torch.float64}
        assert maps.shape[1:] == (1, 4, 5)
        for values in (images, maps):
            assert ((values >= 0) & (values <= 1)).all()
        assert labels.shape == (7,)
        assert labels.dtype == torch.long
        assert ((labels >= 0) & (labels < 3)).all()

    @pytest.mark.parametrize("kind", testing.get_args(testing.Kind))
    def test_kinds(self, kind: Any) -> None:
        images = testing.image_batch((3, 3, 6, 6))
        made = testing.variant(images, kind)
        assert made.shape == images.shape
        assert torch.equal(made, images) is (kind == "random")
        spread = made.flatten(1).amax(dim=1) - made.flatten(1).amin(dim=1)
        assert (spread == 0).all() == (kind in {"black", "white", "constant"})
        apart = (made - made[:1]).abs().amax()
        assert (apart < 1e-5) == (kind in {"black", "white", "nearly constant", "nearly equal"})

    @given(testing.networks(channels=2, classes=5), st.integers(1, 3))
    def test_networks(self, network: Network, batch: int) -> None:
        assert not network.training
        images = testing.image_batch((batch, 2, 7, 6))
        logits = network(images)
        assert logits.shape == (batch, 5)
        assert logits.isfinite().all()
        assert logits.std() > 1e-3
        # Its printed form makes it again; to make it draws nothing.
        state = torch.get_rng_state()
        twin = eval(repr(network).replace(")", ", channels=2, classes=5)"))
        assert torch.equal(twin(images), logits)
        assert torch.equal(torch.get_rng_state(), state)


class TestUnchanged:
    @pytest.mark.parametrize(
        ("spoil", "named"),
        [
            (lambda model, x: model.fc.weight.data.mul_(2), "the values of fc.weight"),
            (lambda model, x: model(x).sum().backward(), "the gradient of tensor 0"),
            (lambda model, x: model.body.train(), "body.training"),
            (lambda model, x: model.fc.requires_grad_(False), "the state of fc.weight"),
            (lambda model, x: setattr(model, "note", 1), "the model.note"),
            (lambda model, x: torch.rand(1), "torch's generator"),
            (lambda model, x: x.requires_grad_(False), "the state of tensor 0"),
        ],
    )
    def test_names_what_changed(self, spoil: Any, named: str) -> None:
        x = testing.image_batch().requires_grad_()
        model = Network(activation="GELU")
        with pytest.raises(AssertionError) as caught, testing.unchanged(model, x):
            spoil(model, x)
        assert named in str(caught.value)

    def test_lets_exceptions_through(self) -> None:
        with pytest.raises(KeyError), testing.unchanged(Network()):
            raise KeyError


def test_without_hypothesis(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    monkeypatch.delitem(sys.modules, "captum_adv2.testing")
    with pytest.raises(ImportError, match=r"got none; pip install captum_adv2\[test\]"):
        importlib.import_module("captum_adv2.testing")
