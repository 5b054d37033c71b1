# SPDX-License-Identifier: MIT
"""CAM and Grad-CAM: equal to computations by hand, on torchvision's networks and on odd ones."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import captum.attr
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TinyNet, torchvision_net
from kinds import Around
from torch import Tensor, nn
from torchvision import models

from captum_adv2.interpreters import CAM, GradCAM, Interpreter
from captum_adv2.interpreters.base import min_max

TARGET = torch.tensor([0, 7])
both = pytest.mark.parametrize("kind", [CAM, GradCAM])


def features_of(model: nn.Module, images: Tensor) -> Tensor:
    return model.body(model.norm(model.stem(images)))


def pooled(*tail: nn.Module, head: float = 1.0) -> nn.Module:
    """Return convolution, ReLU, average pooling and a linear layer of 3 classes, with a tail."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
        )
    net[-1].weight.data.mul_(head)
    return nn.Sequential(*net, *tail).eval()


class TestByHand:
    def test_cam_is_the_weighted_sum_and_gradcam_without_relu(
        self, model: nn.Module, data: Any
    ) -> None:
        images, labels = data
        features = features_of(model, images)
        weights = model.fc.weight[labels]
        raw = np.einsum("bkhw,bk->bhw", features.detach().numpy(), weights.detach().numpy())
        expected = min_max(torch.from_numpy(raw)[:, None])
        torch.testing.assert_close(CAM(model)(*data).detach(), expected, atol=1e-5, rtol=0)
        score = model.fc(features.mean(dim=(2, 3))).gather(1, labels[:, None]).sum()
        (gradient,) = torch.autograd.grad(score, features)
        raw = (features * gradient.mean(dim=(2, 3), keepdim=True)).sum(dim=1, keepdim=True)
        torch.testing.assert_close(min_max(raw.detach()), expected, atol=1e-5, rtol=0)
        expected = min_max(raw.detach().relu())
        torch.testing.assert_close(GradCAM(model)(*data), expected, atol=1e-5, rtol=0)

    def test_gradcam_is_captums_with_relu(self, model: nn.Module, data: Any) -> None:
        images, labels = data
        theirs = captum.attr.LayerGradCam(model, model.body)
        expected = theirs.attribute(images, target=labels, relu_attributions=True)
        torch.testing.assert_close(GradCAM(model, "body")(*data), min_max(expected.detach()))

    def test_gradcam_of_an_mlp_head(self) -> None:
        torch.manual_seed(3)
        body = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Tanh())
        head = nn.Sequential(nn.Flatten(), nn.Linear(45, 8), nn.Tanh(), nn.Linear(8, 4))
        net = nn.Sequential(body, nn.AvgPool2d(2), head).double()
        images = torch.rand(2, 3, 8, 8, dtype=torch.float64)
        target = torch.tensor([1, 2])
        features = body(images)
        score = head(F.avg_pool2d(features, 2)).gather(1, target[:, None]).sum()
        (gradient,) = torch.autograd.grad(score, features)
        weights = gradient.mean(dim=(2, 3), keepdim=True)
        expected = min_max((weights * features).sum(dim=1, keepdim=True).relu())
        torch.testing.assert_close(GradCAM(net)(images, target), expected.detach())
        # The weights depend on the image, and are differentiated too.
        x = images.requires_grad_()
        assert torch.autograd.gradcheck(
            lambda x: GradCAM(net).explain(x, target).maps, (x,), check_undefined_grad=False
        )

    def test_gradcam_of_probabilities(self, model: nn.Module, data: Any) -> None:
        net = copy.deepcopy(model).double()
        images, target = data[0].double(), (data[1] + 1) % 4
        features = features_of(net, images)
        logits = net.fc(features.mean(dim=(2, 3)))
        chances = logits.softmax(dim=1).gather(1, target[:, None])
        (gradient,) = torch.autograd.grad(chances.sum(), features)
        weights = gradient.mean(dim=(2, 3), keepdim=True)  # Eq. 14
        expected = min_max((weights * features).sum(dim=1, keepdim=True).relu()).detach()
        found = GradCAM(net, score="probability")(images, target)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
        assert not torch.allclose(found, GradCAM(net)(images, target), atol=1e-2)
        with pytest.raises(ValueError, match="one of"):
            GradCAM(net, score="odds")

    def test_a_map_without_a_positive_part_is_zero(self) -> None:
        net = pooled(head=0.0)
        net[4].weight.data.fill_(-1)
        images, target = torch.rand(1, 3, 8, 8), torch.tensor([0])
        assert not GradCAM(net)(images, target).any()
        assert CAM(net)(images, target).amax() == 1

    def test_brighter_where_the_evidence_is(self, model: nn.Module, data: Any) -> None:
        maps = CAM(model)(*data).detach()
        # The blob is the pixel that differs most from the grey background.
        blob = F.avg_pool2d((data[0] - 0.4).abs().amax(1, keepdim=True), 2).flatten(1).argmax(1)
        at_blob = maps.flatten(1).gather(1, blob[:, None])[:, 0]
        assert (at_blob > maps.mean(dim=(1, 2, 3))).float().mean() > 0.8


