# SPDX-License-Identifier: MIT
"""CAM and Grad-CAM: equal to computations by hand, on networks of torchvision and on odd ones."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import captum.attr
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TinyNet
from torch import Tensor, nn
from torchvision import models

from captum_adv2.interpreters import CAM, GradCAM, Interpreter, min_max

TARGET = torch.tensor([0, 7])


def scaled(maps: np.ndarray) -> np.ndarray:
    low = maps.min(axis=(1, 2, 3), keepdims=True)
    return (maps - low) / (maps.max(axis=(1, 2, 3), keepdims=True) - low)


def features_of(model: nn.Module, images: Tensor) -> Tensor:
    return model.body(model.norm(model.stem(images)))


class TestByHand:
    def test_cam_is_the_weighted_sum(self, model: nn.Module, data: Any) -> None:
        images, labels = data
        features = features_of(model, images).detach().double().numpy()
        weights = model.fc.weight.detach().double().numpy()[labels.numpy()]
        expected = scaled(np.einsum("bkhw,bk->bhw", features, weights)[:, None])
        maps = CAM(model)(images, labels)
        assert maps.shape == (6, 1, 8, 8)
        np.testing.assert_allclose(maps.detach().numpy(), expected, atol=1e-5)

    def test_cam_is_gradcam_without_relu(self, model: nn.Module, data: Any) -> None:
        images, labels = data
        features = features_of(model, images)
        logits = model.fc(features.mean(dim=(2, 3)))
        score = logits[torch.arange(len(labels)), labels].sum()
        (gradient,) = torch.autograd.grad(score, features)
        raw = (features * gradient.mean(dim=(2, 3), keepdim=True)).sum(dim=1, keepdim=True)
        raw = raw.detach()
        np.testing.assert_allclose(
            CAM(model)(images, labels).detach().numpy(), scaled(raw.numpy()), atol=1e-5
        )
        np.testing.assert_allclose(
            GradCAM(model)(images, labels).numpy(), scaled(raw.clamp(min=0).numpy()), atol=1e-5
        )

    def test_gradcam_is_captums_with_relu(self, model: nn.Module, data: Any) -> None:
        images, labels = data
        theirs = captum.attr.LayerGradCam(model, model.body)
        expected = theirs.attribute(images, target=labels, relu_attributions=True)
        torch.testing.assert_close(
            GradCAM(model, layer="body")(images, labels), min_max(expected.detach())
        )

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
        expected = min_max((weights * features).sum(dim=1, keepdim=True).clamp(min=0))
        torch.testing.assert_close(GradCAM(net)(images, target), expected.detach())

    def test_gradcams_weights_are_differentiated(self) -> None:
        # On an MLP head they depend on the image; a constant would give another gradient.
        torch.manual_seed(4)
        net = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3),
        ).double()  # fmt: skip
        x = torch.rand(1, 3, 6, 6, dtype=torch.float64, requires_grad=True)
        interpreter, target = GradCAM(net), torch.tensor([0])
        assert interpreter(x, target).any()
        assert torch.autograd.gradcheck(
            lambda x: interpreter.explain(x, target).maps, (x,), check_undefined_grad=False
        )

    def test_a_map_without_a_positive_part_is_zero(self) -> None:
        net = nn.Sequential(
            nn.Conv2d(1, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2)
        )
        net[-1].weight.data.fill_(-1)
        net[0].weight.data.fill_(1)
        images = torch.rand(1, 1, 4, 4)
        assert not GradCAM(net)(images, torch.tensor([0])).any()
        assert CAM(net)(images, torch.tensor([0])).amax() == 1

    def test_brighter_where_the_evidence_is(self, model: nn.Module, data: Any) -> None:
        images, labels = data
        maps = CAM(model)(images, labels).detach()
        # The blob is the pixel that stands out most from the grey background.
        blob = F.avg_pool2d((images - 0.4).abs().amax(1, keepdim=True), 2).flatten(1).argmax(1)
        at_blob = maps.flatten(1).gather(1, blob[:, None])[:, 0]
        assert (at_blob > maps.mean(dim=(1, 2, 3))).float().mean() > 0.8


class TestLayer:
    @pytest.mark.parametrize("kind", [CAM, GradCAM])
    def test_by_name_and_by_module(
        self, model: nn.Module, data: Any, kind: Callable[..., Interpreter]
    ) -> None:
        images, labels = data
        found = kind(model)(images, labels)
        assert torch.equal(kind(model, layer="body")(images, labels), found)
        assert torch.equal(kind(model, layer=model.body)(images, labels), found)
        assert torch.equal(kind(model, "body.1")(images, labels), found)

    def test_an_earlier_layer(self, model: nn.Module, data: Any) -> None:
        images, labels = data
        assert GradCAM(model, layer="stem.1")(images, labels).shape == (6, 1, 16, 16)

    @pytest.mark.parametrize("kind", [CAM, GradCAM])
    def test_unknown(self, model: nn.Module, kind: Callable[..., Interpreter]) -> None:
        with pytest.raises(ValueError, match="got 'bdy'; near names: body"):
            kind(model, layer="bdy")
        with pytest.raises(ValueError, match="got another Conv2d; pass its dotted name"):
            kind(model, layer=nn.Conv2d(1, 1, 1))
        with pytest.raises(TypeError, match="expected layer to be a module or its name, got int"):
            kind(model, layer=3)

    def test_wrong_number_of_channels(self, model: nn.Module, data: Any) -> None:
        with pytest.raises(ValueError, match="of 16 channels, the head's inputs, for CAM, got 8"):
            CAM(model, layer="stem")(*data)

    @pytest.mark.parametrize("kind", [CAM, GradCAM])
    def test_layer_without_a_map(
        self, model: nn.Module, data: Any, kind: Callable[..., Interpreter]
    ) -> None:
        with pytest.raises(ValueError, match=r"expected feature maps .* got shape \(6, 4\); pass"):
            kind(model, layer="fc")(*data)

    @pytest.mark.parametrize("kind", [CAM, GradCAM])
    def test_layer_that_does_not_run(self, data: Any, kind: Callable[..., Interpreter]) -> None:
        net = TinyNet().eval()
        net.spare = nn.Identity()
        with pytest.raises(ValueError, match=r"expected feature maps .* got none; pass layer="):
            kind(net, layer="spare")(*data)


class TestHead:
    def test_no_model(self) -> None:
        for kind in (CAM, GradCAM):
            with pytest.raises(TypeError, match="expected model to be a torch"):
                kind(lambda x: x)

    def test_no_head(self) -> None:
        net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        with pytest.raises(
            ValueError, match=r"expected Sequential to end in .* got none; use Grad"
        ):
            CAM(net)

    def test_convolution_with_a_window(self) -> None:
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        with pytest.raises(ValueError, match="got Conv2d; use GradCAM, which needs no linear head"):
            CAM(net)

    def test_nothing_pooled(self) -> None:
        net = nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
        images, target = torch.rand(1, 3, 4, 4), torch.tensor([0])
        for kind in (CAM, GradCAM):
            with pytest.raises(ValueError, match=rf"for {kind.__name__}, got none; pass layer="):
                kind(net)(images, target)

    def test_max_pooling_is_not_average_pooling(self) -> None:
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(4, 3)
        )
        net[-1].weight.data.mul_(10)
        images, target = torch.rand(1, 3, 8, 8), torch.tensor([0])
        with pytest.raises(ValueError, match="average pooling and one linear layer .*use GradCAM"):
            CAM(net)(images, target)
        assert CAM(net, layer="1")(images, target).shape == (1, 1, 6, 6)
        assert GradCAM(net)(images, target).shape == (1, 1, 6, 6)

    def test_a_second_head_is_noticed(self, data: Any) -> None:
        torch.manual_seed(0)
        net = TinyNet().eval()
        net.auxiliary = nn.Linear(16, 4)
        net.auxiliary.weight.data.mul_(10)
        with pytest.raises(ValueError, match="got other logits than these give; pass layer="):
            CAM(net)(*data)
        GradCAM(net)(*data)

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
        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = model

            def forward(self, x: Tensor) -> Tensor:
                return self.inner.fc(pool(features_of(self.inner, x)))

        torch.testing.assert_close(CAM(Net().eval())(*data), CAM(model)(*data), atol=1e-5, rtol=0)


class Case(NamedTuple):
    """A network of torchvision: its features, and its head, told by somebody who knows it."""

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


class Normalise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x - 0.45) / 0.225


@functools.cache
def torchvision_net(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = getattr(models, name)(num_classes=10).eval()
        for module in net.modules():  # statistics of a batch make fresh activations ordinary
            if isinstance(module, nn.BatchNorm2d):
                module.train()
                module.momentum = 1.0
        with torch.no_grad():
            net(torch.rand(4, 3, 96, 96))
    return net.eval().requires_grad_(False)


@functools.cache
def vgg() -> nn.Module:
    """VGG-11 with its own features and pooling, and a small head: its own has 120 M weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        with torch.device("meta"):
            net = models.vgg11(init_weights=False)
        net.features = models.vgg.make_layers(models.vgg.cfgs["A"])
        net.classifier = nn.Sequential(
            nn.Linear(512 * 7 * 7, 16), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(16, 10)
        )
    return net.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    return torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(5))


