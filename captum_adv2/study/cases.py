# SPDX-License-Identifier: MIT
"""What a study does to each chunk of images: nothing, attacks, noise; and what it then measures.

A case is crafted on some images at a time and depends on nothing but these, the model, the seed and
the settings. Hence it does not matter which process works on it, nor when.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchattacks import PGD

from captum_adv2.attacks import ADV2, MapDistance, RandomClass, RandomPatch, Squeezing, StADV2
from captum_adv2.attacks.frameworks import quantize
from captum_adv2.defenses import BitDepth, FeatureSqueezing, MedianSmoothing, NonLocalMeans
from captum_adv2.evaluation import localization, metrics
from captum_adv2.study.settings import Settings
from captum_adv2.study.sources import Sample
from captum_adv2.study.subjects import Subject
from captum_adv2.types import TargetMap

__all__ = ["NOISE", "SQUEEZERS", "Case", "Chunk", "Plan", "measure", "noisy", "target"]

SQUEEZERS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "2 bits": BitDepth(2, straight_through=True),
    "3 bits": BitDepth(3, straight_through=True),
    "3x3": MedianSmoothing(3),
    "11-3-4": NonLocalMeans(),
}
"""The squeezers of Table 4, which the adaptive attacks know with a gradient."""

NOISE = tuple((kind, share) for kind in ("normal", "uniform") for share in (0.03, 0.30))
"""Kind of noise, and share of the images on which it makes the classifier err (Figure 15)."""

_DISTILLED = "RTS-A"  # not explained by itself, but compared with RTS: Figures 15 and 16
_EVASION = 5.0  # weight of the term against a squeezer
_FAR = 15.0  # of a far target map, which at the default, 150, would outweigh the prediction


class Chunk(NamedTuple):
    """Images that are worked on together.

    Attributes:
        numbers: Of the images in their source.
        images: ``(B, C, H, W)`` in [0, 1].
        labels: Their classes ``(B,)``.
        target: The attacker's classes ``(B,)``.
        boxes: True boxes of each image, ``(K, 4)``.
        seed: The study's.
    """

    numbers: tuple[int, ...]
    images: Tensor
    labels: Tensor
    target: Tensor
    boxes: tuple[Tensor, ...]
    seed: int

    @classmethod
    def of(
        cls,
        numbers: tuple[int, ...],
        samples: list[Sample],
        classes: int,
        seed: int,
        device: torch.device | str,
    ) -> Chunk:
        """Return the chunk of some samples; target classes come from the seed."""
        labels = [sample.label for sample in samples]
        pairs = zip(numbers, labels, strict=True)
        wanted = [target(seed, number, own, classes) for number, own in pairs]
        return cls(
            numbers,
            torch.stack([sample.image for sample in samples]).to(device),
            torch.tensor(labels, device=device),
            torch.tensor(wanted, device=device),
            tuple(sample.boxes for sample in samples),
            seed,
        )


class Case(NamedTuple):
    """Something done to images.

    Attributes:
        attack: Its name, see `records.ATTACKS`.
        aimed: Interpreter that it knows of; empty for none.
        explained: Interpreters whose maps are looked at.
        craft: Makes adversarial images ``(B, C, H, W)`` of a chunk's.
        reached: Classes ``(B,)`` that maps explain, from the chunk and the classes predicted.
        aim: The maps it aims at; ``None``: the benign ones.
    """

    attack: str
    aimed: str
    explained: tuple[str, ...]
    craft: Callable[[Chunk], Tensor]
    reached: Callable[[Chunk, Tensor], Tensor] = lambda chunk, predicted: chunk.target
    aim: TargetMap | None = None


def target(seed: int, number: int, own: int, classes: int) -> int:
    """Return a class other than an image's own, drawn for this image alone.

    >>> target(0, 12, 3, 10) == target(0, 12, 3, 10) != 3
    True
    """
    return (own + random.Random(f"{seed}:{number}").randrange(1, classes)) % classes


def noisy(chunk: Chunk, kind: str, level: float) -> Tensor:
    """Return the images with noise of a standard deviation, drawn for each image alone."""
    drawn = []
    for number, image in zip(chunk.numbers, chunk.images, strict=True):
        own = random.Random(f"{chunk.seed}:{number}:{kind}").getrandbits(60)
        source = torch.Generator().manual_seed(own)
        if kind == "normal":
            noise = torch.randn(image.shape, generator=source)
        else:
            noise = 3**0.5 * (2 * torch.rand(image.shape, generator=source) - 1)
        drawn.append(noise.to(image))
    return (chunk.images + level * torch.stack(drawn)).clamp(0, 1)


class Plan(NamedTuple):
    """What a study does to every image of a classifier.

    Attributes:
        subject: Classifier and interpreters.
        settings: The study's.
        seed: One of its seeds.
        pool: Images ``(N, C, H, W)`` and their classes ``(N,)``, for the maps of other classes;
            ``None`` where none are held out.
        levels: Standard deviations of the noise, see `NOISE`; none where noise is not studied.
    """

    subject: Subject
    settings: Settings
    seed: int
    pool: tuple[Tensor, Tensor] | None
    levels: Mapping[tuple[str, float], float]

    @property
    def main(self) -> tuple[str, ...]:
        """Interpreters that are studied for themselves."""
        return tuple(name for name in self.subject.interpreters if name != _DISTILLED)

    def cases(self) -> Iterator[Case]:
        """Yield what is done; the benign case, in which nothing is, comes first."""
        everyone = tuple(self.subject.interpreters)
        yield Case("benign", "", everyone, _untouched, lambda chunk, predicted: chunk.labels)
        if "pgd" in self.settings.frameworks:
            yield from self._pixels(everyone)
        if "stadv" in self.settings.frameworks:
            yield from self._flows()
        for (kind, share), level in self.levels.items():
            both = tuple(name for name in everyone if name in ("RTS", _DISTILLED))
            craft = partial(noisy, kind=kind, level=level)
            yield Case(f"noise:{kind}:{share}", "", both, craft, lambda chunk, predicted: predicted)

    def _pixels(self, everyone: tuple[str, ...]) -> Iterator[Case]:
        settings, model = self.settings, self.subject.model
        pgd = PGD(model, eps=settings.eps, steps=settings.steps, random_start=False)
        yield Case("PGD", "", everyone, partial(_towards, pgd))
        if "benign" in settings.targets:
            for name in everyone:
                judges = (name,) if name == _DISTILLED else everyone
                yield Case("ADV2", name, judges, self._adv2(name))
        for title, aim in self._aims().items():
            for name in self.main:
                scaled = self.subject.interpreters[name].scaled
                distance = MapDistance(_FAR, shape=0.5 if scaled else 0.0)
                craft = self._adv2(name, target_map=aim, interpretation=distance)
                yield Case(title, name, (name,), craft, aim=aim)
        if settings.detectors:
            for name in (name for name in self.main if name in settings.adaptive):
                for known, squeezer in SQUEEZERS.items():
                    terms = (Squeezing(model, (squeezer,), weight=_EVASION),)
                    yield Case(f"adaptive:{known}", name, (name,), self._adv2(name, terms=terms))

    def _flows(self) -> Iterator[Case]:
        settings, model = self.settings, self.subject.model
        common: dict[str, Any] = {"bound": settings.bound, "steps": settings.flow_steps}
        regular = StADV2(model, warmup=settings.flow_steps, **common)
        yield Case("stAdv", "", self.main, partial(_towards, regular))
        if "benign" in settings.targets:
            for name in self.main:
                interpreter = self.subject.interpreters[name]
                dual = StADV2(model, interpreter, stop=settings.stop or None, **common)
                yield Case("StADV2", name, (name,), partial(_towards, dual))

    def _aims(self) -> dict[str, TargetMap]:
        aims: dict[str, TargetMap] = {"patch": RandomPatch(seed=self.seed)}
        if self.pool is not None:
            aims["class"] = RandomClass(*self.pool, seed=self.seed)
        return {name: aim for name, aim in aims.items() if name in self.settings.targets}

    def _adv2(self, name: str, **how: Any) -> Callable[[Chunk], Tensor]:
        """Return an attack on an interpreter."""
        subject, settings = self.subject, self.settings
        interpreter = subject.interpreters[name]
        common: dict[str, Any] = {"eps": settings.eps, "steps": settings.steps}
        attack = ADV2(subject.model, interpreter, stop=settings.stop or None, **common, **how)
        return partial(_towards, attack)


def _untouched(chunk: Chunk) -> Tensor:
    return chunk.images


def _towards(attack: Any, chunk: Chunk) -> Tensor:
    attack.set_mode_targeted_by_label(quiet=True)
    adversarial: Tensor = attack(chunk.images, chunk.target)
    return adversarial


def measure(case: Case, plan: Plan, chunk: Chunk, benign: Mapping[str, Tensor]) -> dict[str, Any]:
    """Work on a case: craft images, look at maps and predictions; return all of it on the CPU.

    Args:
        case: What is done.
        plan: Where it comes from.
        chunk: The images.
        benign: Maps of the benign case, by interpreter; empty for that case itself.

    Returns:
        ``images`` uint8; ``target`` that was reached for; ``measures`` by interpreter and name;
        ``maps`` and, where there is one, ``aim`` by interpreter; ``scores`` of each squeezer.
    """
    settings = plan.settings
    images = quantize(case.craft(chunk)).clamp(0, 1)
    with torch.no_grad():
        logits = plan.subject.model(images)
    target = case.reached(chunk, logits.argmax(dim=1))
    maps: dict[str, Tensor] = {}
    aims: dict[str, Tensor] = {}
    measures: dict[str, dict[str, Tensor]] = {}
    for name in case.explained:
        interpreter = plan.subject.interpreters[name]
        maps[name] = interpreter(images, target).detach()
        own = benign.get(name, maps[name]).to(images)
        aims[name] = own
        if case.aim is not None:
            aims[name] = case.aim(interpreter, chunk.images, chunk.labels, target)
        measures[name] = {
            "success": metrics.success(logits, target) & (target != chunk.labels),
            "confidence": metrics.confidence(logits, target),
            "l1": metrics.l1(maps[name], own),
            "l2": metrics.l2(maps[name], own),
            "iou": metrics.iou(maps[name], own, settings.threshold),
            "target_l1": metrics.l1(maps[name], aims[name]),
            "target_iou": metrics.iou(maps[name], aims[name], settings.threshold),
            "missed": _missed(maps[name], chunk, settings) if not benign else _unknown(chunk),
        }
    found = {
        "images": (images * 255).round().byte(),
        "target": target,
        "measures": measures,
        "maps": maps,
        "aim": aims if case.aim is not None else {},
        "scores": scores(plan, images),
    }
    return {name: _cpu(value) for name, value in found.items()}


def scores(plan: Plan, images: Tensor) -> Tensor:
    """Return how far each squeezer moves the predictions of images, ``(B, S)``; see `SQUEEZERS`."""
    if not plan.settings.detectors:
        return images.new_zeros(len(images), 0)
    return FeatureSqueezing(plan.subject.model, SQUEEZERS.values()).scores(images)


def _missed(maps: Tensor, chunk: Chunk, settings: Settings) -> Tensor:
    """Return 1 where the map's box misses the object's, 0 where not, NaN where it is unknown."""
    height, width = chunk.images.shape[-2:]
    missed, known = _unknown(chunk), [i for i, boxes in enumerate(chunk.boxes) if len(boxes)]
    if known:
        found = localization.boxes(maps[known], (height, width), settings.threshold).cpu()
        missed[known] = localization.wrong(found, [chunk.boxes[i] for i in known]).float()
    return missed


def _unknown(chunk: Chunk) -> Tensor:
    return torch.full((len(chunk.numbers),), torch.nan)


def _cpu(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _cpu(inner) for name, inner in value.items()}
    return value.detach().cpu()
