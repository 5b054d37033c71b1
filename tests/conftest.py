# SPDX-License-Identifier: MIT
"""Fixtures: a small trained network, its data, and the tables that drive the conformance tests."""

from __future__ import annotations

import copy
import functools
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import captum.attr as ca
import matplotlib as mpl
import pytest
import torch
from captum._utils.models.linear_model import SkLearnRidge
from hypothesis import HealthCheck, Phase, settings
from matplotlib.figure import Figure
from torch import Tensor, nn

from captum_adv2 import ADV2, BitDepthADV2, QueryADV2, StADV2, TransferADV2
from captum_adv2.attacks import SignDescent, TwoPhase
from captum_adv2.attacks.base import CarefulAttack
from captum_adv2.interpreters import (
    CAM,
    MASK,
    RTS,
    AttentionRollout,
    Ensemble,
    GradCAM,
    Gradient,
    IntegratedGradients,
    Interpreter,
    MaskingModel,
    Relevance,
    SmoothGrad,
)

mpl.use("Agg")
if "PYTEST_XDIST_WORKER" in os.environ and "OMP_NUM_THREADS" not in os.environ:
    # Processes share the cores: more threads than cores make PyTorch many times slower.
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
# Torch is too slow for hypothesis' default deadline, and a shared machine too noisy for any.
settings.register_profile("torch", deadline=None, max_examples=25)
settings.load_profile("torch")
# For mutation tests (docs/testing.md): each run has the same examples, none is shrunk, and neither
# a slow machine nor a second run in the same process counts as a failure.
settings.register_profile(
    "mutation",
    settings.get_profile("torch"),
    derandomize=True,
    database=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)

DEVICES = (
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    ),
)
ROOT = Path(__file__).parents[1]
REAL = ROOT.parent / "shared" / "real"
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "examples" / "benchmark")]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = pytest.mark.skip(reason=f"real models and images are not there: {REAL}")
    for item in items:
        if "real" in item.keywords and not REAL.is_dir():
            item.add_marker(missing)


class Row(NamedTuple):
    """One interpreter under test; every conformance test runs over all rows.

    Attributes:
        name: Name of the interpreter.
        build: Makes the interpreter from a model.
        differentiable: Whether the map has a graph. Where not, the surrogate's gradient is another
            thing by design, and has tests of its own.
        skip: Checks of `captum_adv2.testing` that do not apply, with the reasons.
        shape: Shape of the images for these checks.
        tokens: Whether it is for transformers: all tests run on one.
    """

    name: str
    build: Callable[[nn.Module], Interpreter]
    differentiable: bool = True
    skip: Mapping[str, str] = {}
    shape: tuple[int, int, int] | None = None
    tokens: bool = False


