# SPDX-License-Identifier: MIT
"""CAM and Grad-CAM on the networks of torchvision and timm equal pytorch-grad-cam's.

pytorch-grad-cam has to be given the target layer, which is in the table.
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
# Library, network, target layer, size of images; "cam" where average pooling and one linear layer
# or 1x1 convolution end it, "nhwc" where channels are last.
CASES = (
    "torchvision resnet18 layer4 64 cam",
    "torchvision resnext50_32x4d layer4 64 cam",
    "torchvision alexnet features.11 96",
    "torchvision vgg11 features.19 64",
    "torchvision mobilenet_v2 features 64 cam",
    "torchvision mobilenet_v3_small features 64",
    "torchvision efficientnet_b0 features 64 cam",
    "torchvision efficientnet_v2_s features 64 cam",
    "torchvision shufflenet_v2_x0_5 conv5 64 cam",
    "torchvision mnasnet0_5 layers 64 cam",
    "torchvision regnet_x_400mf trunk_output 64 cam",
    "torchvision convnext_tiny features 64",
    "torchvision squeezenet1_1 features 64",
    "torchvision googlenet inception5b 64 cam",
    "torchvision inception_v3 Mixed_7c 192 cam slow",
    "torchvision swin_t permute 64 cam",
    "torchvision swin_v2_t permute 64 cam slow",
    "torchvision maxvit_t blocks.3 224 slow",
    "timm resnet18 layer4 64 cam",
    "timm resnetv2_50 norm 64 cam",
    "timm vgg11 features.19 64 slow",
    "timm densenet121 features 64 cam",
    "timm mobilenetv3_small_050 blocks 64",
    "timm mobilenetv4_conv_small blocks 64",
    "timm efficientnet_lite0 bn2 64 cam",
    "timm convnext_atto stages 64",
    "timm ghostnet_100 blocks 64",
    "timm repvgg_a0 stages 64 cam",
    "timm regnety_002 final_conv 64 cam",
    "timm rexnet_100 features 64 cam",
    "timm dla34 level5 64 cam",
    "timm dpn48b features 64 cam",
    "timm seresnet18 layer4 64 cam",
    "timm cspdarknet53 stages 64 cam",
    "timm ese_vovnet19b_dw stages 64 cam",
    "timm nf_regnet_b0 final_act 64 cam",
    "timm hrnet_w18_small final_layer 64 cam",
    "timm xception41 act 64 cam slow",
    "timm lcnet_050 blocks 64",
    "timm edgenext_xx_small stages 64",
    "timm mobilevit_xxs final_conv 64 cam",
    "timm pvt_v2_b0 stages 64 cam",
    "timm poolformer_s12 stages 64",
    "timm mambaout_femto stages 64 nhwc",
    "timm swin_tiny_patch4_window7_224 norm 64 cam nhwc",
    "timm swinv2_cr_tiny_ns_224 stages 64 cam",
    "timm maxvit_rmlp_pico_rw_256 norm 256 cam slow",
    "timm resnest14d layer4 64 cam",
    "timm inception_v4 features 160 cam slow",
)


def case(row: str) -> Any:
    library, name, layer, size, *flags = row.split()
    marks = [pytest.mark.slow] if "slow" in flags else []
    return pytest.param(library, name, layer, int(size), flags, id=f"{library}-{name}", marks=marks)


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


def theirs(net: nn.Module, layer: str, images: Tensor, layout: Any) -> Tensor:
    """Return pytorch-grad-cam's map, at the resolution of the features."""

    class Native(grad_cam.GradCAM):
        def get_cam_image(self, *args: Any) -> Any:
            self.raw = super().get_cam_image(*args)
            return self.raw

    move = (lambda a: a.permute(0, 3, 1, 2)) if layout is True else layout or None
    with Native(net, [operator.attrgetter(layer)(net)], reshape_transform=move) as method:
        method(images.clone().requires_grad_(), [operator.itemgetter(int(c)) for c in TARGET])
    return min_max(torch.from_numpy(method.raw)[:, None].relu())


