# SPDX-License-Identifier: MIT
"""Which images a classifier is studied on: the first of a source that it gets right (§4)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from captum_adv2.study.cases import NOISE, Chunk, noisy
from captum_adv2.study.settings import Settings
from captum_adv2.study.sources import CorruptImage, Sample, Source

__all__ = ["Selection", "read", "select"]

_BATCH = 50  # images a forward pass
_TRIED = 200  # images on which the level of the noise is set


class Selection(NamedTuple):
    """Which images of a source a classifier is studied on.

    Attributes:
        numbers: Of images it gets right.
        names, labels: Of these.
        held_out: Numbers of further images.
        misclassified: How many it got wrong on the way.
        corrupt: What could not be read on the way, and why.
        levels: Standard deviation of each noise of `NOISE`.
    """

    numbers: list[int]
    names: list[str]
    labels: list[int]
    held_out: list[int]
    misclassified: int
    corrupt: list[str]
    levels: list[float]


def read(source: Source, numbers: list[int], corrupt: list[str]) -> tuple[list[int], list[Sample]]:
    """Return the images that can be read, and their numbers; note what cannot."""
    found = {}
    for number in numbers:
        try:
            found[number] = source[number]
        except CorruptImage as error:
            corrupt.append(str(error))
    return list(found), list(found.values())


def select(
    model: nn.Module, source: Source, settings: Settings, classes: int, noise: bool
) -> Selection:
    """Choose the first images that a classifier gets right.

    Args:
        model: The classifier.
        source: Images.
        settings: The study's: how many, and how many more to hold out.
        classes: How many classes the classifier knows.
        noise: Also find how much noise makes the classifier err.

    Raises:
        ValueError: It gets none of them right.
    """
    device = next(model.parameters()).device
    chosen = Selection([], [], [], [], 0, [], [])
    misclassified = 0
    batches = _batches(source)
    for numbers in batches:
        numbers, samples = read(source, numbers, chosen.corrupt)
        right = _right(model, samples, device)
        for number, sample, good in zip(numbers, samples, right, strict=True):
            if len(chosen.numbers) == settings.count:
                chosen.held_out.append(number)
            elif good:
                chosen.numbers.append(number)
                chosen.names.append(sample.name)
                chosen.labels.append(sample.label)
            else:
                misclassified += 1
        if len(chosen.numbers) == settings.count and len(chosen.held_out) >= settings.held_out:
            break
    if not chosen.numbers:
        raise ValueError(
            f"expected images that the classifier gets right, got none of {misclassified}; do the "
            "labels follow the classifier's order? --classes names it"
        )
    del chosen.held_out[settings.held_out :]
    levels = _levels(model, source, chosen, classes, device) if noise else []
    return chosen._replace(misclassified=misclassified, levels=levels)


def _batches(source: Source) -> Iterator[list[int]]:
    for start in range(0, len(source), _BATCH):
        yield list(range(start, min(start + _BATCH, len(source))))


@torch.no_grad()
def _right(model: nn.Module, samples: list[Sample], device: torch.device) -> list[bool]:
    """Return which images a classifier gets right."""
    if not samples:
        return []
    images = torch.stack([sample.image for sample in samples]).to(device)
    predicted = model(images).argmax(dim=1).tolist()
    return [guess == sample.label for guess, sample in zip(predicted, samples, strict=True)]


@torch.no_grad()
def _levels(
    model: nn.Module, source: Source, chosen: Selection, classes: int, device: torch.device
) -> list[float]:
    """Return the least noise of each of `NOISE` with which the classifier errs often enough."""
    numbers, samples = read(source, chosen.numbers[:_TRIED], [])
    chunk = Chunk.of(tuple(numbers), samples, classes, 0, device)

    def errors(kind: str, level: float) -> float:
        images = noisy(chunk, kind, level)
        predicted = [model(part).argmax(dim=1) for part in torch.split(images, _BATCH)]
        return float((torch.cat(predicted) != chunk.labels).double().mean())

    return [_least(partial(errors, kind), share) for kind, share in NOISE]


def _least(errors: Callable[[float], float], share: float) -> float:
    """Return, by bisection of [0, 1], the least level with a share of errors."""
    low, high = 0.0, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if errors(middle) < share else (low, middle)
    return high
