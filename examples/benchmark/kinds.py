# SPDX-License-Identifier: MIT
"""Kinds of model, and spellings of one, for `models`: each beside the same function, plainly."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, TypeAlias
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Run: TypeAlias = Callable[..., Any]  # of a network and images


@dataclass(frozen=True)
class Kind:
    """A kind of model.

    Attributes:
        name: Its name, for the page.
        plain: Makes the function itself, in the simplest spelling.
        spelled: From the plain model to the model; by default, the same.
        layer: Dotted name, in the plain model, of the module whose output are the last feature
            maps; empty where there are none.
        head: Dotted name of the linear layer on the pooled maps; empty where there is none.
        pooling: Name of the function of `torch.nn.functional` whose input the feature maps are,
            where they are no module's output.
        last: Whether the channels of the feature maps are the last dimension.
        first: Where they are tokens on a square grid, the number of those before the grid's.
        shape: Shape of a batch of images.
        dtype: Type of images and weights.
    """

    name: str
    plain: Callable[[], nn.Module]
    spelled: Callable[[nn.Module], nn.Module] = lambda plain: plain
    layer: str = "body"
    head: str = "fc"
    pooling: str = ""
    last: bool = False
    first: int | None = None
    shape: tuple[int, ...] = (2, 3, 16, 16)
    dtype: torch.dtype = torch.float64

    def case(self) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
        """Return the model, the plain one in float64, of the same weights, images and classes."""
        generator = torch.Generator().manual_seed(1)
        images = torch.rand(self.shape, generator=generator, dtype=torch.float64).to(self.dtype)
        with torch.random.fork_rng(), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            model = tamed(self.plain().double(), self.shape).to(self.dtype)
            plain = copy.deepcopy(model).double()
            target = plain(images.double()).argmax(dim=1)
            with torch.enable_grad():
                return self.spelled(model), plain, images, target


def settled(model: nn.Module, images: Tensor) -> nn.Module:
    """Give a network in eval mode ordinary activations, by the statistics of a batch."""
    norms = [norm.train() for norm in model.eval().modules() if isinstance(norm, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model(images)
    return model.eval()


def tamed(model: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    """Give a model in float64 ordinary activations and logits: at p = 1 gradients are lost."""
    head: Any = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)][-1]
    if not head.weight.any():  # as some libraries start it
        nn.init.normal_(head.weight)
    images = torch.rand(max(4, shape[0]), *shape[1:], dtype=torch.float64)
    largest = settled(model, images)(images).abs().amax()
    for weight in head.parameters():
        weight.mul_(2 / largest.clamp(min=2))
    return model


class Tiny(nn.Module):
    """Two convolutions with batch norm, average pooling and a linear layer."""

    def __init__(
        self, channels: int = 3, classes: int = 4, activation: Callable[[], nn.Module] = nn.ReLU
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(channels, 6, 3, 2, 1), activation())
        self.norm = nn.BatchNorm2d(6)
        self.pool = nn.MaxPool2d(2)
        self.body = nn.Sequential(
            nn.Conv2d(6, 8, 3, padding=1), activation(), nn.Conv2d(8, 8, 3, padding=1), activation()
        )
        self.dropout = nn.Dropout()
        self.fc = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        maps = self.body(self.pool(self.norm(self.stem(x))))
        logits: Tensor = self.fc(self.dropout(maps.mean(dim=(2, 3))))
        return logits


class Around(nn.Module):
    """A network that is run by a function."""

    def __init__(self, net: nn.Module | None, run: Run) -> None:
        super().__init__()
        self.net, self.run = net, run
        self.eval()

    def forward(self, x: Tensor, *further: Any, **named: Any) -> Any:
        """Return what the function returns."""
        return self.run(self.net, x, *further, **named)


class OwnReLU(torch.autograd.Function):
    """A ReLU with a backward pass of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Return the ReLU."""
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Return the gradient."""
        return gradients[0] * (ctx.saved_tensors[0] > 0)


def around(run: Run) -> Callable[[nn.Module], nn.Module]:
    """Return what runs a network by a function."""
    return lambda plain: Around(plain, run)


def activated(function: Callable[[Tensor], Tensor]) -> Callable[[nn.Module], nn.Module]:
    """Return what replaces each ReLU by a function."""

    def spelled(plain: nn.Module) -> nn.Module:
        for module in list(plain.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.ReLU):
                    setattr(module, name, Around(None, lambda _, x: function(x)))
        return plain.eval()

    return spelled


def shared(plain: Any) -> nn.Module:
    """Let all activations be one module."""
    plain.stem[1] = plain.body[1] = plain.body[3] = nn.ReLU().eval()
    return plain


def checkpointed(reentrant: bool) -> Callable[[nn.Module], nn.Module]:
    """Return what runs the body of a network under activation checkpointing."""

    def run(net: Any, x: Tensor) -> Tensor:
        maps = checkpoint(net.body, net.pool(net.norm(net.stem(x))), use_reentrant=reentrant)
        return net.fc(maps.mean(dim=(2, 3)))

    return around(run)


def parametrized() -> nn.Module:
    """Return a network whose convolutions are parametrised."""
    net = Tiny()
    ways = nn.utils.parametrizations
    for way, layer in zip(
        (ways.spectral_norm, ways.weight_norm, ways.weight_norm),
        (net.stem[0], net.body[0], net.body[2]),
        strict=True,
    ):
        way(layer)
    return net


