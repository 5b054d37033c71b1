# SPDX-License-Identifier: MIT
"""Where feature maps are: found in the graph of the pass, however it is written, or refused."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import TinyNet
from kinds import Around
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from captum_adv2 import ADV2, SoundnessWarning
from captum_adv2.interpreters import CAM, GradCAM, MaskingModel
from captum_adv2.interpreters.base import min_max
from captum_adv2.testing import unchanged

both = pytest.mark.parametrize("kind", [CAM, GradCAM])
TARGET = torch.tensor([0, 2])


class Net(nn.Module):
    """Three convolutions, ReLUs and a stem's pooling; the head is a function of net and maps."""

    def __init__(self, head: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 3)  # registered before the convolutions
        self.score = nn.Conv2d(8, 3, 1)
        self.attend = nn.Linear(8, 24)
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        self.body = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU())
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self, self.body(self.stem(x)))


def network(head: Callable[[Any, Tensor], Tensor]) -> Net:
    torch.manual_seed(0)
    return Net(head).double().eval()


def images(height: int = 16, width: int = 20) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(2, 3, height, width, generator=generator, dtype=torch.float64)


def by_hand(net: Net, x: Tensor) -> Tensor:
    """Return Grad-CAM's map from the head alone."""
    maps = net.body(net.stem(x)).detach().requires_grad_()
    score = net.head(net, maps).gather(1, TARGET[:, None]).sum()
    (gradient,) = torch.autograd.grad(score, maps)
    return min_max((maps * gradient.mean((2, 3), keepdim=True)).sum(1, True).relu()).detach()


def attention(net: Any, maps: Tensor) -> Tensor:
    """Pool by attention, as CLIP's ResNets do."""
    tokens = maps.flatten(2).transpose(1, 2)
    tokens = torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1)
    q, k, v = net.attend(tokens).chunk(3, dim=-1)
    return net.fc(F.scaled_dot_product_attention(q, k, v)[:, 0])


def bottleneck(net: Any, maps: Tensor) -> Tensor:
    pooled = F.adaptive_avg_pool2d(maps, 1)
    return net.score(F.hardswish(F.conv2d(pooled, net.score.weight.new_ones(8, 8, 1, 1)))).flatten(
        1
    )


LINEAR = {
    "mean": lambda net, maps: net.fc(maps.mean(dim=(2, 3))),
    "flatten, mean": lambda net, maps: net.fc(maps.flatten(2).mean(-1)),
    "view, sum": lambda net, maps: net.fc(maps.view(2, 8, -1).sum(-1) / maps[0, 0].numel()),
    "einsum": lambda net, maps: net.fc(torch.einsum("bkhw->bk", maps) / maps[0, 0].numel()),
    "channels last": lambda net, maps: net.fc(maps.movedim(1, -1).mean(dim=(1, 2))),
    "a convolution after pooling": lambda net, maps: net.score(
        F.adaptive_avg_pool2d(maps, 1)
    ).flatten(1),
    "an auxiliary layer is unused": lambda net, maps: (
        net.attend(maps.mean(dim=(2, 3))),
        net.fc(maps.mean(dim=(2, 3))),
    )[1],
}
OTHER = {
    "weights by einsum": lambda net, maps: (
        torch.einsum("bk,ck->bc", maps.mean(dim=(2, 3)), net.fc.weight) + net.fc.bias
    ),
    "max": lambda net, maps: net.fc(maps.amax(dim=(2, 3))),
    "average and max": lambda net, maps: net.fc(
        F.adaptive_avg_pool2d(maps, 1).flatten(1) + F.adaptive_max_pool2d(maps, 1).flatten(1)
    ),
    "two poolings": lambda net, maps: net.fc(
        F.adaptive_avg_pool2d(F.max_pool2d(maps, 2), 1).flatten(1)
    ),
    "two layers after pooling": bottleneck,
    "flattened": lambda net, maps: net.fc(
        F.linear(maps.flatten(1), maps.new_ones(8, maps[0].numel()).cumsum(1).cos())
    ),
}


