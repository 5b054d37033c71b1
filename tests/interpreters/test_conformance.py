# SPDX-License-Identifier: MIT
"""What every interpreter owes its users, run over the table of interpreters in conftest."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Row, TinyNet, blobs, mixed
from torch import Tensor, nn

from captum_adv2.interpreters import Interpreter, Surrogate
from captum_adv2.testing import unchanged as nothing_left_behind
from captum_adv2.types import Explanation

# A batch runs other convolution kernels than a single image: equal up to rounding, not bitwise.
CLOSE = {"atol": 1e-5, "rtol": 0.0}
SEED = 7


def images64(count: int = 1, size: int = 6, seed: int = SEED) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, size, size, generator=generator, dtype=torch.float64)


class Shifted(nn.Module):
    """What users normalise with."""

    def forward(self, x: Tensor) -> Tensor:
        return (x - 0.45) / 0.25


class Wrapped(nn.Module):
    """A network behind a preprocessing; has the parts that the table names."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.shift, self.net = Shifted(), net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.shift(x))

    @property
    def stem(self) -> nn.Module:
        return self.net.stem

    @property
    def body(self) -> nn.Module:
        return self.net.body


class TwoOutputs(TinyNet):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), x


def graphed(row: Row, interpreter: Interpreter, images: Tensor, target: Tensor) -> Tensor:
    """Return maps with a graph: those reported, or the surrogate's where these have none."""
    if row.differentiable:
        return interpreter(images, target)
    return interpreter.surrogate(images, target)(images).maps


@pytest.fixture
def smooth_row(row: Row) -> Row:
    """A row whose maps are differentiable functions of images."""
    if not row.differentiable:
        pytest.skip("its map has no derivative, its surrogate a made one: see its own tests")
    return row


