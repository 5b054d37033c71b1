# SPDX-License-Identifier: MIT
"""Which images a classifier is studied on: the first of a source that it gets right (§4)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from captum_adv2.study.cases import NOISE, Chunk, noisy
from captum_adv2.study.data import CorruptImage, Sample, Source
from captum_adv2.study.settings import Settings

_BATCH = 50  # images a forward pass
_TRIED = 200  # images on which the level of the noise is set


class Selection(NamedTuple):
    """The images of a source that a classifier is studied on."""

    numbers: list[int]  # of images that it gets right
    names: list[str]  # of these
    labels: list[int]  # of these
    held_out: list[int]  # numbers of further images
    misclassified: int  # number of images that it gets wrong, among those tried
    corrupt: list[str]  # errors of images that could not be read, among those tried
    levels: list[float]  # standard deviation of each of `NOISE`; empty where it is not studied


def _read(source: Source, numbers: range, corrupt: list[str]) -> dict[int, Sample]:
    """Return the images that can be read, by number; note the errors of the others."""
    found = {}
    for number in numbers:
        try:
            found[number] = source[number]
        except CorruptImage as error:
            corrupt.append(str(error))
    return found


def select(
    model: nn.Module, source: Source, settings: Settings, classes: int, noise: bool
) -> Selection:
    """Choose the first images that a classifier gets right.

    Args:
        model: The classifier.
        source: Images.
        settings: The study's: how many, and how many more to hold out.
        classes: Number of the classifier's classes.
        noise: Also find the levels of noise that make the classifier err.
    """
    chosen = Selection([], [], [], [], 0, [], [])
    wrong = 0
    for start in range(0, len(source), _BATCH):
        batch = range(start, min(start + _BATCH, len(source)))
        samples = _read(source, batch, chosen.corrupt)
        right = _right(model, list(samples.values()))
        for (number, sample), good in zip(samples.items(), right, strict=True):
            if len(chosen.numbers) == settings.count:
                chosen.held_out.append(number)
            elif good:
                chosen.numbers.append(number)
                chosen.names.append(sample.name)
                chosen.labels.append(sample.label)
            else:
                wrong += 1
        if len(chosen.numbers) == settings.count and len(chosen.held_out) >= settings.held_out:
            break
    if not chosen.numbers:
        raise ValueError(
            f"expected images that the classifier gets right, got none of {wrong}; do the labels "
            "follow the classifier's order? --classes names it"
        )
    del chosen.held_out[settings.held_out :]
    levels = _levels(model, source, chosen, classes) if noise else []
    return chosen._replace(misclassified=wrong, levels=levels)


@torch.no_grad()
def _right(model: nn.Module, samples: list[Sample]) -> list[bool]:
    """Return which images a classifier gets right."""
    if not samples:
        return []
    images = torch.stack([sample.image for sample in samples])
    predicted = model(images.to(next(model.parameters()).device)).argmax(dim=1).tolist()
    return [guess == sample.label for guess, sample in zip(predicted, samples, strict=True)]


@torch.no_grad()
def _levels(model: nn.Module, source: Source, chosen: Selection, classes: int) -> list[float]:
    """Return the least level of each of `NOISE` with which the classifier errs often enough."""
    device = next(model.parameters()).device
    chunk = Chunk.of(source, chosen.numbers[:_TRIED], classes, 0, device)

    def errors(kind: str, level: float) -> float:
        parts = torch.split(noisy(chunk, kind, level), _BATCH)
        predicted = torch.cat([model(images).argmax(dim=1) for images in parts])
        return float((predicted != chunk.labels).double().mean())

    return [_least(partial(errors, kind), share) for kind, share in NOISE]


def _least(errors: Callable[[float], float], share: float) -> float:
    """Return, by bisection of [0, 1], the least level with a share of errors."""
    low, high = 0.0, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if errors(middle) < share else (low, middle)
    return high