class TestFound:
    @pytest.mark.parametrize("name", LINEAR | OTHER)
    def test_however_it_is_written(self, name: str) -> None:
        net, x = network((LINEAR | OTHER)[name]), images()
        expected = by_hand(net, x)
        assert expected.shape == (2, 1, 8, 10)
        interpreter = GradCAM(net)
        for given in (x, x, images(24, 16), x.requires_grad_()):  # another size is found anew
            maps = interpreter(given, TARGET)
            torch.testing.assert_close(maps.detach(), by_hand(net, given))
        if name in LINEAR:
            features = net.body(net.stem(x))
            head = net.score if "convolution" in name else net.fc
            weights = head.weight.flatten(1)[TARGET][:, :, None, None]
            raw = min_max((features * weights).sum(1, True))
            for _ in range(2):
                torch.testing.assert_close(CAM(net)(x, TARGET), raw)

    def test_under_checkpointing(self) -> None:
        net = network(LINEAR["mean"])
        plain = copy.deepcopy(net)
        net.body = Around(net.body, partial(checkpoint, use_reentrant=False))
        x = images().requires_grad_()
        for kind in (CAM, GradCAM):
            torch.testing.assert_close(kind(net)(x, TARGET), kind(plain)(x, TARGET))

    def test_the_first_call_leaves_all_as_it_was(self) -> None:
        net, x = network(LINEAR["mean"]), images()
        for kind in (CAM, GradCAM):
            with unchanged(net, x), torch.no_grad():
                assert not kind(net).explain(x, TARGET).maps.requires_grad

    @both
    def test_it_is_found_once_in_an_attack(self, kind: Any, monkeypatch: Any) -> None:
        found, passes, once = [], [], kind._found
        monkeypatch.setattr(kind, "_found", lambda *args: found.append(1) or once(*args))
        net = network(LINEAR["mean"])
        net.register_forward_hook(lambda *_: passes.append(1))
        kind(net)(images(), TARGET)
        assert len(passes) == 1  # in a pass that is needed anyway
        found.clear()
        attack = ADV2(net, kind(net), steps=6, warmup=1)
        attack.set_mode_targeted_by_label(quiet=True)
        attack(images(), (TARGET + 1) % 3)
        assert len(found) == 1

    @both
    def test_a_head_that_is_replaced(self, kind: Any) -> None:
        net, x = network(LINEAR["mean"]), images()
        interpreter = kind(net)
        before = interpreter(x, TARGET)
        net.fc = nn.Linear(8, 3).double()
        after = interpreter(x, TARGET)
        torch.testing.assert_close(after, kind(net)(x, TARGET))
        assert not torch.allclose(after, before)

    def test_features_of_one_pixel_have_no_places(self) -> None:
        net, x = network(LINEAR["mean"]), images(2, 2)
        assert GradCAM(net)(x, TARGET).shape == (2, 1, 2, 2)  # the last maps that have places
        with pytest.raises(ValueError, match="the head's inputs, for CAM, got 4; pass the layer"):
            CAM(net)(x, TARGET)
        with pytest.raises(
            ValueError, match=r"feature maps .* got one pixel, \(2, 8, 1, 1\); pass"
        ):
            GradCAM(net, layer="body")(x, TARGET)


def transformer() -> Any:
    """Return torchvision's vision transformer with two blocks on 4x4 patches."""
    from torchvision.models import VisionTransformer

    torch.manual_seed(0)
    net = VisionTransformer(16, 4, 2, 2, 8, 16, num_classes=3)
    nn.init.normal_(net.heads.head.weight)  # torchvision starts with zeros
    return net.double().eval()


def reshaped(tokens: Tensor) -> Tensor:
    return tokens[:, 1:].transpose(1, 2).unflatten(2, (4, 4))