def untrained(model: nn.Module, *, seed: int = 0, classes: int = 4) -> MaskingModel:
    """Return a masking model on a tiny network, behind a preprocessing or not."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers, channels = (model.body, model.stem), next(model.parameters()).shape[1]
        return MaskingModel(model, classes, layers=layers, image_shape=(channels, 16, 16))


def _baselines(images: Tensor) -> Tensor:
    """Return two grey images to start from, of any size and type."""
    return torch.tensor([0.2, 0.6]).to(images).view(2, 1, 1, 1).expand(2, *images.shape[1:])


def _captum(method: Callable[[nn.Module], Any], **kwargs: Any) -> Callable[..., Interpreter]:
    """Return a function that builds an interpreter of a Captum method from a model."""

    def build(model: nn.Module) -> Interpreter:
        from captum_adv2.interpreters.captum import CaptumInterpreter

        return CaptumInterpreter(method(model), **kwargs)

    return build


NOISE = {"scaling": "the noise's std is in units of the image's range"}
BASELINE = {"scaling": "the baseline is a grey value, which does not scale with the image"}
INTERPRETERS = (
    Row("Gradient", Gradient),
    Row("SmoothGrad", lambda model: SmoothGrad(model, samples=3), skip=NOISE),
    Row("IntegratedGradients", lambda model: IntegratedGradients(model, steps=3)),
    Row("CAM", CAM),
    Row("GradCAM", GradCAM),
    Row("Saliency", _captum(ca.Saliency)),
    Row("InputXGradient", _captum(ca.InputXGradient)),
    Row("captum IG", _captum(ca.IntegratedGradients, n_steps=3)),
    Row("LayerGradCam", _captum(lambda model: ca.LayerGradCam(model, model.body))),
    Row(
        "LayerGradientXActivation",
        _captum(lambda model: ca.LayerGradientXActivation(model, model.body)),
    ),
    Row(
        "InternalInfluence",
        _captum(lambda model: ca.InternalInfluence(model, model.stem), n_steps=3),
    ),
    Row("GuidedBackprop", _captum(ca.GuidedBackprop)),
    Row("GuidedGradCam", _captum(lambda model: ca.GuidedGradCam(model, model.body))),
    Row("DeepLift", _captum(ca.DeepLift, baselines=0.3), skip=BASELINE),
    Row("GradientShap", _captum(ca.GradientShap, baselines=_baselines, n_samples=3), skip=BASELINE),
    Row(
        "NoiseTunnel",
        _captum(lambda model: ca.NoiseTunnel(ca.InputXGradient(model)), stdevs=0.1, nt_samples=3),
        skip=NOISE,
    ),
    Row(
        "LayerConductance",
        _captum(lambda model: ca.LayerConductance(model, model.stem), n_steps=3),
    ),
    Row(
        "LayerIntegratedGradients",
        _captum(lambda model: ca.LayerIntegratedGradients(model, model.stem), n_steps=3),
    ),
    Row(
        "Occlusion",
        _captum(ca.Occlusion, sliding_window_shapes=(3, 4, 4), strides=(3, 3, 3)),
    ),
    Row(
        "FeatureAblation",
        _captum(ca.FeatureAblation, feature_mask=3, baselines=0.3),
        skip=BASELINE,
    ),
    Row(
        "ShapleyValueSampling",
        _captum(ca.ShapleyValueSampling, feature_mask=2, n_samples=3),
    ),
    Row("KernelShap", _captum(ca.KernelShap, feature_mask=3, n_samples=14)),
    Row(
        "Lime",
        _captum(
            lambda model: ca.Lime(model, SkLearnRidge(alpha=0.1)),
            feature_mask=2,
            n_samples=9,
            perturbations_per_eval=4,
        ),
    ),
    Row(
        "MASK",
        lambda model: MASK(model, size=4, iterations=6, jitter=1),
        differentiable=False,
        shape=(3, 16, 16),  # the blur of a smaller image is the image: MASK then sees no class
    ),
    Row(
        "RTS",
        lambda model: RTS(model, untrained(model)),
        skip={"relabel": "the classes' order is in the masking model too"},
    ),
    Row(
        "AttentionRollout",
        AttentionRollout,
        skip={"class": "rollout has no class: its map is the same for each"},
        tokens=True,
    ),
    Row("Relevance", Relevance, tokens=True),
    # Of two resolutions.
    Row("Ensemble", lambda model: Ensemble([GradCAM(model), Gradient(model, pool=1)])),
)


class Attacked(NamedTuple):
    """One kind of attack under test.

    Attributes:
        name: Name of the attack and of its interpreter.
        build: Makes the attack from a model.
    """

    name: str
    build: Callable[[nn.Module], CarefulAttack]


_BUILD = {row.name: row.build for row in INTERPRETERS}


def _adv2(name: str, build: Callable[[nn.Module], Interpreter], **settings: Any) -> Attacked:
    given = {"eps": 0.1, "steps": 2, "warmup": 1} | settings
    return Attacked(f"ADV2 {name}", lambda model: ADV2(model, build(model), **given))


# The ways in which attacks run a model: hooks, replaced functions, gradients inside the map, states
# of surrogates, penalties, finished images, steps of two phases, other frameworks, two stages.
ATTACKS = (
    _adv2("CAM", CAM),
    _adv2(
        "GradCAM of a layer in two phases",
        lambda model: GradCAM(model, layer="body"),
        step=TwoPhase(searches=2),
    ),
    _adv2("Gradient with a stop", Gradient, steps=3, stop=0.2, confidence=0.0),
    _adv2("DeepLift", _BUILD["DeepLift"]),
    _adv2("MASK", _BUILD["MASK"]),
    _adv2("RTS", _BUILD["RTS"]),
    Attacked(
        "StADV2 Ensemble",
        lambda model: StADV2(model, _BUILD["Ensemble"](model), steps=2, warmup=1),
    ),
    Attacked(
        "BitDepthADV2 GradCAM",
        lambda model: BitDepthADV2(ADV2(model, GradCAM(model), eps=0.2, steps=2), bits=3, steps=2),
    ),
    Attacked(
        "TransferADV2 CAM",
        lambda model: TransferADV2(model, CAM(model), eps=0.2, steps=2),
    ),
    Attacked(
        "QueryADV2 CAM with a stop",
        lambda model: QueryADV2(model, CAM(model), eps=0.2, queries=40, stop=0.2),
    ),
    Attacked(
        "QueryADV2 RTS by estimates, after another attack",
        lambda model: QueryADV2(
            model,
            _BUILD["RTS"](model),
            eps=0.2,
            queries=20,
            start=ADV2(model, CAM, eps=0.1, steps=2),
            step=SignDescent(),
            pairs=2,
        ),
    ),
)


# Each class of attacks, around an interpreter or its class.
BUILD = {
    "ADV2": lambda model, interpreter: ADV2(model, interpreter, steps=4),
    "StADV2": lambda model, interpreter: StADV2(model, interpreter, steps=4),
    "BitDepthADV2": lambda model, interpreter: BitDepthADV2(
        ADV2(model, interpreter, eps=0.2, steps=4), bits=3, steps=3
    ),
}


@pytest.fixture(params=BUILD)
def build(request: pytest.FixtureRequest) -> Callable[[nn.Module, Any], CarefulAttack]:
    return BUILD[request.param]


def inner(attack: CarefulAttack) -> ADV2 | StADV2:
    """Return the attack that optimises the image: of two stages, the second."""
    return getattr(attack, "second", attack)


@pytest.fixture(params=ATTACKS, ids=lambda attacked: attacked.name)
def attacked(request: pytest.FixtureRequest) -> Attacked:
    return request.param


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Make each test draw the same numbers in every run and any order."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def _studies_on_the_cpu(request: pytest.FixtureRequest) -> Iterator[None]:
    """Studies are tested on the CPU, whose results do not depend on the order of additions."""
    with pytest.MonkeyPatch.context() as patch:
        if request.path.parent.name == "study":
            patch.setenv("CUDA_VISIBLE_DEVICES", "")  # of processes that a test starts
            patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


@contextmanager
def _empty_figures() -> Iterator[None]:
    from captum_adv2.study import figures, plots

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "_drawn", lambda *parts: Figure((1, 1)))
        for name in ("barred", "trusted", "curves"):
            patch.setattr(plots, name, lambda *parts: Figure((1, 1)))
        yield


@pytest.fixture(scope="module")
def undrawn() -> Iterator[None]:
    """Figures stay empty, where their number and not their content is tested; that is faster."""
    with _empty_figures():
        yield


@pytest.fixture
def undrawn_here() -> Iterator[None]:
    """`undrawn` for one test, in a module of which others look at figures."""
    with _empty_figures():
        yield


@pytest.fixture(params=INTERPRETERS, ids=lambda row: row.name)
def row(request: pytest.FixtureRequest) -> Row:
    return request.param


def mixed(model: nn.Module) -> nn.Module:
    """Return a copy with modules in both modes, which no call of train() or eval() restores."""
    clone = copy.deepcopy(model).train()
    clone.norm.eval()
    clone.stem.requires_grad_(False)
    return clone


class TinyNet(nn.Module):
    """A convolutional network: stem, batch norm, body, average pooling, dropout, linear head."""

    def __init__(
        self, activation: Callable[[], nn.Module] = nn.ReLU, classes: int = 4, width: int = 8
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), activation(), nn.AvgPool2d(2))
        self.norm = nn.BatchNorm2d(width)
        self.body = nn.Sequential(nn.Conv2d(width, 2 * width, 3, padding=1), activation())
        self.dropout = nn.Dropout(0.5)
        self.fc = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        features = self.body(self.norm(self.stem(x)))
        return self.fc(self.dropout(features.mean(dim=(2, 3))))


class Block(nn.Module):
    """A block of a transformer, in which all tokens attend to all."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.qkv.weight.data *= 3  # for attention that differs from token to token
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        out = nn.functional.scaled_dot_product_attention(q, k, v)  # (B, 2, N, width / 2)
        x = x + self.proj(out.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class TinyViT(nn.Module):
    """A vision transformer with the parts of `TinyNet`: 3x3 patches, a class token, two blocks."""

    def __init__(self, classes: int = 4, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 3), nn.GELU())
        self.first = nn.Parameter(torch.zeros(1, 1, width))
        self.norm = nn.LayerNorm(width)
        self.body = nn.Sequential(nn.Linear(width, width), Block(width), Block(width))
        self.dropout = nn.Dropout(0.5)
        self.fc = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.stem(x).flatten(2).transpose(1, 2)
        tokens = self.body(torch.cat([self.first.expand(len(x), -1, -1), patches], dim=1))
        return self.fc(self.dropout(self.norm(tokens[:, 0])))


