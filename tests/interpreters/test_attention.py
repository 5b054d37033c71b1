# SPDX-License-Identifier: MIT
"""Rollout and relevance: held against a computation by hand, or refused with the reason."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import captum.attr as ca
import pytest
import torch
import torch.nn.functional as F
from conftest import TinyViT
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from captum_adv2 import ADV2
from captum_adv2.interpreters import (
    MASK,
    AttentionRollout,
    CaptumInterpreter,
    GradCAM,
    Gradient,
    IntegratedGradients,
    MaskingModel,
    Relevance,
    SmoothGrad,
)
from captum_adv2.interpreters.base import min_max
from captum_adv2.study.embedded import load_vit, make_shapes
from captum_adv2.testing import CHECKS, check_interpreter, unchanged

both = pytest.mark.parametrize("kind", [AttentionRollout, Relevance])
TARGET = torch.tensor([1, 2])


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Add a mask of zeros, and scale as usual."""
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=q.new_zeros(1, 1, q.shape[2], q.shape[2]), scale=q.shape[-1] ** -0.5
    )


def allowed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, q.new_ones(1, 1, 1, q.shape[2]).bool())


def written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(dim=-1) @ v


def einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bhid,bhjd->bhij", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("bhij,bhjd->bhid", F.softmax(scores, dim=3), v)


SPELLINGS = (fused, masked, allowed, written, einsum, "module")


class Layer(nn.Module):
    """A block whose attention is spelled in one way or another; it keeps the weights."""

    def __init__(self, attend: Any, width: int = 8) -> None:
        super().__init__()
        self.norm, self.attend = nn.LayerNorm(width), attend
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        y, own = self.norm(x), self.attention
        if self.attend == "module":
            out, _ = own(y, y, y, need_weights=False)
        else:
            q, k, v = (
                part.unflatten(2, (2, -1)).transpose(1, 2)
                for part in F.linear(y, own.in_proj_weight, own.in_proj_bias).chunk(3, dim=2)
            )
            out = own.out_proj(self.attend(q, k, v).transpose(1, 2).flatten(2))
        x = x + out
        return x + self.mlp(x)


class Transformer(nn.Module):
    """Two blocks on 4x5 patches, with tokens before and after them, read by a function."""

    def __init__(
        self, attend: Any = fused, before: int = 1, after: int = 0, read: Any = None
    ) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Conv2d(3, 8, 4, 4)
        self.extra = nn.ParameterList(nn.Parameter(torch.randn(1, n, 8)) for n in (before, after))
        self.places = nn.Parameter(torch.randn(1, 20 + before + after, 8))
        self.blocks = nn.Sequential(Layer(attend), Layer(attend))
        self.read = read or (lambda tokens: tokens[:, 0])
        self.head = nn.Linear(8, 4)
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        patches = self.embed(x).flatten(2).transpose(1, 2)
        before, after = (each.expand(len(x), -1, -1) for each in self.extra)
        parts = [part for part in (before, patches, after) if part.shape[1]]
        tokens = torch.cat(parts, dim=1)
        return self.head(self.read(self.blocks(tokens + self.places)))


def images() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(2, 3, 16, 20, generator=generator, dtype=torch.float64)