class TestLayer:
    @both
    def test_by_name_and_by_module(self, model: nn.Module, data: Any, kind: Any) -> None:
        for layer in ("body", model.body, "body.1"):
            assert torch.equal(kind(model, layer)(*data), kind(model)(*data))
        assert GradCAM(model, layer="stem.1")(*data).shape == (6, 1, 16, 16)

    @both
    def test_without_feature_maps(self, data: Any, kind: Any) -> None:
        net = TinyNet().eval()
        net.spare = nn.Identity()
        for layer, got in (("fc", r"shape \(6, 4\)"), ("spare", "none")):
            with pytest.raises(ValueError, match=rf"feature maps .* got {got}.*; pass "):
                kind(net, layer)(*data)
        with pytest.raises(ValueError, match=rf"for {kind.__name__}, got none; pass "):
            kind(nn.Sequential(nn.Flatten(), nn.Linear(768, 3)))(data[0], data[1] % 3)

    def test_of_another_width_than_the_head(self, model: nn.Module, data: Any) -> None:
        with pytest.raises(ValueError, match="of 16 channels, the head's inputs, for CAM, got 8"):
            CAM(model, layer="stem")(*data)


class TestHead:
    @pytest.mark.parametrize(
        ("net", "got"),
        [
            (nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), "none"),
            (nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), "weights"),
        ],
    )
    def test_not_linear(self, net: nn.Module, got: str) -> None:
        with pytest.raises(ValueError, match=f"expected Sequential to end in .* got {got}.*; use"):
            CAM(net)(torch.rand(2, 3, 8, 8), torch.tensor([0, 1]))

    @pytest.mark.parametrize("factor", [0.95, 0.98, 0.995, 1.005, 1.02, 1.05])
    def test_logits_are_the_heads_within_a_percent(self, factor: float) -> None:
        images, target = torch.rand(2, 3, 8, 8), torch.tensor([0, 1])
        net = pooled(Around(None, lambda _, x: factor * x), head=0.0)
        net[4].weight.data[0] = 50.0
        net[4].weight.data.div_(net(images[:1]).amax() / 20)  # the largest logit is about 20
        if abs(factor - 1) < 0.01:
            torch.testing.assert_close(CAM(net)(images, target), CAM(net[:5])(images, target))
            return
        interpreter = CAM(net)
        for _ in range(2):  # until it has passed, each call checks
            with pytest.raises(ValueError, match=r"got other logits than these give; pass layer="):
                interpreter(images, target)
        expected = CAM(net[:5])(images, target)
        torch.testing.assert_close(CAM(net, layer="1")(images, target), expected)

    def test_max_pooling_is_noticed(self, data: Any) -> None:
        net = pooled(head=10.0)
        net[2] = nn.AdaptiveMaxPool2d(1)
        with pytest.raises(ValueError, match="average pooling and one linear layer .*GradCAM"):
            CAM(net)(data[0], data[1] % 3)
        assert GradCAM(net)(data[0], data[1] % 3).isfinite().all()

    def test_the_head_is_what_runs_last(self, model: nn.Module, data: Any) -> None:
        """Whatever the order in which modules are registered, and whether they run at all."""
        net = copy.deepcopy(model)
        net.auxiliary = nn.Linear(16, 4)
        net._modules = {name: net._modules[name] for name in reversed(net._modules)}
        for kind in (CAM, GradCAM):
            assert torch.equal(kind(net)(*data), kind(model)(*data))

    @pytest.mark.parametrize("relu", [False, True])
    def test_convolutional_head(self, relu: bool) -> None:
        torch.manual_seed(0)
        body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
        tail = [nn.ReLU()] if relu else []
        net = nn.Sequential(
            body, nn.Dropout(), nn.Conv2d(4, 3, 1), *tail, nn.AdaptiveAvgPool2d(1), nn.Flatten()
        ).eval()
        images, target = torch.rand(2, 3, 8, 8), torch.tensor([2, 1])
        scores = net[2](body(images))[torch.arange(2), target][:, None]
        torch.testing.assert_close(CAM(net)(images, target), min_max(scores))

    @pytest.mark.parametrize(
        "pool",
        [
            lambda a: F.adaptive_avg_pool2d(a, 1).flatten(1),
            lambda a: a.mean(dim=(2, 3)),
            lambda a: torch.mean(a, (2, 3)),
            lambda a: a.mean([-2, -1]),
            lambda a: F.avg_pool2d(a, a.shape[-1]).flatten(1),
            lambda a: nn.AdaptiveAvgPool2d(1)(a)[..., 0, 0],
        ],
    )
    def test_pooling_however_written(
        self, model: nn.Module, data: Any, pool: Callable[[Tensor], Tensor]
    ) -> None:
        net = Around(model, lambda inner, x: inner.fc(pool(features_of(inner, x))))
        torch.testing.assert_close(CAM(net)(*data), CAM(model)(*data), atol=1e-5, rtol=0)