class TestTokens:
    LAYER = "encoder.layers.encoder_layer_0"

    @pytest.mark.parametrize("frozen", [False, True])
    def test_the_input_of_the_last_block(self, frozen: bool) -> None:
        net, x = transformer().requires_grad_(not frozen), images(16, 16)
        found = GradCAM(net)
        expected = GradCAM(net, self.LAYER, reshaped)(x, TARGET)
        assert expected.shape == (2, 1, 4, 4)
        for interpreter in (found, found, GradCAM(net, self.LAYER)):
            torch.testing.assert_close(interpreter(x, TARGET), expected)
        x.requires_grad_()
        assert torch.autograd.gradcheck(
            lambda x: found(x, TARGET), (x,), fast_mode=True, check_undefined_grad=False
        )

    def test_reshape(self) -> None:
        net, x = transformer(), images(16, 16)
        with pytest.raises(ValueError, match="expected a layer for reshape, got none; pass layer="):
            GradCAM(net, reshape=reshaped)
        with pytest.raises(ValueError, match=r"got shape \(2, 17, 8\); see the function given as"):
            GradCAM(net, self.LAYER, lambda tokens: tokens)(x, TARGET)
        with pytest.raises(TypeError, match="reshape to be a function, got int"):
            GradCAM(net, self.LAYER, 3)  # type: ignore[arg-type]

    def test_averaged_tokens(self) -> None:
        class Averaged(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net, self.fc = transformer(), nn.Linear(8, 3).double()

            def forward(self, x: Tensor) -> Tensor:
                tokens = self.net.conv_proj(x).flatten(2).transpose(1, 2)
                self.tokens = self.net.encoder.layers(tokens)
                return self.fc(self.tokens.mean(dim=1))

        net, x = Averaged().eval(), images()
        for _ in range(2):  # found, and read again
            maps = CAM(net)(x, TARGET)
            raw = (net.tokens * net.fc.weight[TARGET][:, None]).sum(-1).view(2, 1, 4, 5)
            torch.testing.assert_close(maps, min_max(raw))
            torch.testing.assert_close(GradCAM(net)(x, TARGET), min_max(raw.relu()))

    def test_channels_are_no_places(self) -> None:
        """Two tokens of 16 channels are no grid of 4x4 places."""

        class Distilled(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first = nn.Parameter(torch.randn(1, 2, 16))
                self.embed = nn.Conv2d(3, 16, 4, 4)
                self.mix, self.fc = nn.Linear(22, 22), nn.Linear(32, 3)

            def forward(self, x: Tensor) -> Tensor:
                patches = self.embed(x).flatten(2).transpose(1, 2)
                tokens = torch.cat([self.first.expand(len(x), -1, -1), patches], dim=1)
                self.tokens = tokens.tanh()
                mixed = self.mix(self.tokens.transpose(1, 2)).tanh().transpose(1, 2)
                return self.fc(mixed[:, :2].tanh().flatten(1))

        net, x = Distilled().double().eval(), images()
        maps = GradCAM(net)(x, TARGET)
        scores = net(x).gather(1, TARGET[:, None]).sum()
        (slope,) = torch.autograd.grad(scores, net.tokens)
        patches, weights = net.tokens[:, 2:], slope[:, 2:].mean(dim=1, keepdim=True)
        raw = (patches * weights).sum(dim=2).view(2, 1, 4, 5)
        torch.testing.assert_close(maps, min_max(raw.relu()).detach())

    @pytest.mark.parametrize("layer", [None, LAYER])
    def test_a_head_of_zeros(self, layer: str | None) -> None:
        net = transformer()
        nn.init.zeros_(net.heads.head.weight)
        with pytest.raises(ValueError, match="got a gradient of zero; load or train weights"):
            GradCAM(net, layer)(images(16, 16), TARGET)


class TestRefused:
    @both
    def test_attention_pooling_names_the_layer(self, kind: Any) -> None:
        net, x = network(attention), images()
        net.body.append(nn.Sequential(*(nn.Conv2d(8, 8, 1).double() for _ in range(12))))
        message = r"got shape \(2, 8, 8, 10\), which are mixed .*; pass layer='body' to use them"
        with unchanged(net, x), pytest.raises(ValueError, match=message):
            kind(net)(x, TARGET)
        assert GradCAM(net, layer="body")(x, TARGET).shape == (2, 1, 8, 10)

    @both
    @pytest.mark.parametrize("reverse", [False, True])
    def test_two_networks(self, kind: Any, reverse: bool) -> None:
        nets = [network(LINEAR["mean"]), network(OTHER["max"])][:: -1 if reverse else 1]
        mean = Around(nn.ModuleList(nets), lambda nets, x: (nets[0](x) + nets[1](x)) / 2)
        message = r"for (CAM, got none; .* logits of one head|GradCAM, got none; .*Gradient)"
        with pytest.raises(ValueError, match=message):
            kind(mean)(images(), TARGET)

    @pytest.mark.parametrize("frozen", [False, True])
    @pytest.mark.parametrize("fused", [False, True])
    def test_latent_tokens_lie_on_no_grid(self, fused: bool, frozen: bool) -> None:
        """Sixteen learned queries are no 4x4 places, though all matter and are averaged."""

        class Latent(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.embed, self.fc = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 3)
                self.queries = nn.Parameter(torch.randn(1, 16, 8))
                self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

            def forward(self, x: Tensor) -> Tensor:
                patches = self.embed(x).flatten(2).transpose(1, 2)
                latent = self.queries.expand(len(x), -1, -1)
                for keys in (patches, latent):
                    out, _ = self.attention(latent, keys, keys, need_weights=not fused)
                    latent = latent + out
                return self.fc(latent.mean(dim=1))

        net = Latent().double().eval().requires_grad_(not frozen)
        for kind in (CAM, GradCAM):
            with pytest.raises(ValueError, match="expected feature maps .*, got none; pass layer="):
                kind(net)(images(16, 16), TARGET)

    def test_small_logits_are_verified(self) -> None:
        net = transformer()
        for weight in net.heads.parameters():
            weight.data *= 1e-4
        with pytest.raises(ValueError, match="got other logits than these give"):
            CAM(net)(images(16, 16), TARGET)

    def test_tokens_that_the_logits_do_not_read(self) -> None:
        net, x = transformer(), images(16, 16)
        message = r"got shape \(2, 17, 8\) of unknown layout; pass an earlier layer, .*reshape="
        with pytest.raises(ValueError, match=message):
            GradCAM(net, layer="encoder.ln")(x, TARGET)
        with pytest.raises(ValueError, match="linear layer on its last feature maps for CAM"):
            CAM(net)(x, TARGET)

    def test_tokens_on_no_grid(self) -> None:
        class Pooled(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.mix, self.fc = nn.Linear(8, 8), nn.Linear(8, 3)

            def forward(self, x: Tensor) -> Tensor:
                tokens = F.adaptive_avg_pool1d(x.flatten(2), 8 * 7).view(len(x), -1, 8)
                return self.fc(self.mix(tokens).tanh().mean(dim=1))  # of 21 tokens

        with pytest.raises(ValueError, match="for GradCAM, got none; pass layer="):
            GradCAM(Pooled().double())(images(), TARGET)

    @both
    @pytest.mark.parametrize("how", ["detach", "no_grad"])
    def test_logits_without_a_gradient(self, kind: Any, how: str) -> None:
        net = network(lambda net, maps: net.fc(maps.detach().mean(dim=(2, 3))))
        if how == "no_grad":
            net.forward = torch.no_grad()(net.forward)
        with pytest.raises(ValueError, match="logits that depend differentiably on the images"):
            kind(net)(images(), TARGET)


class Hybrid(nn.Module):
    """Maps whose channels are last, mixed along windows, so that no convolution says so."""

    def __init__(self, sides: tuple[int, int], width: int) -> None:
        super().__init__()
        self.sides, self.width = sides, width
        self.mix = nn.Linear(3 * 16, sides[0] * sides[1] // 4 * width)
        self.last, self.norm = nn.Identity(), nn.Identity()
        self.fc = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        h, w = self.sides
        x = F.interpolate(x, (8, 8)).unfold(2, 4, 4).unfold(3, 4, 4)
        maps = self.mix(x.permute(0, 2, 3, 1, 4, 5).flatten(3))
        maps = self.last(maps.reshape(len(x), h, w, self.width))
        return self.fc(self.norm(maps.tanh()).mean(dim=(1, 2)))


class TestLayout:
    @pytest.mark.parametrize("layer", [None, "norm", "last"])
    def test_channels_last(self, layer: str | None) -> None:
        torch.manual_seed(0)
        net, x = Hybrid((4, 6), 5).double().eval(), images(8, 12)
        seen: list[Tensor] = []
        module = net.last if layer == "last" else net.norm
        with module.register_forward_hook(lambda *args: seen.append(args[2])):
            logits = net(x.requires_grad_())
        (gradient,) = torch.autograd.grad(logits.gather(1, TARGET[:, None]).sum(), seen[0])
        raw = (seen[0] * gradient.mean((1, 2), keepdim=True)).sum(-1)[:, None]
        for _ in range(2):
            maps = GradCAM(net, layer=layer)(x, TARGET)
            torch.testing.assert_close(maps, min_max(raw.detach().relu()))
        if layer != "last":
            cam = CAM(net, layer=layer)(x, TARGET)
            expected = (seen[0] * net.fc.weight[TARGET][:, None, None]).sum(-1)[:, None]
            torch.testing.assert_close(cam, min_max(expected))

    def test_what_cannot_be_known_is_refused(self) -> None:
        net, x = Hybrid((4, 4), 4).double().eval(), images(8, 8)
        assert GradCAM(net)(x, TARGET).shape == (2, 1, 4, 4)  # by the pooling
        with pytest.raises(ValueError, match=r"got shape \(2, 4, 4, 4\) of unknown layout; pass"):
            GradCAM(net, layer="last")(x, TARGET)

    def test_rts_takes_no_channels_last(self) -> None:
        from torchvision.models import SwinTransformer

        torch.manual_seed(0)
        swin = SwinTransformer([2, 2], 8, [1, 1, 1], [2, 2, 2], [2, 2], num_classes=3).eval()
        rts = MaskingModel(swin, image_shape=(3, 16, 16))
        assert rts.layers == ("permute", "features.0.0")  # all others have channels last
        assert rts.selector.weight.shape[1] == 32
        with pytest.raises(ValueError, match=r"feature maps \(B, K, h, w\), at two scales"):
            MaskingModel(swin, layers=["features.4", "features.2"], image_shape=(3, 16, 16))


def test_a_layer_that_runs_twice_is_told() -> None:
    net = network(LINEAR["mean"])
    net.body = nn.Sequential(net.body[0], net.body[1], nn.Conv2d(8, 8, 1).double(), net.body[1])
    interpreter, x = GradCAM(net, layer="body.1"), images()
    with pytest.warns(SoundnessWarning, match="runs 2 times in a forward pass: its last output"):
        maps = interpreter(x, TARGET)
    torch.testing.assert_close(maps, by_hand(net, x))
    torch.testing.assert_close(interpreter(x, TARGET), maps)  # told once


@pytest.mark.skipif(not hasattr(torch.compiler, "set_stance"), reason="needs PyTorch 2.6")
@both
@pytest.mark.parametrize("layer", [None, "_orig_mod.body"])
def test_compiled(kind: Any, layer: str | None, model: nn.Module, data: Any) -> None:
    compiled = torch.compile(model, backend="eager")
    compiled(data[0])
    for _ in range(2):
        torch.testing.assert_close(kind(compiled, layer)(*data), kind(model)(*data))


@both
@pytest.mark.parametrize("how", ["script", "trace"])
def test_torchscript_is_refused(kind: Any, how: str, data: Any) -> None:
    net, images = TinyNet().eval(), data[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = torch.jit.script(net) if how == "script" else torch.jit.trace(net, images)
        made = nn.Sequential(made)  # to TorchScript itself PyTorch adds no hooks
        for _ in range(4):  # until it is optimised
            made(images)
            with pytest.raises(ValueError, match=r"for (Grad)?CAM, got none; .*Grad"):
                kind(made)(*data)


def test_exported(model: nn.Module, data: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(model, (data[0],)).module()
        exported.train = exported.eval = lambda mode=True: exported  # PyTorch has none of it
        torch.testing.assert_close(
            GradCAM(exported).explain(*data).maps, GradCAM(model).explain(*data).maps
        )