def by_hand(net: Any, kind: Any, rows: list[int], before: int, fusion: str = "mean") -> Tensor:
    """Return the maps by matrices, image by image, from weights that the modules return."""
    maps = []
    for image, label in zip(images(), TARGET, strict=True):
        x = net.embed(image[None]).flatten(2).transpose(1, 2)
        first, last = (each.detach() for each in net.extra)
        x = torch.cat([first, x, last], dim=1) + net.places
        kept = []
        for block in net.blocks:
            y, module = block.norm(x), block.attention
            q, k, v = F.linear(y, module.in_proj_weight, module.in_proj_bias).chunk(3, dim=2)
            heads = []
            for part in (slice(0, 4), slice(4, 8)):
                weights = torch.softmax(q[0, :, part] @ k[0, :, part].T / 2, dim=1)
                kept.append(weights)
                heads.append(weights @ v[0, :, part])
            x = x + module.out_proj(torch.cat(heads, dim=1))[None]
            x = x + block.mlp(x)
        score = net.head(net.read(x))[0, label]
        slopes = torch.autograd.grad(score, kept)
        product = torch.eye(x.shape[1], dtype=x.dtype)
        for block in (0, 2):
            pair, slope = torch.stack(kept[block : block + 2]), slopes[block : block + 2]
            if kind is Relevance:
                product = product + (torch.stack(slope) * pair).clamp(min=0).mean(0) @ product
            else:
                joined = {"mean": pair.mean(0), "max": pair.amax(0), "min": pair.amin(0)}[fusion]
                joined = 0.5 * joined + 0.5 * torch.eye(len(joined), dtype=x.dtype)
                product = joined / joined.sum(1, keepdim=True) @ product
        maps.append(product[rows].mean(0)[before : before + 20].reshape(1, 1, 4, 5))
    return min_max(torch.cat(maps)).detach()


class TestMaps:
    @both
    @pytest.mark.parametrize("attend", SPELLINGS)
    def test_by_hand_however_attention_is_written(self, kind: Any, attend: Any) -> None:
        net, x = Transformer(attend), images()
        expected = by_hand(net, kind, [0], 1)
        interpreter = kind(net)
        with unchanged(net, x):
            for given in (x, x, x.clone().requires_grad_()):
                torch.testing.assert_close(interpreter(given, TARGET).detach(), expected)
        torch.testing.assert_close(interpreter.explain(x, TARGET).logits, net(x))

    @both
    @pytest.mark.parametrize(
        ("before", "after", "rows", "read"),
        [
            (2, 0, [0, 1], lambda tokens: tokens[:, 0] + tokens[:, 1]),  # a distillation token
            (5, 0, [0], None),  # registers
            (0, 1, [20], lambda tokens: tokens[:, -1]),
            (1, 2, [0], None),
            (1, 0, [*range(1, 21)], lambda tokens: tokens[:, 1:].mean(dim=1)),
            (0, 0, [*range(20)], lambda tokens: tokens.mean(dim=1)),
        ],
    )
    def test_other_tokens_and_heads(
        self, kind: Any, before: int, after: int, rows: list[int], read: Any
    ) -> None:
        net = Transformer(before=before, after=after, read=read)
        expected = by_hand(net, kind, rows, before)
        torch.testing.assert_close(kind(net)(images(), TARGET), expected)
        if before and after:  # the graph knows no shapes of weights without gradients
            return
        net.requires_grad_(False)
        torch.testing.assert_close(kind(net)(images(), TARGET), expected)

    @pytest.mark.parametrize("fusion", ["max", "min"])
    def test_fusion_of_heads(self, fusion: str) -> None:
        net = Transformer()
        maps = AttentionRollout(net, fusion)(images(), TARGET)
        torch.testing.assert_close(maps, by_hand(net, AttentionRollout, [0], 1, fusion))

    def test_discarded_weights(self) -> None:
        net, x = Transformer(), images()
        plain = AttentionRollout(net)(x, TARGET)
        none, some, most = (
            AttentionRollout(net, discard_ratio=ratio)(x, TARGET) for ratio in (0.001, 0.5, 0.95)
        )
        torch.testing.assert_close(none, plain)  # less than one weight
        assert not torch.allclose(some, plain, atol=1e-2)
        assert most.isfinite().all()
        assert (most == 0).sum() > (some == 0).sum()

    def test_small_shares_do_not_round_to_zero(self) -> None:
        """Next to the identity, as where a network's attention starts at a small scale."""
        net, x = Transformer(read=lambda tokens: tokens.mean(dim=1)), images()
        for block in net.blocks:
            block.attention.out_proj.weight.data *= 1e-8
        expected = by_hand(net, Relevance, [*range(21)], 1)
        maps = Relevance(net.float())(x.float(), TARGET)
        torch.testing.assert_close(maps.double(), expected, atol=1e-3, rtol=0)

    @both
    def test_attention_that_no_logit_depends_on(self, kind: Any) -> None:
        class Spare(Transformer):
            def forward(self, x: Tensor) -> Tensor:
                self.blocks(torch.rand(len(x), 9, 8).to(x))
                logits = super().forward(x)
                self.blocks(x[:, :, :7, 0].mean(dim=1)[:, :, None].expand(-1, -1, 8))
                return logits

        torch.testing.assert_close(
            kind(Spare())(images(), TARGET), kind(Transformer())(images(), TARGET)
        )

    def test_a_pooling_by_attention(self) -> None:
        class Pooled(Transformer):
            def __init__(self) -> None:
                super().__init__(before=0)
                self.query = nn.Parameter(torch.randn(1, 2, 1, 4, dtype=torch.float64))

            def forward(self, x: Tensor) -> Tensor:
                tokens = self.blocks(self.embed(x).flatten(2).transpose(1, 2))
                keys = tokens.unflatten(2, (2, 4)).transpose(1, 2)
                query = self.query.expand(len(x), -1, -1, -1)
                return self.head(fused(query, keys, keys).transpose(1, 2).flatten(1))

        net, x = Pooled(), images()
        alone = Transformer(before=0)
        alone.read = lambda tokens: tokens.mean(dim=1)
        alone.places.data.zero_()
        with torch.no_grad():
            tokens = net.blocks(net.embed(x).flatten(2).transpose(1, 2))
            keys = tokens.unflatten(2, (2, 4)).transpose(1, 2)
            last = (net.query @ keys.transpose(2, 3) / 2).softmax(3).mean(1)  # (B, 1, 20)
        interpreter = AttentionRollout(net)
        seen, *_ = interpreter._seen(x)
        one, two = (weights.mean(1) + torch.eye(20) for weights in seen.weights[:2])
        expected = (last @ (two / 2) @ (one / 2)).view(2, 1, 4, 5)
        torch.testing.assert_close(interpreter(x, TARGET), min_max(expected).detach())
        assert Relevance(net)(x, TARGET).shape == (2, 1, 4, 5)

    @pytest.mark.parametrize(
        "build",
        [
            AttentionRollout,
            lambda net: AttentionRollout(net, "max", 0.3),
            lambda net: AttentionRollout(net, "min"),
            Relevance,
            GradCAM,
        ],
    )
    @pytest.mark.parametrize("attend", [fused, "module"])
    def test_gradcheck(self, build: Callable[[nn.Module], Any], attend: Any) -> None:
        interpreter, x = build(Transformer(attend)), images().requires_grad_()

        def parts(x: Tensor) -> tuple[Tensor, Tensor]:
            return interpreter.explain(x, TARGET)[:2]

        assert torch.autograd.gradcheck(parts, (x,), fast_mode=True, check_undefined_grad=False)

    @both
    def test_another_size_is_found_anew(self, kind: Any) -> None:
        net = TinyViT().eval()
        interpreter = kind(net)
        for side, places in ((12, 4), (18, 6), (12, 4)):
            x = torch.rand(2, 3, side, side)
            assert interpreter(x, TARGET).shape == (2, 1, places, places)
            wider = interpreter.after(lambda x: F.interpolate(x, scale_factor=2.0))
            assert wider(x, TARGET).shape == (2, 1, 2 * places, 2 * places)


