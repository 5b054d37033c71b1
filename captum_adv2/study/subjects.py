# SPDX-License-Identifier: MIT
"""Classifiers and interpreters by name, as a command line gives them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import nn
from torchvision import models
from torchvision.transforms import v2

from captum_adv2 import storage
from captum_adv2.interpreters import (
    CAM,
    MASK,
    RTS,
    Ensemble,
    GradCAM,
    Gradient,
    IntegratedGradients,
    Interpreter,
    MaskingModel,
    SmoothGrad,
)
from captum_adv2.spec import expect, expect_logits
from captum_adv2.study.data import CorruptImage, Source, make
from captum_adv2.study.embedded import load_densenet, load_resnet, load_rts, load_vit
from captum_adv2.study.settings import Settings, label

_SMALL = 128  # pixels: MASK has other settings below it
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

_EMBEDDED: Mapping[str, Callable[[], nn.Module]] = {
    "embedded:resnet": load_resnet,
    "embedded:densenet": load_densenet,
    "embedded:vit": load_vit,
}

# Masking models that come along: of a classifier and RTS or RTS-A, the name for `load_rts`.
_MASKING: Mapping[tuple[str, str], str] = {
    ("embedded:resnet", "RTS"): "resnet",
    ("embedded:resnet", "RTS-A"): "resnet-aid",
    ("embedded:densenet", "RTS"): "densenet",
}

INTERPRETERS: Mapping[str, Callable[[nn.Module, Settings, int], Interpreter]] = {
    "GRAD": lambda model, settings, side: Gradient(model, smoothing=settings.smoothing or "auto"),
    "CAM": lambda model, settings, side: CAM(model),
    "MASK": lambda model, settings, side: MASK.small(model) if side < _SMALL else MASK(model),
    "GradCAM": lambda model, settings, side: GradCAM(model),
    "GradCAM-P": lambda model, settings, side: GradCAM(model, score="probability"),
    "IG": lambda model, settings, side: IntegratedGradients(model),
    "SmoothGrad": lambda model, settings, side: SmoothGrad(model),
    "Ensemble": lambda model, settings, side: Ensemble([Gradient(model), GradCAM(model)]),
}
"""Interpreters of any classifier and images of some side; RTS needs a masking model besides."""


class Subject(NamedTuple):
    """A classifier of images in [0, 1], and its interpreters."""

    name: str  # short, for tables and files
    model: nn.Module  # in eval mode
    classes: int  # number of its classes
    interpreters: Mapping[str, Interpreter]  # by name
    left_out: tuple[str, ...]  # interpreters asked for that it does not have, and why
    weights: str  # digest of the classifier's and the interpreters' weights


class _Unavailable(ValueError):
    """An interpreter that a classifier does not have."""


def load_model(spec: str) -> nn.Module:
    """Return a classifier of images ``(B, C, H, W)`` in [0, 1], in eval mode; see `Settings`."""
    name, _, weights = spec.partition("=")
    if name in _EMBEDDED:
        model = _EMBEDDED[name]()
    elif ":" in name:
        model = make(spec)
    else:
        model = _torchvision(name, weights)
    expect(model, nn.Module, spec)
    return model.eval()


def _torchvision(name: str, file: str) -> nn.Module:
    """Return a network of torchvision's with its own weights or those of a file."""
    if name not in models.list_models():
        raise ValueError(
            f"expected a classifier of torchvision's, {', '.join(_EMBEDDED)} or "
            f"package.module:function, got {name}"
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
        held = storage.read(file, f"a file with the weights of {name}")
        expect(held, Mapping[str, torch.Tensor], f"the weights in {file}")
        try:
            net.load_state_dict(held)
        except RuntimeError as error:
            raise ValueError(f"expected the weights of {name} in {file}, got {error}") from error
    transform = weights.transforms()
    mean, std = getattr(transform, "mean", _MEAN), getattr(transform, "std", _STD)
    return nn.Sequential(v2.Normalize(mean, std), net)


def subject(spec: str, settings: Settings, source: Source, device: torch.device) -> Subject:
    """Return a classifier with those of the study's interpreters that it has.

    Args:
        spec: See `Settings`.
        settings: The study's.
        source: Images, which the classifier has to fit.
        device: Device of the classifier and its interpreters.
    """
    model = load_model(spec).to(device)
    image = _first(source)
    with torch.no_grad():
        try:
            logits = model(image[None].to(device))
        except RuntimeError as error:
            wanted = f"expected {spec} to take images of shape {tuple(image.shape)}"
            raise ValueError(f"{wanted}, got {error}; --size changes it") from error
        classes = expect_logits(logits, 1).shape[1]
    if source.classes and len(source.classes) != classes:
        raise ValueError(
            f"expected images of {classes} classes, as {spec} knows, got {len(source.classes)}; "
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
    weights = storage.digest(model, found)
    return Subject(label(spec), model, classes, found, tuple(left_out), weights)


def _first(source: Source) -> torch.Tensor:
    """Return the first image that can be read."""
    for number in range(len(source)):
        try:
            return source[number].image
        except CorruptImage:
            continue
    raise ValueError(f"expected images that can be read, got none of {len(source)}")


def _interpreter(
    name: str, spec: str, model: nn.Module, settings: Settings, side: int
) -> Interpreter:
    if name in ("RTS", "RTS-A"):
        return RTS(model, _masking_model(name, spec, model, settings))
    if name in INTERPRETERS:
        return INTERPRETERS[name](model, settings, side)
    if ":" not in name:
        raise ValueError(
            f"expected an interpreter from {', '.join((*INTERPRETERS, 'RTS', 'RTS-A'))}, or "
            f"package.module:function, got {name}"
        )
    built = make(name, model)
    expect(built, Interpreter, name)
    return built  # type: ignore[no-any-return]


def _masking_model(name: str, spec: str, model: nn.Module, settings: Settings) -> MaskingModel:
    """Return the masking model of RTS or RTS-A: that of a file, or the one that comes along."""
    file = settings.masking_model if name == "RTS" else settings.distilled_model
    if file:
        found = MaskingModel.load(file, model)
    elif (spec, name) in _MASKING:
        encoder = model if spec == "embedded:resnet" else load_resnet()
        found = load_rts(encoder, _MASKING[spec, name])
    else:
        option = "--masking-model" if name == "RTS" else "--distilled-model"
        raise _Unavailable(f"{name} on {spec} needs a masking model: {option} FILE")
    return found.to(next(model.parameters()).device)