@pytest.mark.parametrize(("library", "name", "layer", "size", "flags"), [*map(case, CASES)])
def test_the_map_is_pytorch_grad_cams(
    library: str, name: str, layer: str, size: int, flags: list[str]
) -> None:
    net = network(library, name, size)
    generator = torch.Generator().manual_seed(5)
    images = torch.rand(2, 3, size, size, generator=generator, dtype=torch.float64)
    expected = theirs(net, layer, images, "nhwc" in flags)
    found = GradCAM(net)
    assert expected.shape[2:].numel() > 1
    assert expected.any()
    for _ in range(2):
        torch.testing.assert_close(found(images, TARGET), expected, atol=1e-4, rtol=0)
    named = GradCAM(net, layer=layer)(images, TARGET)
    torch.testing.assert_close(named, expected, atol=1e-4, rtol=0)
    if "cam" in flags:  # Grad-CAM is the positive part of CAM
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
    expected = theirs(net, layer, images, True)
    assert expected.shape == (2, 1, 2, 2)
    found = GradCAM(net, layer=layer)(images, TARGET)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def tokens(first: int, side: int) -> Any:
    """Return pytorch-grad-cam's reshape function for tokens, of which some come first."""
    return lambda t: t[:, first:].reshape(len(t), side, side, -1).permute(0, 3, 1, 2)


# The target layer, the tokens before those of the grid and its side, the size of images, and the
# network's arguments.
SMALL = {"depth": 2, "embed_dim": 24, "num_heads": 2}
TOKENS = {
    "vit_tiny_patch16_224": ("blocks.0", 1, 4, 64, SMALL),
    "vit_small_patch14_reg4_dinov2": ("blocks.0", 5, 4, 56, SMALL),
    "deit_tiny_distilled_patch16_224": ("blocks.0", 2, 4, 64, SMALL),
    "beit_base_patch16_224": ("blocks.1", 1, 4, 64, SMALL | {"init_values": 0.1}),
    "eva02_tiny_patch14_224": ("blocks.1", 1, 4, 56, SMALL),
    "vit_base_patch16_siglip_224": ("norm", 0, 4, 64, SMALL),
    "mixer_s32_224": ("norm", 0, 2, 64, {}),
    "pit_ti_224": ("transformers.2.blocks.1", 1, 7, 224, {"depth": (1, 1, 3)}),
    "pit_ti_distilled_224": ("transformers.2.blocks.1", 2, 7, 224, {"depth": (1, 1, 3)}),
    "levit_128s": ("stages", 0, 4, 224, {}),
    "xcit_nano_12_p16_224": ("cls_attn_blocks.0", 1, 4, 64, {"depth": 2}),
    "hiera_tiny_224": ("blocks.3", 0, 7, 224, {"stages": (1, 1, 1, 1), "embed_dim": 24}),
    "efficientformer_l1": ("norm", 0, 7, 224, {}),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if row[3] == 224 else [])
        for name, row in TOKENS.items()
    ],
)
def test_the_map_of_tokens_is_pytorch_grad_cams(name: str) -> None:
    layer, first, side, size, settings = TOKENS[name]
    torch.manual_seed(0)
    sized = {"img_size": size} if size != 224 else {}
    net = timm.create_model(name, pretrained=False, num_classes=10, **settings, **sized)
    for module in net.modules():
        if isinstance(module, nn.Linear) and module.out_features == 10:
            nn.init.normal_(module.weight)
    net = net.double().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(5)
    images = torch.rand(2, 3, size, size, generator=generator, dtype=torch.float64)
    expected = theirs(net, layer, images, tokens(first, side))
    assert expected.shape == (2, 1, side, side)
    for interpreter in (found := GradCAM(net), found, GradCAM(net, layer, tokens(first, side))):
        torch.testing.assert_close(interpreter(images, TARGET), expected, atol=1e-4, rtol=0)


def test_attention_pooling_is_refused() -> None:
    net = network("timm", "resnet50_clip", 64)
    images = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    message = "feature maps .* for GradCAM, .*pass layer='stages' to use them"
    with pytest.raises(ValueError, match=message):
        GradCAM(net)(images, TARGET)
