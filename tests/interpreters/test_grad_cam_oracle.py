# SPDX-License-Identifier: MIT
"""CAM and Grad-CAM on the networks of torchvision and timm equal pytorch-grad-cam's.

The target layer, which pytorch-grad-cam has to be given, is in the table, by hand.
"""

from __future__ import annotations

import operator
import warnings
from typing import Any

import pytest
import torch
from kinds import settled
from torch import Tensor, nn
from torchvision import models

from captum_adv2.interpreters import CAM, GradCAM
from captum_adv2.interpreters.base import min_max

grad_cam = pytest.importorskip("pytorch_grad_cam", reason="needs the extra [dev]")
timm = pytest.importorskip("timm", reason="needs the extra [dev]")

TARGET = torch.tensor([1, 4])
# The target layer, the size of images, and the network's arguments; last "nhwc": channels last.
TORCHVISION = {
    "resnet18": ("layer4", 64),
    "resnext50_32x4d": ("layer4", 64),
    "alexnet": ("features.11", 96),
    "vgg11": ("features.19", 64),
    "mobilenet_v2": ("features", 64),
    "mobilenet_v3_small": ("features", 64),
    "efficientnet_b0": ("features", 64),
    "efficientnet_v2_s": ("features", 64),
    "shufflenet_v2_x0_5": ("conv5", 64),
    "mnasnet0_5": ("layers", 64),
    "regnet_x_400mf": ("trunk_output", 64),
    "convnext_tiny": ("features", 64),
    "squeezenet1_1": ("features", 64),
    "googlenet": ("inception5b", 64),
    "inception_v3": ("Mixed_7c", 192),
    "swin_t": ("permute", 64),
    "swin_v2_t": ("permute", 64),
    "maxvit_t": ("blocks.3", 224),
}
TIMM = {
    "resnet18": ("layer4", 64),
    "resnetv2_50": ("norm", 64),
    "vgg11": ("features.19", 64),
    "densenet121": ("features", 64),
    "mobilenetv3_small_050": ("blocks", 64),
    "mobilenetv4_conv_small": ("blocks", 64),
    "efficientnet_lite0": ("bn2", 64),
    "convnext_atto": ("stages", 64),
    "ghostnet_100": ("blocks", 64),
    "repvgg_a0": ("stages", 64),
    "regnety_002": ("final_conv", 64),
    "rexnet_100": ("features", 64),
    "dla34": ("level5", 64),
    "dpn48b": ("features", 64),
    "seresnet18": ("layer4", 64),
    "cspdarknet53": ("stages", 64),
    "ese_vovnet19b_dw": ("stages", 64),
    "nf_regnet_b0": ("final_act", 64),
    "hrnet_w18_small": ("final_layer", 64),
    "xception41": ("act", 64),
    "lcnet_050": ("blocks", 64),
    "edgenext_xx_small": ("stages", 64),
    "mobilevit_xxs": ("final_conv", 64),
    "pvt_v2_b0": ("stages", 64),
    "poolformer_s12": ("stages", 64),
    "mambaout_femto": ("stages", 64, "nhwc"),
    "swin_tiny_patch4_window7_224": ("norm", 64, "nhwc"),
    "swinv2_cr_tiny_ns_224": ("stages", 64),
    "maxvit_rmlp_pico_rw_256": ("norm", 256),
    "resnest14d": ("layer4", 64),
    "inception_v4": ("features", 160),
}
SLOW = {
    *("torchvision-maxvit_t", "torchvision-inception_v3", "torchvision-swin_v2_t"),
    *("timm-maxvit_rmlp_pico_rw_256", "timm-inception_v4", "timm-vgg11", "timm-xception41"),
}

# Those that end in average pooling and one linear layer or 1x1 convolution.
LINEAR = {
    *(f"torchvision-{name}" for name in TORCHVISION),
    *(f"timm-{name}" for name in TIMM),
} - {
    *(f"torchvision-{name}" for name in ("alexnet", "vgg11", "mobilenet_v3_small")),
    *("torchvision-convnext_tiny", "torchvision-squeezenet1_1", "torchvision-maxvit_t"),
    *(f"timm-{name}" for name in ("vgg11", "mobilenetv3_small_050", "mobilenetv4_conv_small")),
    *(f"timm-{name}" for name in ("convnext_atto", "ghostnet_100", "lcnet_050")),
    *(f"timm-{name}" for name in ("edgenext_xx_small", "poolformer_s12", "mambaout_femto")),
}


