# SPDX-License-Identifier: MIT
"""Rules of backward passes: what DeepLift adds up to, and that nothing of a rule is left behind."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import captum.attr as ca
import pytest
import torch
from conftest import TinyNet
from torch import Tensor, nn

from captum_adv2 import SoundnessWarning
from captum_adv2.interpreters import CaptumInterpreter


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    images = torch.rand(2, 3, 16, 16, generator=generator, dtype=torch.float64)
    return images.requires_grad_(), torch.tensor([0, 2])


def network(*between: nn.Module, features: int = 80) -> nn.Sequential:
    """Return a network in double precision, with weights large enough to be far from linear."""
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, 2, 1),
        *between,
        nn.Flatten(),
        nn.LazyLinear(features),
        nn.ReLU(inplace=True),
    )
    net.append(nn.Linear(features, 4)).double()
    net(torch.zeros(1, 3, 16, 16).double())
    for weight in net.parameters():
        weight.data.mul_(3)
    return net.eval()


def before_scaling(attribution: Any, x: Tensor, target: Tensor, **kwargs: Any) -> Tensor:
    """Return attributions themselves, before they become a map."""
    seen: list[Tensor] = []
    keep = CaptumInterpreter(attribution, lambda a: seen.append(a) or a[:, :1], **kwargs)
    keep.explain(x, target)
    return seen[-1]


class Reused(nn.Module):
    """One activation, which works in place, behind two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU(inplace=True)
        self.stem, self.body = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 5, 3, 2, 1)
        self.fc = nn.Linear(80, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.act(self.body(self.act(self.stem(x)))).flatten(1))


class TestDeepLift:
    @pytest.mark.parametrize(
        "build",
        [
            lambda: network(nn.ReLU()),
            lambda: network(nn.MaxPool2d(2), nn.Conv2d(4, 4, 1), nn.ELU()),
            lambda: network(nn.MaxPool2d(3, 3, 1), nn.Conv2d(4, 4, 1), nn.LeakyReLU()),
            lambda: network(nn.Flatten(2), nn.MaxPool1d(2), nn.Conv1d(4, 4, 1), nn.Sigmoid()),
            lambda: network(
                nn.Unflatten(1, (1, 4)), nn.MaxPool3d(2), nn.Conv3d(1, 4, 1), nn.Tanh()
            ),
            lambda: network(nn.Softmax(dim=1), nn.Conv2d(4, 4, 1), nn.Softplus()),
            lambda: Reused().double(),
        ],
        ids=["ReLU", "pooling", "padding", "1d", "3d", "softmax", "reused"],
    )
    def test_attributions_add_up_to_the_gain(
        self, build: Callable[[], nn.Module], pair: Any
    ) -> None:
        """On modules used twice, too, which Captum refuses, and on softmax, where its do not."""
        net, (x, target) = build(), pair

        def found(x: Tensor) -> Tensor:
            return before_scaling(ca.DeepLift(net), x, target, baselines=0.4)

        gain = (net(x) - net(torch.full_like(x, 0.4))).gather(1, target[:, None])[:, 0]
        torch.testing.assert_close(found(x).sum(dim=(1, 2, 3)), gain)
        assert torch.autograd.gradcheck(found, x, fast_mode=True)

    def test_captum_on_softmax_and_on_modules_used_twice(self, pair: Any) -> None:
        """If this fails, Captum has changed, and so must docs/captum.md."""
        x, target = pair
        net = network(nn.Softmax(dim=1))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = ca.DeepLift(net).attribute(x, target=target, baselines=0.4)
            with pytest.raises(RuntimeError, match="more than once"):
                ca.DeepLift(Reused().double()).attribute(x, target=target)
        ours = before_scaling(ca.DeepLift(net), x, target, baselines=0.4)
        assert (theirs - ours).abs().amax() > 0.01 * ours.abs().amax()

    def test_where_image_and_baseline_agree(self, pair: Any) -> None:
        net, (x, target) = TinyNet(nn.Softplus, width=3).double().eval(), pair
        x = x.detach().clone()
        x[:, :, :, :9] = 0.3
        x[1] = 0.3
        direction = torch.randn_like(x)
        attribution = ca.DeepLift(net, multiply_by_inputs=False)

        def score(x: Tensor) -> Tensor:
            found = before_scaling(attribution, x, target, baselines=0.3)
            return (found * torch.linspace(0, 1, found.numel()).view_as(found)).sum()

        x.requires_grad_()
        (gradient,) = torch.autograd.grad(score(x), x)
        assert gradient.isfinite().all()
        with torch.no_grad():
            slope = (score(x + 1e-3 * direction) - score(x - 1e-3 * direction)).item() / 2e-3
        assert slope == pytest.approx((gradient * direction).sum().item(), rel=1e-3)