class TestMap:
    def test_shape_range_and_type(self, row: Row, model: nn.Module, data: Any) -> None:
        images, labels = data
        interpreter = row.build(model)
        maps = interpreter(images, labels)
        assert maps.ndim == 4
        assert maps.shape[:2] == (len(images), 1)
        assert maps.shape[2] == maps.shape[3]
        assert maps.dtype == images.dtype
        assert maps.device == images.device
        assert maps.isfinite().all()
        assert not maps.requires_grad or row.differentiable
        if not interpreter.scaled:
            assert ((maps >= 0) & (maps <= 1)).all()
            return
        # Scaled per image: every map of this data reaches both ends.
        assert torch.equal(maps.amin(dim=(1, 2, 3)), torch.zeros(len(images)))
        torch.testing.assert_close(maps.amax(dim=(1, 2, 3)), torch.ones(len(images)))

    def test_double(self, row: Row, model: nn.Module, data: Any) -> None:
        images, labels = data
        wide = copy.deepcopy(model).double()
        maps = row.build(wide)(images.double(), labels)
        assert maps.dtype == torch.float64
        single = row.build(model)(images, labels)
        torch.testing.assert_close(single.double(), maps, atol=1e-3, rtol=0)

    def test_depends_on_the_class(self, row: Row, model: nn.Module, data: Any) -> None:
        images, labels = data
        interpreter = row.build(model)
        difference = interpreter(images, labels) - interpreter(images, (labels + 1) % 4)
        assert (difference.abs().amax(dim=(1, 2, 3)) > 1e-3).any()

    @pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
    def test_classes_of_any_integer_type(
        self, row: Row, model: nn.Module, data: Any, dtype: torch.dtype
    ) -> None:
        images, labels = data
        interpreter = row.build(model)
        assert torch.equal(interpreter(images, labels.to(dtype)), interpreter(images, labels))

    def test_deterministic_and_independent_of_calls_between(
        self, row: Row, model: nn.Module, data: Any
    ) -> None:
        images, labels = data
        interpreter = row.build(model)
        torch.manual_seed(1)
        first = interpreter(images, labels)
        interpreter(images.flip(0)[:2], labels[:2])
        torch.manual_seed(2)
        assert torch.equal(interpreter(images, labels), first)
        assert torch.equal(row.build(model)(images, labels), first)

    def test_batch_equals_singles(self, row: Row, model: nn.Module, data: Any) -> None:
        images, labels = data
        interpreter = row.build(model)
        singles = [interpreter(images[i : i + 1], labels[i : i + 1]) for i in range(len(images))]
        torch.testing.assert_close(interpreter(images, labels), torch.cat(singles), **CLOSE)

    def test_batch_equals_singles_in_double(self, row: Row, smooth: nn.Module) -> None:
        images, labels = images64(3, 10), torch.tensor([2, 0, 1])
        interpreter = row.build(smooth)
        singles = [interpreter(images[i : i + 1], labels[i : i + 1]) for i in range(3)]
        batch = interpreter(images, labels)
        torch.testing.assert_close(batch, torch.cat(singles), atol=1e-10, rtol=0)

    def test_the_gradient_of_a_batch_is_that_of_its_images(
        self, row: Row, smooth: nn.Module
    ) -> None:
        interpreter, labels = row.build(smooth), torch.tensor([2, 0])

        def gradient(images: Tensor, labels: Tensor) -> Tensor:
            x = images.clone().requires_grad_()
            maps = interpreter.surrogate(x, labels)(x).maps
            return torch.autograd.grad(maps.square().sum(), x)[0]

        images = images64(2, 8)
        singles = [gradient(images[i : i + 1], labels[i : i + 1]) for i in range(2)]
        assert all(single.abs().max() > 0 for single in singles)
        torch.testing.assert_close(
            gradient(images, labels), torch.cat(singles), rtol=1e-7, atol=1e-9
        )

    @pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
    def test_constant_images(self, row: Row, model: nn.Module, value: float) -> None:
        images = torch.full((2, 3, 16, 16), value, requires_grad=True)
        interpreter, target = row.build(model), torch.tensor([0, 3])
        maps = interpreter(images, target)
        assert maps.isfinite().all()
        assert ((maps >= 0) & (maps <= 1 + 1e-6)).all()
        maps = graphed(row, interpreter, images, target)
        (gradient,) = torch.autograd.grad(maps.sum(), images)
        assert gradient.isfinite().all()

    @pytest.mark.parametrize("scale", [1e-12, 100.0])
    def test_saturated_and_flat_models(
        self, row: Row, model: nn.Module, data: Any, scale: float
    ) -> None:
        images, labels = data
        extreme = copy.deepcopy(model)
        extreme.fc.weight.data.mul_(scale)
        x = images.clone().requires_grad_()
        surrogate = row.build(extreme).surrogate(x, labels)
        maps = surrogate(x).maps
        assert maps.isfinite().all()
        assert ((maps >= 0) & (maps <= 1 + 1e-6)).all()
        (gradient,) = torch.autograd.grad(maps.sum(), x)
        assert gradient.isfinite().all()

    def test_a_model_without_an_opinion_gets_zeros(self, row: Row, model: nn.Module) -> None:
        if row.name == "RTS":
            pytest.skip("its map is its own network's opinion, of the features below fc")
        dead = copy.deepcopy(model)
        dead.fc.weight.data.zero_()
        x = torch.rand(2, 3, 16, 16, requires_grad=True)
        interpreter, target = row.build(dead), torch.tensor([0, 1])
        assert not interpreter(x, target).any()
        maps = graphed(row, interpreter, x, target)
        (gradient,) = torch.autograd.grad(maps.sum(), x, allow_unused=True, materialize_grads=True)
        assert gradient.isfinite().all()

    @pytest.mark.parametrize("shape", [(1, 3, 16, 16), (1, 3, 15, 13), (3, 3, 7, 18), (1, 3, 5, 5)])
    def test_any_size(self, row: Row, model: nn.Module, shape: tuple[int, ...]) -> None:
        x = torch.rand(shape, generator=torch.Generator().manual_seed(0), requires_grad=True)
        maps = row.build(model)(x, torch.zeros(shape[0], dtype=torch.long))
        assert maps.shape[:2] == (shape[0], 1)
        assert maps.isfinite().all()

    @pytest.mark.parametrize("layout", ["channels_last", "strided", "expanded"])
    def test_memory_layout(self, row: Row, model: nn.Module, data: Any, layout: str) -> None:
        images, labels = data
        if layout == "channels_last":
            other = images.contiguous(memory_format=torch.channels_last)
        elif layout == "strided":
            other = torch.stack([images, images], dim=-1)[..., 0]
        else:
            images, labels = images[:1].repeat(2, 1, 1, 1), labels[:1].repeat(2)
            other = images[:1].expand(2, -1, -1, -1)
        interpreter = row.build(model)
        torch.testing.assert_close(interpreter(other, labels), interpreter(images, labels), **CLOSE)

    def test_autocast(self, row: Row, model: nn.Module, data: Any) -> None:
        images, labels = data
        interpreter = row.build(model)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            maps = interpreter(images, labels)
        assert maps.isfinite().all()
        exact = interpreter(images, labels)
        assert maps.shape == exact.shape
        # bfloat16 has 8 bits: the maps look alike, no more.
        assert (maps.float() - exact).abs().mean() < 0.1

    def test_inference_mode_works_or_is_refused(
        self, row: Row, model: nn.Module, data: Any
    ) -> None:
        images, labels = data
        interpreter = row.build(model)
        expected = interpreter(images, labels)
        with torch.inference_mode():
            if row.name in {"CAM", "RTS"}:
                torch.testing.assert_close(interpreter(images, labels), expected)
            else:
                with pytest.raises(RuntimeError, match=r"got torch\.inference_mode\(\); use"):
                    interpreter(images, labels)
        assert torch.equal(interpreter(images, labels), expected)