def cases(library: str, table: dict[str, Any]) -> list[Any]:
    return [
        pytest.param(
            library,
            name,
            *row,
            *([""] * (3 - len(row))),
            id=f"{library}-{name}",
            marks=[pytest.mark.slow] if f"{library}-{name}" in SLOW else [],
        )
        for name, row in table.items()
    ]


def network(library: str, name: str, size: int) -> nn.Module:
    """Return a network in double precision, whose weights are drawn, with ordinary activations."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if library == "torchvision":
            aux = {"aux_logits": False} if name in ("googlenet", "inception_v3") else {}
            drawn = {"init_weights": True} if aux else {}
            net = getattr(models, name)(num_classes=10, **aux, **drawn)
        else:
            sized = {"img_size": size} if "swin" in name or "vit_rm" in name else {}
            sized |= {"window_size": 2} if name.startswith("swin_") else {}
            net = timm.create_model(name, pretrained=False, num_classes=10, **sized)
    images = torch.rand(2, 3, size, size, dtype=torch.float64)
    return settled(net.double(), images).requires_grad_(False)


def theirs(net: nn.Module, layer: str, images: Tensor, layout: str) -> Tensor:
    """Return pytorch-grad-cam's map, at the resolution of the features."""

    class Native(grad_cam.GradCAM):
        def get_cam_image(self, *args: Any) -> Any:
            self.raw = super().get_cam_image(*args)
            return self.raw

    move = (lambda a: a.permute(0, 3, 1, 2)) if layout == "nhwc" else None
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    with Native(net, [operator.attrgetter(layer)(net)], reshape_transform=move) as method:
        method(
            images.clone().requires_grad_(),
            [ClassifierOutputTarget(int(label)) for label in TARGET],
        )
    return min_max(torch.from_numpy(method.raw)[:, None].relu())


@pytest.mark.parametrize(
    ("library", "name", "layer", "size", "layout"),
    cases("torchvision", TORCHVISION) + cases("timm", TIMM),
)
def test_the_map_is_pytorch_grad_cams(
    library: str, name: str, layer: str, size: int, layout: str
) -> None:
    net = network(library, name, size)
    generator = torch.Generator().manual_seed(5)
    images = torch.rand(2, 3, size, size, generator=generator, dtype=torch.float64)
    expected = theirs(net, layer, images, layout)
    found = GradCAM(net)
    assert expected.shape[2:].numel() > 1
    assert expected.any()
    for _ in range(2):
        torch.testing.assert_close(found(images, TARGET), expected, atol=1e-4, rtol=0)
    named = GradCAM(net, layer=layer)(images, TARGET)
    torch.testing.assert_close(named, expected, atol=1e-4, rtol=0)
    if f"{library}-{name}" in LINEAR:  # Grad-CAM is the positive part of CAM
        cam = CAM(net)
        maps, features = cam.explain(images, TARGET).maps, cam._features(images)[0].maps()
        raw = (features * cam._linear.weight.flatten(1)[TARGET][:, :, None, None]).sum(1, True)
        torch.testing.assert_close(maps, min_max(raw))
        torch.testing.assert_close(min_max(raw.relu()), expected, atol=1e-4, rtol=0)
    elif name != "squeezenet1_1":  # a ReLU follows its head
        with pytest.raises(ValueError, match="for CAM, got .*GradCAM"):
            CAM(net)(images, TARGET)


@pytest.mark.parametrize("layer", ["norm", "features"])
def test_a_layer_of_swin_has_channels_last(layer: str) -> None:
    net = network("torchvision", "swin_t", 64)
    images = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    expected = theirs(net, layer, images, "nhwc")
    assert expected.shape == (2, 1, 2, 2)
    found = GradCAM(net, layer=layer)(images, TARGET)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("name", "size", "hint"),
    [
        ("resnet50_clip", 64, "pass layer='stages' to use them"),
        ("efficientformer_l1", 224, "pass layer='stages.3.blocks.2' to use them"),
        ("vit_tiny_patch16_224", 224, "got none; .* use Gradient"),
        ("mixer_s32_224", 224, "got none; .* use Gradient"),
        ("levit_128s", 224, "got none; .* use Gradient"),
    ],
)
def test_tokens_and_attention_pooling_are_refused(name: str, size: int, hint: str) -> None:
    net = network("timm", name, size)
    images = torch.rand(2, 3, size, size, dtype=torch.float64)
    with pytest.raises(ValueError, match=f"feature maps .* for GradCAM, .*{hint}"):
        GradCAM(net)(images, TARGET)
