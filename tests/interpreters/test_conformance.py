# SPDX-License-Identifier: MIT
"""Promises of every interpreter, held over the table of interpreters in conftest.

Most are in `captum_adv2.testing`, which runs on every row; the other tests are about trained
networks, surrogates in an attack, and objects.
"""

from __future__ import annotations

import copy
import inspect
import pickle
from functools import partial
from typing import Any

import pytest
import torch
from conftest import DEVICES, INTERPRETERS, Row, TinyNet, TinyViT, mixed
from torch import Tensor, nn

from captum_adv2 import interpreters
from captum_adv2.attacks.loop import take
from captum_adv2.interpreters import Interpreter
from captum_adv2.testing import CHECKS, check_interpreter, unchanged
from captum_adv2.testing.checks import seen
from captum_adv2.testing.drawn import image_batch

# A batch runs other convolution kernels than a single image: equal up to rounding, not bitwise.
CLOSE = {"atol": 1e-5, "rtol": 0.0}
WITH_LOGITS = {"Gradient", "SmoothGrad", "IntegratedGradients", "CAM", "GradCAM", "RTS", "Ensemble"}
WITH_LOGITS |= {"AttentionRollout", "Relevance"}
FORWARD = {"CAM", "RTS", "AttentionRollout"}  # made without an inner gradient

# Some networks have no activation that a rule of guided backpropagation or DeepLift is for.
pytestmark = pytest.mark.filterwarnings("ignore:the rule of .*:captum_adv2.SoundnessWarning")


def shifted(x: Tensor) -> Tensor:
    return (x - 0.45) / 0.25


