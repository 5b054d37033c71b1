# SPDX-License-Identifier: MIT
"""Classifiers and interpreters by name, as a command line gives them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import nn

from captum_adv2 import storage
from captum_adv2.interpreters import (
    CAM,
    MASK,
    RTS,
    CaptumInterpreter,
    Ensemble,
    GradCAM,
    Gradient,
    IntegratedGradients,
    Interpreter,
    MaskingModel,
    SmoothGrad,
)
from captum_adv2.spec import expect, expect_logits
from captum_adv2.study.classifiers import load_model
from captum_adv2.study.data import CorruptImage, Sample, Source, make
from captum_adv2.study.embedded import load_resnet, load_rts
from captum_adv2.study.settings import Settings, label

_SMALL = 128  # pixels: MASK has other settings below it

# Masking models that come along: of a classifier and RTS or RTS-A, the name for `load_rts`.
_MASKING: Mapping[tuple[str, str], str] = {
    ("embedded:resnet", "RTS"): "resnet",
    ("embedded:resnet", "RTS-A"): "resnet-aid",
    ("embedded:densenet", "RTS"): "densenet",
    ("embedded:densenet", "RTS-A"): "densenet-aid",
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

_NAMES = (*INTERPRETERS, "RTS", "RTS-A")


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


def subject(spec: str, settings: Settings, source: Source, device: torch.device) -> Subject:
    """Return a classifier with those of the study's interpreters that it has.

    Args:
        spec: See `Settings`.
        settings: The study's.
        source: Images, which the classifier has to fit.
        device: Device of the classifier and its interpreters.
    """
    known = {*_NAMES, *map(label, settings.interpreters)}
    if unknown := [name for name in settings.adaptive if name not in known]:
        wanted = f"expected adaptive interpreters from {', '.join(_NAMES)}, or --interpreters"
        raise ValueError(f"{wanted}, got {', '.join(unknown)}")
    model = load_model(spec).to(device)
    image = _first(source)
    with torch.no_grad():
        try:
            logits = model(image[None].to(device))
        except RuntimeError as error:
            wanted = f"expected {spec} to take images of shape {tuple(image.shape)}"
            hint = "they are (C, H, W), and --size changes that of pictures"
            raise ValueError(f"{wanted}, got {error}; {hint}") from error
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
            found[label(name)] = build_interpreter(
                name, spec, model, settings, min(image.shape[-2:])
            )
        except _Unavailable as reason:
            left_out.append(str(reason))
    if not found:
        raise ValueError(f"expected an interpreter for {spec}, got none; " + "; ".join(left_out))
    weights = storage.digest(model, found)
    return Subject(label(spec), model, classes, found, tuple(left_out), weights)


def _first(source: Source) -> torch.Tensor:
    """Return the first image that can be read."""
    why = ""
    for number in range(len(source)):
        try:
            sample = source[number]
        except CorruptImage as error:
            why = why or f"; the first: {error}"
        else:
            expect(sample, Sample, f"number {number} of the images")
            return sample.image
    raise ValueError(f"expected images that can be read, got none of {len(source)}{why}")


def build_interpreter(
    name: str, spec: str, model: nn.Module, settings: Settings, side: int
) -> Interpreter:
    """Return an interpreter by name, for images of some shorter side; see `Settings`."""
    if name in ("RTS", "RTS-A"):
        return RTS(model, _masking_model(name, spec, model, settings))
    if name in INTERPRETERS:
        return INTERPRETERS[name](model, settings, side)
    if ":" not in name:
        raise ValueError(
            f"expected an interpreter from {', '.join(_NAMES)}, or "
            f"package.module:function, got {name}"
        )
    built = make(name, model)
    if hasattr(built, "attribute"):  # one of Captum's methods
        built = CaptumInterpreter(built)
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