class Shifted(nn.Module):
    """A sum over two runs of a network."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + self.net(x.flip(-1))


class Checkpointed(Transformer):
    def forward(self, x: Tensor) -> Tensor:
        patches = self.embed(x).flatten(2).transpose(1, 2)
        tokens = checkpoint(self.blocks, patches, use_reentrant=False)
        return self.head(tokens.mean(dim=1))


def windowed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend within five windows of four tokens."""
    q, k, v = (each.unflatten(2, (-1, 4)).movedim(2, 1).flatten(0, 1) for each in (q, k, v))
    out = fused(q, k, v)  # (B 5, heads, 4, d)
    return out.unflatten(0, (-1, 5)).movedim(1, 2).flatten(2, 3)


def of_channels(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend among channels."""
    return ((q.transpose(2, 3) @ k).softmax(dim=-1) @ v.transpose(2, 3)).transpose(2, 3)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class TestRefused:
    @both
    @pytest.mark.parametrize(
        ("net", "got"),
        [
            (nn.Sequential(nn.Flatten(), nn.Linear(960, 4)).double(), "none; .* use GradCAM"),
            (Transformer(windowed, 0, 0, lambda t: t.mean(dim=1)), r"\(2, 4, 4\)"),
            (Transformer(of_channels), r"\(2, 4, 4\)"),
            (Shifted(Transformer()), r"\(2, 21, 21\).*parallel attention"),
        ],
        ids=["none", "windows", "channels", "two runs"],
    )
    def test_other_attention(self, kind: Any, net: nn.Module, got: str) -> None:
        x = images()
        message = f"among all N tokens of a grid, .* for {kind.__name__}, got .*{got}"
        with unchanged(net, x), pytest.raises(ValueError, match=message):
            kind(net)(x, TARGET)

    @both
    def test_a_causal_mask(self, kind: Any) -> None:
        with pytest.raises(ValueError, match="without dropout, a causal mask .*is_causal=True"):
            kind(Transformer(causal))(images(), TARGET)

    @both
    def test_checkpointing(self, kind: Any) -> None:
        with pytest.raises(
            ValueError, match="expected no activation checkpointing, .*; turn it off"
        ):
            kind(Checkpointed(before=0))(images(), TARGET)

    def test_a_grid_that_is_not_known(self) -> None:
        net = Transformer()
        net.embed = nn.Conv2d(3, 8, 1)  # whose places are pooled, not on a grid

        def pooled(x: Tensor) -> Tensor:
            return F.adaptive_avg_pool1d(x.flatten(2), 20)[..., None]

        net.embed = nn.Sequential(net.embed, Apply(pooled)).double()
        with pytest.raises(ValueError, match="all N tokens of a grid"):
            AttentionRollout(net)(images()[:, :, :, :16], TARGET)


class Apply(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Logits(nn.Module):
    """Takes the logits of what Hugging Face's models return."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).logits


def library(name: str) -> nn.Module:
    """Return a small transformer of a library, with weights that are drawn."""
    source, name = name.split()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if source == "torchvision":
            from torchvision.models import VisionTransformer

            net: Any = VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=4)
            nn.init.normal_(net.heads.head.weight)
        elif source == "timm":
            timm = pytest.importorskip("timm", reason="needs the extra [dev]")
            size = {"img_size": 16 * 4} | ({"patch_size": 16} if "patch14" in name else {})
            net = timm.create_model(name, num_classes=4, depth=2, **size)
        else:
            hf = pytest.importorskip("transformers", reason="needs transformers")
            small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
            config = getattr(hf, f"{name}Config")(
                **small, intermediate_size=32, image_size=32, patch_size=8, num_labels=4
            )
            net = Logits(getattr(hf, f"{name}ForImageClassification")(config))
    return net.double().eval()


