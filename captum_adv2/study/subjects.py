# SPDX-License-Identifier: MIT
"""Classifiers and interpreters by name, as a command line gives them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from captum_adv2.checks import expect_logits, expect_model
from captum_adv2.interpreters import (
    CAM,
    MASK,
    RTS,
    GradCAM,
    Gradient,
    IntegratedGradients,
    Interpreter,
    MaskingModel,
    SmoothGrad,
)
from captum_adv2.study.settings import Settings
from captum_adv2.study.sources import CorruptImage, Source, embedded

__all__ = ["INTERPRETERS", "Subject", "label", "load_model", "subject"]

_SMALL = 128  # pixels: GRAD pools less, and MASK has other settings, below it
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Subject(NamedTuple):
    """A classifier of images in [0, 1], and what explains it, by name.

    Attributes:
        name: Short, for tables and files.
        model: The classifier, in eval mode.
        classes: How many it knows.
        interpreters: By name.
        left_out: Interpreters asked for that it has not got, and why.
    """

    name: str
    model: nn.Module
    classes: int
    interpreters: Mapping[str, Interpreter]
    left_out: tuple[str, ...]


class _Unavailable(ValueError):
    """An interpreter that a classifier has not got."""


def label(spec: str) -> str:
    """Return a short name for a model or interpreter: what is before ``=``, after ``:``.

    >>> label("squeezenet1_0=weights.pt"), label("embedded:resnet"), label("CAM")
    ('squeezenet1_0', 'resnet', 'CAM')
    """
    return spec.partition("=")[0].rpartition(":")[2]


def load_model(spec: str, device: torch.device | str = "cpu") -> nn.Module:
    """Return a classifier of images ``(B, C, H, W)`` in [0, 1], in eval mode.

    Args:
        spec: ``embedded:resnet`` or ``embedded:densenet``, the small networks of the examples;
            a name of torchvision's (``resnet50``), with its own weights, which are downloaded, or
            with those of a file of its state dict (``resnet50=weights.pt``), and normalised as
            these weights want it; or ``package.module:factory``, a function without arguments.
        device: Where it shall be.

    Raises:
        TypeError: The factory returns no module.
        ValueError: Nothing of that name, or weights that cannot be had.
    """
    model: Any
    name, _, weights = spec.partition("=")
    if name.startswith("embedded:"):
        known = {
            "embedded:resnet": embedded().models.load_resnet,
            "embedded:densenet": embedded().models.load_densenet,
        }
        if name not in known:
            raise ValueError(f"expected {' or '.join(known)}, got {name}")
        model = known[name]()
    elif ":" in name:
        model = _factory(name)()
    else:
        model = _torchvision(name, weights)
    return expect_model(model).to(device).eval()


def subject(
    spec: str, settings: Settings, source: Source, device: torch.device | str = "cpu"
) -> Subject:
    """Return a classifier with those of the study's interpreters that it has.

    Args:
        spec: See `load_model`.
        settings: The study's.
        source: Images, which the classifier has to fit.
        device: Where all of it shall be.

    Raises:
        ValueError: Something unknown, images of other classes than the classifier's, or none of the
            interpreters.
    """
    model = load_model(spec, device)
    image = _first(source)
    with torch.no_grad():
        classes = expect_logits(model(image[None].to(device)), 1).shape[1]
    known = len(source.classes)
    if known > classes or (known < classes and not source.numbered):
        raise ValueError(
            f"expected images of {classes} classes, as {spec} knows, got {known}; "
            "--classes names a file with the folders' names in the classifier's order"
        )
    found: dict[str, Interpreter] = {}
    left_out = []
    for name in settings.interpreters:
        try:
            found[label(name)] = _interpreter(name, spec, model, settings, min(image.shape[-2:]))
        except _Unavailable as reason:
            left_out.append(str(reason))
    if not found:
        raise ValueError(f"expected an interpreter for {spec}, got none; " + "; ".join(left_out))
    return Subject(label(spec), model, classes, found, tuple(left_out))


def _first(source: Source) -> Tensor:
    """Return the first image that can be read."""
    for number in range(len(source)):
        with suppress(CorruptImage):
            return source[number].image
    raise ValueError(f"expected images that can be read, got none of {len(source)}")


def _gradient(model: nn.Module, settings: Settings, side: int) -> Interpreter:
    return Gradient(model, smoothing=settings.smoothing)


def _mask(model: nn.Module, settings: Settings, side: int) -> Interpreter:
    return MASK.small(model) if side < _SMALL else MASK(model)


INTERPRETERS: Mapping[str, Callable[[nn.Module, Settings, int], Interpreter]] = {
    "GRAD": _gradient,
    "CAM": lambda model, settings, side: CAM(model),
    "MASK": _mask,
    "GradCAM": lambda model, settings, side: GradCAM(model),
    "IG": lambda model, settings, side: IntegratedGradients(model),
    "SmoothGrad": lambda model, settings, side: SmoothGrad(model),
}
"""What explains any classifier; RTS and RTS-A need a masking model besides."""


def _interpreter(
    name: str, spec: str, model: nn.Module, settings: Settings, side: int
) -> Interpreter:
    if name in ("RTS", "RTS-A"):
        return RTS(model, _masking_model(name, spec, model, settings))
    if ":" in name:
        built: Any = _factory(name)(model)
        if not isinstance(built, Interpreter):
            raise TypeError(f"expected {name} to return an Interpreter, got {type(built).__name__}")
        return built
    if name not in INTERPRETERS:
        raise ValueError(
            f"expected an interpreter from {', '.join((*INTERPRETERS, 'RTS', 'RTS-A'))}, or "
            f"package.module:factory, got {name}"
        )
    return INTERPRETERS[name](model, settings, side)


def _masking_model(name: str, spec: str, model: nn.Module, settings: Settings) -> MaskingModel:
    """Return RTS's masking model, or RTS-A's: that of a file, or the small network's own."""
    device = next(model.parameters()).device
    file = settings.masking_model if name == "RTS" else settings.distilled_model
    if file:
        return MaskingModel.load(file, model).to(device)
    networks = embedded().models if spec.startswith("embedded:") else None
    if networks and (spec, name) == ("embedded:densenet", "RTS"):
        found: MaskingModel = networks.load_rts(networks.load_resnet(), "densenet")
    elif networks and spec == "embedded:resnet":
        found = networks.load_rts(model, "resnet" if name == "RTS" else "resnet-aid")
    else:
        option = "--masking-model" if name == "RTS" else "--distilled-model"
        raise _Unavailable(f"{name} on {spec} needs a masking model: {option} FILE")
    return found.to(device)