def blobs(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return 16x16 images with a blob of one of four colours at a random place, and the colours.

    Made in double precision, so that they are rounded to the same 8 bits on any processor.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (count,), generator=generator)
    centre = torch.randint(4, 12, (count, 2, 1, 1), generator=generator)
    rows, columns = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    far = (rows - centre[:, 0]).square() + (columns - centre[:, 1]).square()
    blob = torch.exp(-far.double() / 8)[:, None]
    colours = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]]).double() * 0.25
    noise = 0.05 * torch.randn(count, 3, 16, 16, generator=generator, dtype=torch.float64)
    images = 0.4 + blob * colours[labels][:, :, None, None] + noise
    return (images.clamp(0, 1) * 255).round().float() / 255, labels


def train(model: nn.Module) -> nn.Module:
    """Train a network on blobs; it gets all of them right.

    In double precision: training blows up differences in rounding, and in float32 the network
    would be another one on each processor and with each number of threads.
    """
    model.double()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    # A rate that ends at zero lets the running statistics of batch norm catch up.
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=100)
    for seed in range(100):
        images, labels = blobs(128, seed)
        loss = nn.functional.cross_entropy(model(images.double()), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    optimizer.zero_grad(set_to_none=True)
    return model.float().eval()


@functools.cache
def _trained() -> nn.Module:
    # Kept beyond the session: mutation tests run one after the other in copies of a process.
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return train(TinyNet())


@functools.cache
def torchvision_net(name: str) -> nn.Module:
    """Return a frozen network of torchvision with 10 classes and ordinary activations."""
    from kinds import settled
    from torchvision import models

    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = getattr(models, name)(num_classes=10)
        return settled(net, torch.rand(4, 3, 96, 96)).requires_grad_(False)


@pytest.fixture(scope="session")
def trained() -> nn.Module:
    return _trained()


@pytest.fixture(scope="session")
def vit() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return TinyViT().eval()


@pytest.fixture(scope="session")
def trained_smooth() -> nn.Module:
    """A trained network with derivatives of every order, in double precision."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return train(TinyNet(nn.SiLU, width=4)).double()


@pytest.fixture
def model(trained: nn.Module) -> nn.Module:
    return trained


@pytest.fixture(scope="session")
def data() -> tuple[Tensor, Tensor]:
    return blobs(6, seed=10_000)


@pytest.fixture
def smooth() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return TinyNet(nn.SiLU, width=3).double().eval()