class Case(NamedTuple):
    """A network of torchvision: its features and its head, by hand."""

    features: Callable[[Any, Tensor], Tensor]
    head: Callable[[Any], nn.Module]


def _resnet(net: Any, x: Tensor) -> Tensor:
    x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
    return net.layer4(net.layer3(net.layer2(net.layer1(x))))


POOLED = {
    "resnet18": Case(_resnet, lambda net: net.fc),
    "densenet121": Case(lambda net, x: F.relu(net.features(x)), lambda net: net.classifier),
    "squeezenet1_0": Case(lambda net, x: net.features(x), lambda net: net.classifier[1]),
    "mobilenet_v2": Case(lambda net, x: net.features(x), lambda net: net.classifier[1]),
    "efficientnet_b0": Case(lambda net, x: net.features(x), lambda net: net.classifier[1]),
}


@functools.cache
def vgg() -> nn.Module:
    """Return VGG-11 with a small head: its own has 120 M weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        with torch.device("meta"):
            net = models.vgg11(init_weights=False)
        net.features = models.vgg.make_layers(models.vgg.cfgs["A"])
        net.classifier = nn.Sequential(
            nn.Linear(512 * 7 * 7, 16), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(16, 10)
        )
    return net.eval().requires_grad_(False)


class TestTorchvision:
    PICTURES = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(5))

    @pytest.mark.parametrize("name", POOLED)
    def test_features_and_head_are_found(self, name: str) -> None:
        net, case = torchvision_net(name), POOLED[name]
        features, head = case.features(net, self.PICTURES), case.head(net)
        weight = head.weight.flatten(1)[TARGET]
        raw = (features * weight[:, :, None, None]).sum(dim=1, keepdim=True)
        maps, logits, _ = CAM(net).explain(self.PICTURES, TARGET)
        torch.testing.assert_close(maps, min_max(raw), atol=1e-4, rtol=0)
        torch.testing.assert_close(logits, net(self.PICTURES))
        assert maps.std() > 0.1
        if name == "squeezenet1_0":  # a ReLU follows its head: the gradient is 0 where it is shut
            slope = (raw + head.bias[TARGET].view(-1, 1, 1, 1) > 0).float()
            raw = raw * slope.mean(dim=(2, 3), keepdim=True)
        expected = min_max(raw.relu())
        torch.testing.assert_close(GradCAM(net)(self.PICTURES, TARGET), expected, atol=1e-4, rtol=0)

    @both
    @pytest.mark.parametrize("name", POOLED)
    def test_inside_a_wrapper(self, name: str, kind: Callable[..., Interpreter]) -> None:
        net, double = torchvision_net(name), Around(None, lambda _, x: 2.0 * x)
        maps = kind(nn.Sequential(double, net).eval())(self.PICTURES / 2, TARGET)
        torch.testing.assert_close(maps, kind(net).explain(self.PICTURES, TARGET).maps)

    def test_densenets_last_relu_is_functional_and_in_place(self) -> None:
        net, x = torchvision_net("densenet121"), self.PICTURES
        for interpreter, expected in (
            (CAM(net), F.relu(net.features(x))),
            (CAM(net, layer="features"), net.features(x)),
        ):
            for _ in range(2):  # they are found in the first pass, and read in the second
                features, logits = interpreter._features(x)
                assert torch.equal(features.raw, expected)
                assert torch.equal(logits, net(x))
        assert (features.raw < 0).any()

    def test_vggs_features_are_before_its_last_pooling(self) -> None:
        images = self.PICTURES[..., :64, :64]
        before = vgg().features[:-1](images)
        assert before.shape[2:] == (4, 4)  # as 14x14 of 224 pixels
        features, logits = GradCAM(vgg())._features(images)
        assert torch.equal(features.raw, before)
        assert torch.equal(logits, vgg()(images))
        with pytest.raises(ValueError, match=r"for CAM, got 512; .*GradCAM"):
            CAM(vgg())(images, TARGET)

    @pytest.mark.parametrize("name", ["mobilenet_v3_small", "convnext_tiny"])
    def test_other_heads_need_gradcam(self, name: str) -> None:
        net = torchvision_net(name)
        with pytest.raises(ValueError, match=r"for CAM, got .*GradCAM"):
            CAM(net)(self.PICTURES, TARGET)
        maps = GradCAM(net)(self.PICTURES, TARGET)
        assert maps.shape == (2, 1, 3, 3)
        assert maps.isfinite().all()