class TestDerivative:
    @pytest.mark.parametrize("seed", [7, 8, 9])
    def test_gradcheck_of_the_map(self, smooth_row: Row, smooth: nn.Module, seed: int) -> None:
        interpreter, label = smooth_row.build(smooth), torch.tensor([0, 2])
        # Seeds away from the kinks of |a|, max over channels, and min-max.
        x = images64(2, seed=seed).requires_grad_()
        if interpreter.scaled:
            assert (interpreter.explain(x, label).maps.amax(dim=(1, 2, 3)) == 1).all()
        # Hooks see undefined gradients in the check of those; they are none of ours.
        assert torch.autograd.gradcheck(
            lambda x: interpreter.explain(x, label).maps,
            (x,),
            check_undefined_grad=False,
            fast_mode=True,
        )

    def test_finite_differences_pixel_by_pixel(self, smooth_row: Row, smooth: nn.Module) -> None:
        surrogate = smooth_row.build(smooth).surrogate(images64(), torch.tensor([0]))
        x = images64().requires_grad_()

        def score(x: Tensor) -> Tensor:
            maps = surrogate(x).maps
            return (maps * torch.linspace(1, 2, maps.numel()).view_as(maps)).sum()

        (gradient,) = torch.autograd.grad(score(x), x)
        for pixel in ((0, 0, 0), (1, 3, 2), (2, 5, 5)):
            bump = torch.zeros_like(x)
            bump[0][pixel] = 1e-6
            with torch.no_grad():
                slope = (score(x + bump) - score(x - bump)) / 2e-6
            assert slope.item() == pytest.approx(gradient[0][pixel].item(), rel=1e-4, abs=1e-6)

    def test_gradcheck_of_the_surrogate(self, smooth_row: Row, smooth: nn.Module) -> None:
        label = torch.tensor([2, 0])
        x = images64(2).requires_grad_()
        surrogate = smooth_row.build(smooth).surrogate(x, label)
        assert isinstance(surrogate, Surrogate)
        surrogate.advance(x)

        def both(x: Tensor) -> tuple[Tensor, ...]:
            return tuple(part for part in surrogate(x) if part is not None)

        assert torch.autograd.gradcheck(both, (x,), check_undefined_grad=False, fast_mode=True)

    def test_the_surrogate_is_the_map_on_a_smooth_net(
        self, smooth_row: Row, smooth: nn.Module
    ) -> None:
        interpreter, label = smooth_row.build(smooth), torch.tensor([2, 0])
        x = images64(2)
        ours = interpreter.surrogate(x, label)(x)
        theirs = interpreter.explain(x, label)
        assert torch.equal(ours.maps, theirs.maps)
        assert torch.equal(ours.maps, interpreter(x, label))

    def test_the_surrogate_has_a_gradient_on_relus(
        self, row: Row, model: nn.Module, data: Any
    ) -> None:
        images, labels = data
        x = images.clone().requires_grad_()
        maps = row.build(model).surrogate(x, labels)(x).maps
        (gradient,) = torch.autograd.grad(maps.square().sum(), x)
        assert gradient.isfinite().all()
        # At a layer the inner gradient is constant on ReLUs above it, and smoothing is not used.
        if row.name != "InternalInfluence":
            assert (gradient.abs().amax(dim=(1, 2, 3)) > 0).all()

    def test_the_surrogate_stays_near_the_map(
        self, smooth_row: Row, model: nn.Module, data: Any
    ) -> None:
        images, labels = data
        interpreter = smooth_row.build(model)
        smooth = interpreter.surrogate(images, labels)(images).maps
        maps = interpreter(images, labels)
        assert smooth.shape == maps.shape
        assert (smooth - maps).abs().mean() < 0.05

    def test_the_surrogate_goes_on_with_some_images(
        self, row: Row, smooth: nn.Module, data: Any
    ) -> None:
        images, labels = data[0].double(), data[1]
        whole, some = (row.build(smooth).surrogate(images, labels) for _ in range(2))
        kept, left = torch.arange(6), images
        for index in (None, [4, 1, 2], None, [2, 1]):
            if index is not None:
                some.take(torch.tensor(index))
                kept, left = kept[index], left[index]
            for surrogate, x in ((whole, images), (some, left)):
                surrogate.advance(x)
            x, y = (z.clone().requires_grad_() for z in (images, left))
            theirs, ours = whole(x), some(y)
            for part, own in zip(theirs, ours, strict=True):
                assert (part is None) is (own is None)
                if part is not None and own is not None:
                    torch.testing.assert_close(own, part[kept], rtol=1e-9, atol=1e-9)
            (their,) = torch.autograd.grad(theirs.maps.square().sum(), x)
            (our,) = torch.autograd.grad(ours.maps.square().sum(), y)
            torch.testing.assert_close(our, their[kept], rtol=1e-6, atol=1e-8)

    def test_logits_are_the_models(self, row: Row, model: nn.Module, data: Any) -> None:
        images, labels = data
        interpreter = row.build(model)
        expected = model(images)
        x = images.clone().requires_grad_()
        for explanation in (
            interpreter.explain(images, labels),
            interpreter.explain(x, labels),
            interpreter.surrogate(x, labels)(x),
        ):
            assert isinstance(explanation, Explanation)
            if explanation.logits is not None:
                torch.testing.assert_close(explanation.logits, expected, atol=1e-5, rtol=1e-5)
        if row.name in {
            "Gradient",
            "SmoothGrad",
            "IntegratedGradients",
            "CAM",
            "GradCAM",
            "MASK",
            "RTS",
        }:
            assert explanation.logits is not None

    def test_logits_carry_the_models_gradient(self, row: Row, model: nn.Module, data: Any) -> None:
        images, labels = data
        x = images.clone().requires_grad_()
        interpreter = row.build(model)
        explanation = interpreter.explain(x, labels)
        if not row.differentiable:
            explanation = interpreter.surrogate(x, labels)(x)
        if explanation.logits is None:
            pytest.skip("has no forward pass of the images to share")
        (ours,) = torch.autograd.grad(explanation.logits[:, 1].sum(), x)
        (theirs,) = torch.autograd.grad(model(x)[:, 1].sum(), x)
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)

    def test_no_grad_gives_the_same_map_without_a_graph(
        self, row: Row, model: nn.Module, data: Any
    ) -> None:
        images, labels = data
        interpreter = row.build(model)
        with_graph = interpreter(images.clone().requires_grad_(), labels)
        assert with_graph.requires_grad is row.differentiable
        x = images.clone().requires_grad_()
        with torch.no_grad():
            for given in (images, x):
                maps = interpreter(given, labels)
                assert not maps.requires_grad
                assert torch.equal(maps, with_graph)
                explanation = interpreter.explain(given, labels)
                assert explanation.logits is None or not explanation.logits.requires_grad

    def test_gradient_methods_keep_no_graph_nobody_asked_for(
        self, row: Row, model: nn.Module, data: Any
    ) -> None:
        images, labels = data
        maps = row.build(model)(images, labels)
        # CAM and RTS are plain forward passes: their graph is the parameters'.
        assert row.name in {"CAM", "RTS"} or not maps.requires_grad

    def test_images_that_are_no_leaf(self, row: Row, model: nn.Module, data: Any) -> None:
        images, labels = data
        leaf = images.clone().requires_grad_()
        maps = row.build(model).surrogate(images, labels)(leaf * 1).maps
        (gradient,) = torch.autograd.grad(maps.square().sum(), leaf)
        assert gradient.isfinite().all()
        assert leaf.grad is None

    def test_another_graph_over_the_model_survives(
        self, row: Row, model: nn.Module, data: Any
    ) -> None:
        images, labels = data
        x = images.clone().requires_grad_()
        loss = model(x).sum()
        row.build(model)(images, labels)
        assert torch.autograd.grad(loss, x)[0].isfinite().all()