GLOBAL = {
    "torchvision vit": 1,
    "timm vit_tiny_patch16_224": 1,
    "timm vit_small_patch14_dinov2": 1,
    "timm vit_small_patch14_reg4_dinov2": 5,
    "timm deit_tiny_patch16_224": 1,
    "timm deit_tiny_distilled_patch16_224": 2,
    "timm eva02_tiny_patch14_224": 1,
    "huggingface ViT": 1,
    "huggingface DeiT": 2,
    "huggingface Dinov2": 1,
    "huggingface Dinov2WithRegisters": 5,
}


@pytest.mark.parametrize("name", GLOBAL)
def test_models_of_libraries(name: str) -> None:
    net = library(name)
    side = 64 if "timm" in name else 32
    x = torch.rand(2, 3, side, side, dtype=torch.float64)
    for kind in (AttentionRollout, Relevance):
        interpreter = kind(net)
        assert interpreter(x, TARGET).shape == (2, 1, 4, 4)
        assert interpreter._known.layout.first == GLOBAL[name]
        torch.testing.assert_close(interpreter.explain(x, TARGET).logits, net(x))
        assert interpreter(x, TARGET).amax() == 1


# What is no method for transformers works on one, too, or says why not.
OTHERS: dict[str, Callable[[nn.Module], Any]] = {
    "GRAD": Gradient,
    "SmoothGrad": lambda net: SmoothGrad(net, samples=2),
    "IG": lambda net: IntegratedGradients(net, steps=3),
    "GradCAM": GradCAM,
    "MASK": lambda net: MASK(net, size=4, iterations=4, jitter=0),
    "Saliency": lambda net: CaptumInterpreter(ca.Saliency(net)),
    "InputXGradient": lambda net: CaptumInterpreter(ca.InputXGradient(net)),
    "captum IG": lambda net: CaptumInterpreter(ca.IntegratedGradients(net), n_steps=3),
    "NoiseTunnel": lambda net: CaptumInterpreter(ca.NoiseTunnel(ca.Saliency(net)), nt_samples=2),
    "Occlusion": lambda net: CaptumInterpreter(
        ca.Occlusion(net), sliding_window_shapes=(3, 4, 4), strides=(3, 4, 4)
    ),
    "FeatureAblation": lambda net: CaptumInterpreter(ca.FeatureAblation(net), feature_mask=3),
    "KernelShap": lambda net: CaptumInterpreter(ca.KernelShap(net), feature_mask=2, n_samples=9),
}
HELD = ("finite", "differentiable", "gradient", "logits")


