# SPDX-License-Identifier: MIT
"""Kinds of model, and spellings of one, for `models`: each beside the same function, plainly."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Run: TypeAlias = Callable[[Any, Tensor], Any]


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

    def models(self) -> tuple[nn.Module, nn.Module]:
        """Return the model, and the plain one in float64, of the same weights, in eval mode."""
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            model = settled(self.plain(), self.shape).to(self.dtype)
            plain = copy.deepcopy(model).double()
            return self.spelled(model), plain

    def images(self) -> Tensor:
        """Return images that the models accept."""
        generator = torch.Generator().manual_seed(1)
        return torch.rand(self.shape, generator=generator, dtype=torch.float64).to(self.dtype)


def settled(model: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    """Give a model in float64 ordinary activations, by the statistics of a batch."""
    model = model.double().eval()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.train().momentum = 1.0
    with torch.no_grad():
        head = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)][-1]
        if not head.weight.any():  # as some libraries start it
            nn.init.normal_(head.weight)
        images = torch.rand(max(4, shape[0]), *shape[1:], dtype=torch.float64)
        model(images)
        largest = model.eval()(images).abs().amax()
        for weight in head.parameters():  # where p rounds to 1, its gradient is lost
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

    def __init__(self, net: nn.Module, run: Run) -> None:
        super().__init__()
        self.net, self.run = net, run
        self.eval()

    def forward(self, x: Tensor) -> Any:
        """Return what the function returns."""
        return self.run(self.net, x)


class Function(nn.Module):
    """A function of tensors as a module without weights."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """Return the function's value."""
        return self.function(x)


class Lightning(nn.Module):
    """A module with further arguments, as training frameworks have them."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.eval()

    def forward(self, x: Tensor, labels: Tensor | None = None, *, loss: bool = False) -> Tensor:
        """Return logits, or the loss."""
        logits: Tensor = self.net(x)
        return F.cross_entropy(logits, labels) if loss else logits


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
                    setattr(module, name, Function(function))
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


def in_place(net: nn.Module, x: Tensor) -> Tensor:
    """Normalise in place."""
    x -= 0.5
    x *= 2.0
    return net(x)


def normalized() -> nn.Module:
    """Return a network behind a normalisation."""
    return Around(Tiny(), lambda net, x: net((x - 0.5) * 2.0))


def broken(net: nn.Module, x: Tensor) -> Tensor:
    """Return logits that are NaN."""
    return net(x) * torch.nan


@torch.no_grad()
def without_grad(net: nn.Module, x: Tensor) -> Tensor:
    """Run without a graph."""
    return net(x)


def flips() -> nn.Module:
    """Return a network whose logits are the mean of those of an image and its mirror image."""
    return Around(Tiny(), lambda net, x: (net(x) + net(x.flip(-1))) / 2)


class Pair(nn.Module):
    """The mean of two networks."""

    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleList([Tiny(), Tiny(activation=nn.SiLU)])

    def forward(self, x: Tensor) -> Tensor:
        """Return the mean logits."""
        return torch.stack([net(x) for net in self.nets]).mean(dim=0)


def parametrized(function: Callable[[nn.Module], nn.Module]) -> Callable[[], nn.Module]:
    """Return what makes a network whose convolutions are parametrised."""

    def plain() -> nn.Module:
        net = Tiny()
        for module in list(net.modules()):
            if isinstance(module, nn.Conv2d):
                function(module)
        return net

    return plain


def quantised(net: nn.Module, x: Tensor) -> Tensor:
    """Round the image to 8 bits, as fixed-point arithmetic does."""
    return net((x * 255).round() / 255)


def exported(plain: nn.Module) -> nn.Module:
    """Return the graph of a network."""
    example = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    batch = {0: torch.export.Dim.AUTO}
    graph: nn.Module = torch.export.export(plain, (example,), dynamic_shapes=(batch,)).module()
    return graph


NO_LAYER: dict[str, Any] = {"layer": "", "head": ""}
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
    Kind("one channel", lambda: Tiny(1), shape=(2, 1, 16, 16)),
    Kind("four channels", lambda: Tiny(4), shape=(2, 4, 16, 16)),
    Kind("images not square", Tiny, shape=(2, 3, 12, 20)),
    Kind("batch of one", Tiny, shape=(1, 3, 16, 16)),
    Kind("two classes", lambda: Tiny(classes=2)),
    Kind("float32", Tiny, dtype=torch.float32),
    Kind("bfloat16", Tiny, dtype=torch.bfloat16),
    Kind("weights without gradients", Tiny, lambda plain: plain.requires_grad_(False)),
    Kind("train mode", Tiny, lambda plain: plain.train()),
    Kind("spectral norm", parametrized(nn.utils.parametrizations.spectral_norm)),
    Kind("weight norm", parametrized(nn.utils.parametrizations.weight_norm)),
    Kind(
        "normalises in place", normalized, lambda n: Around(n.net, in_place), "net.body", "net.fc"
    ),
    Kind("fixed batch size", Tiny, around(lambda net, x: net(x.view(2, 3, 16, 16)))),
    Kind("mean over flips", flips, layer="net.body", head=""),
    Kind("mean of two networks", Pair, layer="nets.1.body", head=""),
    Kind("returns `.logits`", Tiny, around(lambda net, x: SimpleNamespace(logits=net(x)))),
    Kind("`.logits` taken", Tiny, around(lambda net, x: SimpleNamespace(logits=net(x)).logits)),
    Kind("further arguments", Tiny, Lightning),
    Kind("one logit", Tiny, around(lambda net, x: net(x)[:, :1])),
    Kind("softmax at the end", Tiny, around(lambda net, x: net(x).softmax(dim=1))),
    Kind("NaN logits", Tiny, around(broken)),
    Kind("`no_grad` inside", Tiny, around(without_grad)),
    Kind("rounds to 8 bits", lambda: Around(Tiny(), quantised), layer="net.body", head="net.fc"),
    Kind("`DataParallel`", Tiny, lambda plain: nn.DataParallel(plain).eval()),
    Kind("`checkpoint`", Tiny, checkpointed(False)),
    Kind("`checkpoint`, reentrant", Tiny, checkpointed(True)),
    Kind("`torch.compile`", Tiny, lambda plain: compiled(plain)),
    Kind("`torch.jit.trace`", Tiny, lambda net: torch.jit.trace(net, _example())),
    Kind("`torch.jit.script`", Tiny, torch.jit.script),
    Kind("`nn.Sequential(script)`", Tiny, lambda net: nn.Sequential(torch.jit.script(net))),
    Kind("`torch.export`", Tiny, exported),
    Kind("channels last in memory", Tiny, lambda net: net.to(memory_format=torch.channels_last)),
]


def compiled(plain: nn.Module) -> nn.Module:
    """Return a compiled network that has run."""
    made: Any = torch.compile(plain, backend="eager")
    made(_example())
    return made


def _example() -> Tensor:
    return torch.rand(2, 3, 16, 16, dtype=torch.float64)