class TestNothingLeftBehind:
    def test_after_a_call(self, row: Row, model: nn.Module, data: Any) -> None:
        images, labels = data
        interpreter = row.build(model)
        interpreter(images, labels)  # the first call of a process may initialise things
        for x in (images, images.clone().requires_grad_(), images.clone().requires_grad_() * 1):
            with nothing_left_behind(model, x):
                interpreter(x, labels)
            with nothing_left_behind(model, x):
                interpreter.surrogate(x, labels)(x)

    def test_by_building(self, row: Row, model: nn.Module) -> None:
        with nothing_left_behind(model):
            row.build(model)

    def test_after_a_backward(self, row: Row, model: nn.Module, data: Any) -> None:
        images, labels = data
        x = images.clone().requires_grad_()
        with nothing_left_behind(model, x):
            maps = row.build(model).surrogate(x, labels)(x).maps
            torch.autograd.grad(maps.sum(), x)

    def test_in_train_mode(self, row: Row, model: nn.Module, data: Any) -> None:
        images, labels = data
        clone = mixed(model)
        assert clone.dropout.training
        assert not clone.norm.training
        expected = row.build(model)(images, labels)
        interpreter = row.build(clone)
        with nothing_left_behind(clone, images):
            maps = interpreter(images, labels)
        assert torch.equal(maps, expected)  # it ran in eval mode

    @pytest.mark.parametrize("where", ["stem", "fc"])
    @pytest.mark.parametrize("train", [False, True])
    def test_after_an_exception(
        self, row: Row, model: nn.Module, data: Any, where: str, train: bool
    ) -> None:
        images, labels = data
        clone = mixed(model) if train else copy.deepcopy(model)
        interpreter = row.build(clone)

        def fail(*_: Any) -> None:
            raise KeyError("inside the model")

        handle = clone.get_submodule(where).register_forward_hook(fail)
        x = images.clone().requires_grad_()
        calls = [interpreter]
        if not train:  # a surrogate leaves the mode to the attack, and dropout draws numbers
            calls.append(lambda x, y: interpreter.surrogate(x, y)(x))
        for call in calls:
            for given in (x, images):
                with nothing_left_behind(clone, given), pytest.raises(KeyError, match="inside"):
                    call(given, labels)
        handle.remove()
        assert torch.equal(interpreter(images, labels), row.build(model)(images, labels))

    def test_frozen_parameters(self, row: Row, model: nn.Module, data: Any) -> None:
        images, labels = data
        clone = copy.deepcopy(model).requires_grad_(False)
        x = images.clone().requires_grad_()
        with nothing_left_behind(clone, x, images):
            maps = row.build(clone)(x, labels)
            torch.autograd.grad(
                graphed(row, row.build(clone), x, labels).sum(), x, allow_unused=True
            )
            assert torch.equal(row.build(clone)(images, labels), maps)
        assert torch.equal(maps, row.build(model)(images, labels))

    def test_users_hooks_stay_and_run(self, row: Row, model: nn.Module, data: Any) -> None:
        images, labels = data
        clone, calls = copy.deepcopy(model), []
        expected = row.build(clone)(images, labels)
        clone.body.register_forward_hook(lambda *_: calls.append(1))
        clone.fc.register_forward_pre_hook(lambda *_: calls.append(2))
        with nothing_left_behind(clone):
            assert torch.equal(row.build(clone)(images, labels), expected)
        assert {1, 2} <= set(calls)

    def test_no_warnings(self, row: Row, model: nn.Module, data: Any) -> None:
        images, labels = data
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            row.build(model)(images, labels)
        assert not caught