def _factory(spec: str) -> Callable[..., Any]:
    """Return the function that ``package.module:name`` is."""
    module, _, name = spec.rpartition(":")
    sys.path.insert(0, str(Path.cwd()))  # as python itself does for -c and for scripts
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"expected {spec} to be package.module:function, got {error}; is its folder on "
            "PYTHONPATH?"
        ) from error
    finally:
        sys.path.pop(0)
    if not callable(found):
        raise ValueError(f"expected {spec} to be a function, got {type(found).__name__}")
    return found  # type: ignore[no-any-return]


class _Normalize(nn.Module):
    """Subtract a mean and divide by a standard deviation, per channel."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Normalise images ``(B, C, H, W)`` in [0, 1]."""
        return (images - self.mean) / self.std


def _torchvision(name: str, file: str) -> nn.Module:
    from torchvision import models

    if name not in models.list_models():
        raise ValueError(
            f"expected a classifier of torchvision's, embedded:resnet, embedded:densenet or "
            f"package.module:factory, got {name}"
        )
    weights = models.get_model_weights(name).DEFAULT
    try:
        net = models.get_model(name, weights=None if file else weights)
    except OSError as error:
        raise ValueError(
            f"expected to download the weights of {name}, got {error}; {name}=FILE reads them from "
            "a file"
        ) from error
    if file:
        net.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    transform = weights.transforms()
    mean, std = getattr(transform, "mean", _MEAN), getattr(transform, "std", _STD)
    return nn.Sequential(_Normalize(tuple(mean), tuple(std)), net)