class TestTorchvision:
    @pytest.mark.parametrize("name", POOLED)
    def test_cam_finds_features_and_head(self, name: str, pictures: Tensor) -> None:
        net, case = torchvision_net(name), POOLED[name]
        features = case.features(net, pictures)
        weight = case.head(net).weight.flatten(1)[TARGET]
        expected = min_max((features * weight[:, :, None, None]).sum(dim=1, keepdim=True))
        explanation = CAM(net).explain(pictures, TARGET)
        torch.testing.assert_close(explanation.maps, expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(explanation.logits, net(pictures))
        assert expected.std() > 0.1

    @pytest.mark.parametrize("name", POOLED)
    def test_gradcam_finds_features(self, name: str, pictures: Tensor) -> None:
        net, case = torchvision_net(name), POOLED[name]
        features = case.features(net, pictures)
        weight = case.head(net).weight.flatten(1)[TARGET]
        raw = (features * weight[:, :, None, None]).sum(dim=1, keepdim=True)
        maps = GradCAM(net)(pictures, TARGET)
        assert maps.shape == raw.shape
        if name == "squeezenet1_0":  # a ReLU follows its head: the gradient is 0 where it is shut
            slope = (raw + net.classifier[1].bias[TARGET].view(-1, 1, 1, 1) > 0).float()
            raw = raw * slope.mean(dim=(2, 3), keepdim=True)
        torch.testing.assert_close(maps, min_max(raw.relu()), atol=1e-4, rtol=0)

    @pytest.mark.parametrize("kind", [CAM, GradCAM])
    @pytest.mark.parametrize("name", POOLED)
    def test_inside_a_wrapper(
        self, name: str, kind: Callable[..., Interpreter], pictures: Tensor
    ) -> None:
        net = torchvision_net(name)
        wrapped = nn.Sequential(Normalise(), net).eval()
        expected = kind(net).explain(Normalise()(pictures), TARGET).maps
        torch.testing.assert_close(kind(wrapped)(pictures, TARGET), expected)

    def test_densenets_features_are_after_its_functional_relu(self, pictures: Tensor) -> None:
        net = torchvision_net("densenet121")
        features, logits = CAM(net)._features(
            pictures, torch.zeros(len(pictures), dtype=torch.long)
        )
        assert features.min() >= 0
        assert (net.features(pictures) < 0).any()
        assert torch.equal(features, F.relu(net.features(pictures)))
        assert torch.equal(logits, net(pictures))

    def test_a_named_layers_output_survives_what_follows_in_place(self, pictures: Tensor) -> None:
        net = torchvision_net("densenet121")
        features, logits = CAM(net, layer="features")._features(
            pictures, torch.zeros(len(pictures), dtype=torch.long)
        )
        assert torch.equal(features, net.features(pictures))
        assert (features < 0).any()
        assert torch.equal(logits, net(pictures))

    def test_vggs_features_are_before_its_last_pooling(self) -> None:
        images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(6))
        # 4x4 of 64 pixels is 14x14 of 224.
        before = vgg().features[:-1](images)
        assert before.shape[2:] == (4, 4)
        features, logits = GradCAM(vgg())._features(
            images, torch.zeros(len(images), dtype=torch.long)
        )
        assert torch.equal(features, before)
        assert torch.equal(logits, vgg()(images))
        assert GradCAM(vgg())(images, TARGET).shape == (2, 1, 4, 4)

    def test_cam_refuses_vgg(self) -> None:
        with pytest.raises(ValueError, match=r"for CAM, got 512; .*GradCAM"):
            CAM(vgg())(torch.rand(2, 3, 64, 64), TARGET)

    @pytest.mark.parametrize("name", ["mobilenet_v3_small", "convnext_tiny"])
    def test_cam_refuses_other_heads(self, name: str, pictures: Tensor) -> None:
        net = torchvision_net(name)
        with pytest.raises(ValueError, match=r"for CAM, got .*GradCAM"):
            CAM(net)(pictures, TARGET)
        maps = GradCAM(net)(pictures, TARGET)
        assert maps.shape == (2, 1, 3, 3)
        assert maps.isfinite().all()

    def test_the_check_is_repeated_until_it_passes(self, pictures: Tensor) -> None:
        interpreter = CAM(torchvision_net("convnext_tiny"))
        for _ in range(2):
            with pytest.raises(ValueError, match="use GradCAM"):
                interpreter(pictures, TARGET)