class TestInput:
    @pytest.mark.parametrize(
        ("spoil", "error", "message"),
        [
            (lambda x: (x * 255).byte(), TypeError, "floating dtype, got torch.uint8"),
            (lambda x: x * torch.nan, ValueError, "expected finite images"),
            (lambda x: x * 255, ValueError, r"expected images in \[0, 1\]"),
            (lambda x: x - 0.9, ValueError, r"expected images in \[0, 1\]"),
            (lambda x: x[0], ValueError, "with 4 dimensions"),
            (lambda x: x[:0], ValueError, "at least one entry"),
            (lambda x: x.numpy(), TypeError, "got ndarray"),
        ],
        ids=["uint8", "nan", "0-255", "negative", "rank", "empty", "numpy"],
    )
    def test_bad_images(
        self,
        row: Row,
        model: nn.Module,
        data: Any,
        spoil: Callable[[Tensor], Any],
        error: type[Exception],
        message: str,
    ) -> None:
        images, labels = data
        with nothing_left_behind(model), pytest.raises(error, match=message):
            row.build(model)(spoil(images), labels)

    @pytest.mark.parametrize(
        ("spoil", "error", "message"),
        [
            (lambda y: y.float(), TypeError, "integer dtype, got torch.float32"),
            (lambda y: y.tolist(), TypeError, "got list"),
            (lambda y: 1, TypeError, "got int"),
            (lambda y: y[:1], ValueError, r"expected target of shape \(6,\)"),
            (lambda y: y[:, None], ValueError, r"expected target of shape \(6,\)"),
            (lambda y: y - 4, ValueError, "expected target in"),
            (lambda y: y + 4, ValueError, "expected target in"),
        ],
        ids=["float", "list", "int", "short", "rank", "negative", "too large"],
    )
    def test_bad_classes(
        self,
        row: Row,
        model: nn.Module,
        data: Any,
        spoil: Callable[[Tensor], Any],
        error: type[Exception],
        message: str,
    ) -> None:
        images, labels = data
        with nothing_left_behind(model), pytest.raises(error, match=message):
            row.build(model)(images, spoil(labels))

    def test_a_model_that_returns_a_tuple(self, row: Row, data: Any) -> None:
        images, labels = data
        interpreter = row.build(TwoOutputs().eval())
        with pytest.raises(TypeError, match=r"return logits of shape .*, got tuple; wrap it"):
            interpreter(images, labels)

    def test_a_single_score_is_no_classifier(self, row: Row, data: Any) -> None:
        images, labels = data
        interpreter = row.build(TinyNet(classes=1).eval())
        with pytest.raises(ValueError, match="with at least two classes"):
            interpreter(images, labels * 0)


