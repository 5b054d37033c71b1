# SPDX-License-Identifier: MIT
"""Which images a classifier is studied on: the first of a source that it gets right (§4).

The choice of a larger study begins with that of a smaller one, so that a study can be widened.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch

from captum_adv2 import storage
from captum_adv2.spec import Images, expect
from captum_adv2.study.cases import NOISE, Chunk, noisy
from captum_adv2.study.data import CorruptImage, Sample, Source
from captum_adv2.study.settings import Settings
from captum_adv2.study.subjects import Subject

_BATCH = 50  # images a forward pass
_TRIED = 200  # images that the classifier gets right, on which the level of the noise is set


class Selection(NamedTuple):
    """The images of a source that a classifier is studied on."""

    numbers: Sequence[int]  # of images that it gets right
    names: Sequence[str]  # of these
    labels: Sequence[int]  # of these
    held_out: Sequence[int]  # numbers of further images
    digests: Sequence[str]  # of the samples of ``numbers`` and ``held_out``
    misclassified: int  # number of images that it gets wrong, among those tried
    corrupt: Sequence[str]  # errors of images that could not be read, among those tried
    levels: Sequence[float]  # standard deviation of each of `NOISE`; empty where it is not studied
    tried: int  # number of images on which these were set
    asked: int  # number of images that were asked for
    weights: str  # see `Subject`

    def widened(self, wider: Selection) -> bool:
        """Return whether another selection begins with this one, and holds out the same images."""
        own, new = len(self.numbers), len(wider.numbers)
        return (
            [*wider.numbers[:own]] == [*self.numbers]
            and [*wider.digests[:own], *wider.digests[new:]] == [*self.digests]
            and [*wider.levels] == [*self.levels]
            and wider.weights == self.weights
        )

    def expect_same(self, source: Source) -> None:
        """Raise unless a source still has the images."""
        for number, digest in zip([*self.numbers, *self.held_out], self.digests, strict=True):
            try:
                same = number < len(source) and storage.digest(source[number]) == digest
            except CorruptImage:
                same = False
            if not same:
                name = dict(zip(self.numbers, self.names, strict=True)).get(number, "held out")
                raise ValueError(
                    "expected the images that the study began with, got another or none as number "
                    f"{number} ({name}); choose another folder for the results"
                )


def _read(source: Source, numbers: range, corrupt: list[str]) -> dict[int, Sample]:
    """Return the images that can be read, by number; note the errors of the others."""
    found = {}
    for number in numbers:
        try:
            found[number] = source[number]
        except CorruptImage as error:
            corrupt.append(str(error))
    return found


def select(one: Subject, source: Source, settings: Settings, noise: bool) -> Selection:
    """Choose the first images that a classifier gets right, and hold out the last of the source.

    So what is held out does not depend on the number of images that are studied. At most half of
    the source is held out.

    Args:
        one: The classifier.
        source: Images.
        settings: The study's: how many, and how many more to hold out.
        noise: Also find the levels of noise that make the classifier err.
    """
    corrupt: list[str] = []
    held_out = _last(source, min(settings.held_out, len(source) // 2), corrupt)
    end = min(held_out, default=len(source))
    wanted = max(settings.count, _TRIED if noise else 0)
    found: dict[int, tuple[str, int, str]] = {}  # name, label and digest
    wrong = 0
    for start in range(0, end, _BATCH):
        early = len(found) < settings.count  # later ones serve the noise alone
        batch = range(start, min(start + _BATCH, end))
        samples = _read(source, batch, corrupt if early else [])
        right = _right(one, list(samples.values()))
        for (number, sample), good in zip(samples.items(), right, strict=True):
            if good and len(found) < wanted:
                found[number] = sample.name, sample.label, storage.digest(sample)
            elif len(found) < settings.count:
                wrong += 1
        if len(found) == wanted:
            break
    if not found:
        raise ValueError(
            f"expected images that the classifier gets right, got none of {wrong}; are its logits "
            "numbers, and do the labels follow its order? --classes names it"
        )
    numbers = [*found][: settings.count]
    names, labels, digests = map(list, zip(*(found[number] for number in numbers), strict=True))
    digests += held_out.values()
    tried = [*found][:_TRIED]
    levels = _levels(one, source, tried) if noise else []
    return Selection(
        numbers, names, labels, [*held_out], digests, wrong, corrupt, levels,
        len(tried) if noise else 0, settings.count, one.weights,
    )  # fmt: skip


def _last(source: Source, count: int, corrupt: list[str]) -> dict[int, str]:
    """Return the last images of a source that can be read, by number, with their digests."""
    found: dict[int, str] = {}
    end = len(source)
    while len(found) < count and end:
        start = max(0, end - min(_BATCH, count - len(found)))
        for number, sample in _read(source, range(start, end), corrupt).items():
            found[number] = storage.digest(sample)
        end = start
    return dict(sorted(found.items()))


@torch.no_grad()
def _right(one: Subject, samples: list[Sample]) -> list[bool]:
    """Return which images a classifier gets right."""
    for sample in samples:
        if not 0 <= sample.label < one.classes:
            got = f"{sample.label} of {sample.name}"
            raise ValueError(f"expected labels in [0, {one.classes - 1}], got {got}")
    if not samples:
        return []
    images = torch.stack([sample.image for sample in samples])
    expect(images, Images, f"the images {samples[0].name} to {samples[-1].name}")
    logits = one.model(images.to(next(one.model.parameters()).device))
    known = logits.isfinite().all(dim=1)  # a NaN would be the largest logit
    guesses = logits.argmax(dim=1).where(known, -1).tolist()
    return [guess == sample.label for guess, sample in zip(guesses, samples, strict=True)]


@torch.no_grad()
def _levels(one: Subject, source: Source, numbers: Sequence[int]) -> list[float]:
    """Return the least level of each of `NOISE` with which the classifier errs often enough."""
    device = next(one.model.parameters()).device
    chunk = Chunk.of(source, numbers, one.classes, 0, device)

    def errors(kind: str, level: float) -> float:
        parts = torch.split(noisy(chunk, kind, level), _BATCH)
        predicted = torch.cat([one.model(images).argmax(dim=1) for images in parts])
        return float((predicted != chunk.labels).double().mean())

    return [_least(partial(errors, kind), share) for kind, share in NOISE]


def _least(errors: Callable[[float], float], share: float) -> float:
    """Return, by bisection of [0, 1], the least level with a share of errors."""
    low, high = 0.0, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if errors(middle) < share else (low, middle)
    return high