def exported(plain: nn.Module) -> nn.Module:
    """Return the graph of a network."""
    batch = {0: torch.export.Dim.AUTO}
    graph: nn.Module = torch.export.export(plain, (_EXAMPLE,), dynamic_shapes=(batch,)).module()
    return graph


def parallel(plain: nn.Module) -> nn.Module:
    """Return a network in DataParallel, as on a machine without a GPU, for the CPU."""
    with mock.patch("torch.cuda.is_available", return_value=False):
        return nn.DataParallel(plain).eval()


def compiled(plain: nn.Module) -> nn.Module:
    """Return a compiled network that has run."""
    made: Any = torch.compile(plain, backend="eager")
    made(_EXAMPLE)
    return made


_EXAMPLE = torch.full((2, 3, 16, 16), 0.5, dtype=torch.float64)
NO_LAYER: dict[str, Any] = {"layer": "", "head": ""}
INSIDE: dict[str, Any] = {"layer": "net.body", "head": "net.fc"}
SPELLINGS = [
    Kind("plain", Tiny),
    Kind("functional ReLUs", Tiny, activated(F.relu)),
    Kind("in-place ReLUs", Tiny, activated(lambda x: F.relu_(x * 1))),
    Kind("`x * (x > 0)`", Tiny, activated(lambda x: x * (x > 0))),
    Kind("`torch.where(x > 0, x, 0)`", Tiny, activated(lambda x: torch.where(x > 0, x, 0.0))),
    Kind("`maximum(x, 0)`", Tiny, activated(lambda x: torch.maximum(x, x.new_zeros(())))),
    Kind("`clamp(min=0)`", Tiny, activated(lambda x: x.clamp(min=0))),
    Kind("`autograd.Function` as ReLU", Tiny, activated(OwnReLU.apply)),
    Kind("leaky ReLUs", lambda: Tiny(activation=nn.LeakyReLU)),
    Kind("parametric ReLUs", lambda: Tiny(activation=nn.PReLU)),
    Kind("SiLU", lambda: Tiny(activation=nn.SiLU)),
    Kind("one ReLU module, reused", Tiny, shared),
    Kind("one channel, two classes", lambda: Tiny(1, 2), shape=(2, 1, 16, 16)),
    Kind("one image, not square", Tiny, shape=(1, 3, 12, 20)),
    Kind("float32", Tiny, dtype=torch.float32),
    Kind("bfloat16", Tiny, dtype=torch.bfloat16),
    Kind("weights without gradients", Tiny, lambda plain: plain.requires_grad_(False)),
    Kind("train mode", Tiny, lambda plain: plain.train()),
    Kind("spectral and weight norm", parametrized),
    Kind(
        "normalises in place",
        lambda: Around(Tiny(), lambda net, x: net((x - 0.5) * 2.0)),
        lambda plain: Around(plain.net, lambda net, x: net(x.sub_(0.5).mul_(2.0))),
        **INSIDE,
    ),
    Kind("fixed batch size", Tiny, around(lambda net, x: net(x.view(2, 3, 16, 16)))),
    Kind(
        "mean over flips",
        lambda: Around(Tiny(), lambda net, x: (net(x) + net(x.flip(-1))) / 2),
        layer="net.body",
        head="",
    ),
    Kind(
        "mean of two networks",
        lambda: Around(
            nn.ModuleList([Tiny(), Tiny(activation=nn.SiLU)]),
            lambda nets, x: torch.stack([net(x) for net in nets]).mean(dim=0),
        ),
        layer="net.1.body",
        head="",
    ),
    Kind("returns `.logits`", Tiny, around(lambda net, x: SimpleNamespace(logits=net(x)))),
    Kind("`.logits` taken", Tiny, around(lambda net, x: SimpleNamespace(logits=net(x)).logits)),
    Kind("further arguments", Tiny, around(lambda net, x, labels=None, *, loss=False: net(x))),
    Kind("one logit", Tiny, around(lambda net, x: net(x)[:, :1])),
    Kind("softmax at the end", Tiny, around(lambda net, x: net(x).softmax(dim=1))),
    Kind("NaN logits", Tiny, around(lambda net, x: net(x) * torch.nan)),
    Kind("`no_grad` inside", Tiny, around(torch.no_grad()(lambda net, x: net(x)))),
    Kind(
        "rounds to 8 bits",
        lambda: Around(Tiny(), lambda net, x: net((x * 255).round() / 255)),
        **INSIDE,
    ),
    Kind("`DataParallel`", Tiny, parallel),
    Kind("`checkpoint`", Tiny, checkpointed(False)),
    Kind("`checkpoint`, reentrant", Tiny, checkpointed(True)),
    Kind("`torch.compile`", Tiny, compiled),
    Kind("`torch.jit.trace`", Tiny, lambda net: torch.jit.trace(net, _EXAMPLE)),
    Kind("`torch.jit.script`", Tiny, torch.jit.script),
    Kind("`nn.Sequential(script)`", Tiny, lambda net: nn.Sequential(torch.jit.script(net))),
    Kind("`torch.export`", Tiny, exported),
    Kind("channels last in memory", Tiny, lambda net: net.to(memory_format=torch.channels_last)),
]