class TestObject:
    def test_pickle_and_deepcopy(self, row: Row, model: nn.Module, data: Any) -> None:
        images, labels = data
        interpreter = row.build(model)
        expected = interpreter(images, labels)
        for clone in (pickle.loads(pickle.dumps(interpreter)), copy.deepcopy(interpreter)):
            assert type(clone) is type(interpreter)
            assert clone.model is not model
            assert torch.equal(clone(images, labels), expected)
            # The copy stands on a model of its own, layers included.
            x = images.clone().requires_grad_()
            ours, theirs = (i.surrogate(x, labels)(x).maps for i in (clone, interpreter))
            assert torch.equal(ours, theirs)
            clone.model.body[0].weight.data.neg_()
            assert not torch.equal(clone(images, labels), expected)
        assert torch.equal(interpreter(images, labels), expected)

    def test_after_equals_a_model_with_the_preprocessing(
        self, row: Row, model: nn.Module, data: Any
    ) -> None:
        images, labels = data
        interpreter = row.build(model)
        plain = interpreter(images, labels)
        after = interpreter.after(Shifted())
        wrapped = row.build(Wrapped(model).eval())
        x = images.clone().requires_grad_()
        torch.testing.assert_close(after(images, labels), wrapped(images, labels), **CLOSE)
        ours, theirs = (i.surrogate(x, labels)(x) for i in (after, wrapped))
        torch.testing.assert_close(ours.maps, theirs.maps, **CLOSE)
        if ours.logits is not None:
            torch.testing.assert_close(ours.logits, model(Shifted()(images)))
        gradients = [
            torch.autograd.grad(e.maps.sum(), x, retain_graph=True)[0] for e in (ours, theirs)
        ]
        torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-3)
        # The original does not preprocess, and the maps are others.
        assert torch.equal(interpreter(images, labels), plain)
        assert not torch.allclose(after(images, labels), plain, atol=1e-3)
        assert type(after) is type(interpreter)
        assert after.model is model

    def test_repr_is_short(self, row: Row, model: nn.Module) -> None:
        text = repr(row.build(model))
        assert "\n" not in text
        assert len(text) < 80


def test_an_interpreter_of_ones_own(model: nn.Module) -> None:
    class Brightness(Interpreter):
        def explain(self, images: Tensor, target: Tensor) -> Explanation:
            return Explanation(images.mean(dim=1, keepdim=True), None)

    images, labels = blobs(2)
    interpreter = Brightness(model)
    assert torch.equal(interpreter(images, labels), images.mean(dim=1, keepdim=True))
    assert torch.equal(
        interpreter.surrogate(images, labels)(images).maps, interpreter(images, labels)
    )
    with pytest.raises(TypeError, match="abstract"):
        Interpreter(model)
    with pytest.raises(TypeError, match="expected Brightness to have a model, got None"):
        Brightness(None).logits(images)