def test_deconvolution_does_not_depend_on_the_image(pair: Any) -> None:
    x, _ = pair
    maps = CaptumInterpreter(ca.Deconvolution(network(nn.ReLU())))(x, torch.tensor([1, 1]))
    torch.testing.assert_close(maps[0], maps[1])


@pytest.mark.parametrize("build", [ca.GuidedBackprop, ca.DeepLift])
class TestInnerPass:
    def test_graphs_are_freed(self, build: Any, pair: Any) -> None:
        # A hook that keeps what is computed after it makes a cycle which is never collected.
        x, target = pair
        leaf = x.detach() * 1
        alive = weakref.ref(leaf)
        leaf.requires_grad_()
        maps = CaptumInterpreter(build(network(nn.ReLU()))).explain(leaf, target).maps
        torch.autograd.grad(maps.sum(), leaf)
        del leaf, maps
        gc.collect()
        assert alive() is None

    def test_a_model_that_runs_past_its_hooks(self, build: Any, pair: Any) -> None:
        class Past(Reused):
            def forward(self, x: Tensor) -> Tensor:
                features = self.act.forward(self.body(self.act.forward(self.stem(x))))
                return self.fc(features.flatten(1))

        with pytest.raises(RuntimeError, match="run the hooks of its modules, got none that ran"):
            CaptumInterpreter(build(Past().double()))(*pair)


class Functional(Reused):
    """The same, with functions in place of one of its modules, or of both."""

    def __init__(self, modules: int) -> None:
        super().__init__()
        if not modules:
            del self.act
            self.act = torch.relu

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self.act(self.stem(x)))
        return self.fc(x.relu().flatten(1))


@pytest.mark.parametrize("build", [ca.GuidedBackprop, ca.DeepLift, ca.Deconvolution])
class TestMissed:
    @pytest.mark.parametrize(
        ("modules", "met"), [(0, "no module that it is for"), (1, "1 of 2 activations")]
    )
    def test_functional_activations_are_told_once(
        self, build: Any, modules: int, met: str, pair: Any
    ) -> None:
        net = Functional(modules).double()
        tunnel = ca.NoiseTunnel(build(net))
        for each in (
            CaptumInterpreter(build(net)),
            CaptumInterpreter(tunnel, nt_samples=2, nt_samples_batch_size=1),
        ):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                first = each(*pair)
                assert torch.equal(each(*pair), first)
            (one,) = [w for w in caught if w.category is SoundnessWarning]
            assert f"the rule of {build.__name__} met {met} in the forward pass" in str(one.message)

    def test_torchscript_is_told(self, build: Any, pair: Any) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            net = nn.Sequential(torch.jit.script(Reused().double()))
        with pytest.warns(SoundnessWarning, match="met no module that it is for"):
            CaptumInterpreter(build(net))(*pair)

    def test_compiled_models_follow_the_rule(self, build: Any, pair: Any) -> None:
        net = Reused().double()
        compiled = torch.compile(net, backend="eager")
        compiled(pair[0])
        interpreter = CaptumInterpreter(build(compiled))
        try:
            maps = interpreter(*pair)
        except (RuntimeError, SoundnessWarning):  # a warning is an error here
            assert not hasattr(torch.compiler, "set_stance")  # before PyTorch 2.6 it may be refused
            return
        torch.testing.assert_close(maps, CaptumInterpreter(build(net))(*pair))


@pytest.mark.skipif(not hasattr(torch.compiler, "set_stance"), reason="needs PyTorch 2.6")
@pytest.mark.parametrize(
    "build", [ca.LayerGradCam, ca.LayerActivation, ca.GuidedGradCam, ca.LayerConductance]
)
def test_layers_of_compiled_models(build: Any, pair: Any) -> None:
    net = Reused().double()
    compiled = torch.compile(net, backend="eager")
    compiled(pair[0])
    ours, expected = (CaptumInterpreter(build(each, net.body))(*pair) for each in (compiled, net))
    torch.testing.assert_close(ours, expected)