class Wrapped(nn.Module):
    """A network behind a preprocessing; has the parts that the table names."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.stem, self.body = net, net.stem, net.body

    def forward(self, x: Tensor) -> Tensor:
        return self.net(shifted(x))


class TwoOutputs(TinyNet):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), x


def gradient(maps: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad((maps + maps.square()).sum(), x)[0]


@pytest.fixture
def model(row: Row, trained: nn.Module, request: pytest.FixtureRequest) -> nn.Module:
    return request.getfixturevalue("vit") if row.tokens else trained


@pytest.fixture
def smooth(row: Row, smooth: nn.Module) -> nn.Module:
    return TinyViT(width=6).double().eval() if row.tokens else smooth


def test_checks(row: Row, model: nn.Module) -> None:
    # Networks that are drawn have no attention.
    subject = row.build(model) if row.tokens else row.build
    report = check_interpreter(subject, row.shape, max_examples=1, skip=row.skip)
    assert report.held[:5] == ["shape", "finite", "deterministic", "untouched", "batch"]
    assert ("surrogate" in report.held) is (row.differentiable and not row.tokens)
    assert row.skip.keys() <= CHECKS.keys()


def test_no_interpreter_is_forgotten(trained: nn.Module) -> None:
    face = [getattr(interpreters, name) for name in interpreters.__all__]
    ours = {value for value in face if inspect.isclass(value) and issubclass(value, Interpreter)}
    ours -= {Interpreter, interpreters.Opaque}  # any function: without a gradient to check
    assert {type(row.build(trained)) for row in INTERPRETERS} == ours


class TestMap:
    def test_single_precision_agrees_with_double(
        self, row: Row, model: nn.Module, data: Any
    ) -> None:
        images, labels = data
        maps = row.build(copy.deepcopy(model).double())(images.double(), labels)
        single = row.build(model)(images, labels)
        torch.testing.assert_close(single.double(), maps, atol=1e-3, rtol=0)

    @pytest.mark.parametrize("scale", [0.0, 1e-12, 100.0])
    def test_flat_and_saturated_models(
        self, row: Row, model: nn.Module, data: Any, scale: float
    ) -> None:
        images, labels = data
        extreme = copy.deepcopy(model)
        extreme.fc.weight.data.mul_(scale)
        interpreter, x = row.build(extreme), images.clone().requires_grad_()
        maps = seen(interpreter, x, labels).maps
        assert maps.isfinite().all()
        assert ((maps >= 0) & (maps <= 1 + 1e-6)).all()
        (slope,) = torch.autograd.grad(maps.sum(), x, allow_unused=True, materialize_grads=True)
        assert slope.isfinite().all()
        # RTS's masking model and rollout see features, not logits.
        if scale == 0 and row.name not in {"RTS", "AttentionRollout"}:
            assert not interpreter(x, labels).any()

    def test_memory_layout(self, row: Row, model: nn.Module, data: Any) -> None:
        images, labels = data[0][:1].expand(2, -1, -1, -1), data[1][:1].repeat(2)
        interpreter = row.build(model)
        expected = interpreter(images.contiguous(), labels)
        for other in (images, images.to(memory_format=torch.channels_last)):
            torch.testing.assert_close(interpreter(other, labels), expected, **CLOSE)

    def test_autocast(self, row: Row, model: nn.Module, data: Any) -> None:
        interpreter = row.build(model)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            maps = interpreter(*data)
        assert maps.isfinite().all()
        assert (maps.float() - interpreter(*data)).abs().mean() < 0.1  # bfloat16 has 8 bits

    def test_inference_mode_works_or_is_refused(
        self, row: Row, model: nn.Module, data: Any
    ) -> None:
        interpreter = row.build(model)
        expected = interpreter(*data)
        with torch.inference_mode():
            if row.name in FORWARD:
                torch.testing.assert_close(interpreter(*data), expected)
            else:
                with pytest.raises(RuntimeError, match=r"got torch\.inference_mode\(\); use"):
                    interpreter(*data)
        assert torch.equal(interpreter(*data), expected)

    @pytest.mark.parametrize("device", DEVICES)
    def test_devices(self, row: Row, model: nn.Module, data: Any, device: str) -> None:
        images, labels = data
        interpreter = row.build(copy.deepcopy(model).double().to(device))
        maps = interpreter(images.double().to(device), labels)  # labels may be elsewhere
        assert maps.device.type == device
        expected = row.build(copy.deepcopy(model).double())(images.double(), labels)
        assert (maps.cpu() - expected).abs().mean() < 1e-3
        with pytest.raises(TypeError, match="expected images .*(device|meta)"):
            interpreter(images.double().to("meta" if device == "cpu" else "cpu"), labels)


class TestDerivative:
    def test_gradcheck_of_the_surrogate(self, row: Row, smooth: nn.Module) -> None:
        if not row.differentiable:
            pytest.skip("its map has no derivative, its surrogate a made one: see its own tests")
        interpreter, label = row.build(smooth), torch.tensor([2, 0])
        x = image_batch((2, 3, 6, 6), seed=7, dtype=torch.float64).requires_grad_()

        def parts(x: Tensor) -> tuple[Tensor, ...]:
            return tuple(part for part in seen(interpreter, x, label) if part is not None)

        torch.testing.assert_close(parts(x)[0], interpreter(x, label), rtol=0, atol=1e-12)
        # Undefined gradients would reach the hooks of the model.
        assert torch.autograd.gradcheck(parts, (x,), check_undefined_grad=False, fast_mode=True)

    def test_the_surrogate_on_relus(self, row: Row, model: nn.Module, data: Any) -> None:
        images, labels = data
        leaf = images.clone().requires_grad_()
        interpreter = row.build(model)
        maps = seen(interpreter, leaf * 1, labels).maps
        slope = gradient(maps, leaf)
        assert slope.isfinite().all()
        # At a layer the inner gradient is constant on the ReLUs above it: it is not smoothed.
        assert row.name == "InternalInfluence" or (slope.abs().amax(dim=(1, 2, 3)) > 0).all()
        if row.differentiable:
            state = interpreter.surrogate.init(interpreter, images, labels)
            late = interpreter.surrogate(interpreter, images, state, 0.9).maps
            assert (late - interpreter(images, labels)).abs().mean() < 0.05

    def test_finished_images_leave_the_state(self, row: Row, smooth: nn.Module, data: Any) -> None:
        images, labels = data[0].double(), data[1]
        interpreter, stay = row.build(smooth), torch.tensor([4, 1, 2])
        surrogate = interpreter.surrogate
        state = surrogate.init(interpreter, images, labels)
        state = surrogate.advance(interpreter, images, state, 0.0)
        states = []
        for some, index in ((state, torch.arange(6)), (take(state, stay), stay)):
            x = images[index].requires_grad_()
            some = surrogate.advance(interpreter, x.detach(), some, 0.5)
            parts = surrogate(interpreter, x, some, 0.5)
            states.append([part for part in parts if part is not None] + [gradient(parts.maps, x)])
        for whole, part in zip(*states, strict=True):
            torch.testing.assert_close(part, whole[stay], rtol=1e-6, atol=1e-8)

    def test_logits_carry_the_models_gradient(self, row: Row, model: nn.Module, data: Any) -> None:
        images, labels = data
        x, other = (images.clone().requires_grad_() for _ in range(2))
        loss = model(other).sum()
        interpreter = row.build(model)
        explain = interpreter.explain if row.differentiable else partial(seen, interpreter)
        logits = explain(x, labels).logits
        assert torch.autograd.grad(loss, other)[0].isfinite().all()  # a graph of before survives
        assert logits is not None or row.name not in WITH_LOGITS | {"MASK"}
        if logits is not None:
            ours, theirs = (torch.autograd.grad(z[:, 1].sum(), x)[0] for z in (logits, model(x)))
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)

    def test_no_graph_unless_asked_for(self, row: Row, model: nn.Module, data: Any) -> None:
        images, labels = data
        interpreter, x = row.build(model), images.clone().requires_grad_()
        with_graph = interpreter(x, labels)
        assert with_graph.requires_grad is row.differentiable
        # The graph of a plain forward pass is the parameters'.
        assert row.name in FORWARD or not interpreter(images, labels).requires_grad
        with torch.no_grad():
            for given in (images, x):
                maps, logits, _ = interpreter.explain(given, labels)
                assert torch.equal(maps, with_graph)
                assert not maps.requires_grad
                assert logits is None or not logits.requires_grad


class TestModel:
    def test_runs_in_eval_mode(self, row: Row, model: nn.Module, data: Any) -> None:
        clone = mixed(model)
        expected, interpreter = row.build(model)(*data), row.build(clone)
        with unchanged(clone, data[0]):
            assert torch.equal(interpreter(*data), expected)

    def test_frozen_and_watched(self, row: Row, model: nn.Module, data: Any) -> None:
        clone, calls = copy.deepcopy(model).requires_grad_(False), []
        clone.body.register_forward_hook(lambda *_: calls.append(1))
        clone.fc.register_forward_pre_hook(lambda *_: calls.append(2))
        interpreter, x = row.build(clone), data[0].clone().requires_grad_()
        with unchanged(clone, x):
            assert torch.equal(interpreter(x, data[1]), row.build(model)(*data))
            assert gradient(seen(interpreter, x, data[1]).maps, x).isfinite().all()
        assert set(calls) == {1, 2}

    @pytest.mark.parametrize("by", [-4, 4])
    def test_classes_that_the_model_has_not(
        self, row: Row, model: nn.Module, data: Any, by: int
    ) -> None:
        interpreter = row.build(model)
        for _ in range(2):
            with (
                unchanged(model, *data),
                pytest.raises(ValueError, match=r"expected target in \[0, 3\], .*, got values in"),
            ):
                interpreter(data[0], data[1] + by)

    @pytest.mark.parametrize(
        ("net", "message"),
        [
            (TwoOutputs(), "return logits of shape .*, got tuple; wrap it"),
            (TinyNet(classes=1), "with at least two classes"),
        ],
    )
    def test_outputs_that_are_not_logits(
        self, row: Row, data: Any, net: nn.Module, message: str
    ) -> None:
        interpreter = row.build(net.eval())
        with unchanged(net), pytest.raises((TypeError, ValueError), match=message):
            interpreter(data[0], data[1] * 0)


class TestObject:
    def test_pickle_deepcopy_and_repr(self, row: Row, model: nn.Module, data: Any) -> None:
        images, labels = data
        interpreter = row.build(model)
        expected = interpreter(images, labels)
        clones = [copy.deepcopy(interpreter)]
        if row.name != "Lime":  # Captum's holds a function that cannot be pickled
            clones.append(pickle.loads(pickle.dumps(interpreter)))
        for clone in clones:
            assert clone.model is not model
            assert torch.equal(clone(images, labels), expected)
            x = images.clone().requires_grad_()
            ours, theirs = (seen(each, x, labels).maps for each in (clone, interpreter))
            assert torch.equal(ours, theirs)
            clone.model.body[0].weight.data.neg_()  # the copy has a model, and layers, of its own
            assert not torch.equal(clone(images, labels), expected)
        assert torch.equal(interpreter(images, labels), expected)
        assert "\n" not in repr(interpreter)
        assert len(repr(interpreter)) < 80

    def test_after_equals_a_model_with_the_preprocessing(
        self, row: Row, model: nn.Module, data: Any
    ) -> None:
        images, labels = data
        interpreter = row.build(model)
        plain, after = interpreter(images, labels), interpreter.after(shifted)
        wrapped, x = row.build(Wrapped(model).eval()), images.clone().requires_grad_()
        torch.testing.assert_close(after(images, labels), wrapped(images, labels), **CLOSE)
        ours, theirs = (seen(each, x, labels) for each in (after, wrapped))
        torch.testing.assert_close(ours.maps, theirs.maps, **CLOSE)
        if ours.logits is not None:
            torch.testing.assert_close(ours.logits, model(shifted(images)))
        slopes = (gradient(each.maps, x) for each in (ours, theirs))
        torch.testing.assert_close(*slopes, atol=1e-4, rtol=1e-3)
        assert torch.equal(interpreter(images, labels), plain)  # not preprocessed itself
        assert not torch.allclose(after(images, labels), plain, atol=1e-3)
        assert after.model is model