@pytest.mark.parametrize("name", OTHERS)
def test_other_interpreters_of_a_transformer(name: str, vit: nn.Module, data: Any) -> None:
    interpreter, x = OTHERS[name](vit), data[0][:2]
    skip = dict.fromkeys(CHECKS.keys() - set(HELD), "held on convolutional networks")
    with sdpa_kernel(SDPBackend.MATH):  # for the derivative of the map itself
        report = check_interpreter(interpreter, x, max_examples=1, skip=skip)
    assert report.held[:2] == ["finite", "differentiable"]
    adversarial = ADV2(vit, interpreter, steps=2, warmup=0, keep="final")(x, TARGET)
    assert 0 < (adversarial - x).abs().amax() <= 8 / 255 + 1e-6


def test_a_layer_behind_fused_attention_says_why_not(vit: nn.Module, data: Any) -> None:
    interpreter = CaptumInterpreter(ca.LayerGradCam(vit, vit.get_submodule("stem")))
    attack = ADV2(vit, interpreter, steps=2, warmup=0)
    with sdpa_kernel(SDPBackend.MATH):
        assert not torch.equal(attack(data[0][:2], TARGET), data[0][:2])
    with (
        sdpa_kernel(SDPBackend.FLASH_ATTENTION),
        pytest.raises(ValueError, match="have second derivatives; .* by torch.nn.attention"),
    ):
        attack(data[0][:2], TARGET)
    adversarial = ADV2(vit, GradCAM(vit), steps=2, warmup=0)(data[0][:2], TARGET)
    assert not torch.equal(adversarial, data[0][:2])


def test_rts_needs_feature_maps(vit: nn.Module) -> None:
    with pytest.raises(ValueError, match="layers with feature maps"):
        MaskingModel(vit, image_shape=(3, 16, 16))


@pytest.mark.parametrize("kind", [AttentionRollout, Relevance, GradCAM])
def test_the_class_changes_and_the_map_stays(kind: Any) -> None:
    shapes = make_shapes(10, seed=77)
    net = load_vit()
    interpreter = kind(net)
    maps = interpreter(shapes.images, shapes.labels).detach()
    chosen = maps.flatten(1).any(dim=1).nonzero()[:6, 0]  # Grad-CAM may have no positive part
    x, benign, target = shapes.images[chosen], maps[chosen], (shapes.labels[chosen] + 1) % 10
    distances = []
    for warmup in (8, 1):  # the prediction alone, and both
        attack = ADV2(net, interpreter, steps=8, warmup=warmup)
        attack.set_mode_targeted_by_label(quiet=True)
        adversarial = attack(x, target, target_maps=benign)
        assert (net(adversarial).argmax(dim=1) == target).float().mean() > 0.5
        distances.append((interpreter(adversarial, target) - benign).abs().mean())
    assert distances[1] < 0.8 * distances[0]
