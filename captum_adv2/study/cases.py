# SPDX-License-Identifier: MIT
"""Cases of a study: nothing, an attack or noise, done to a chunk of images and then measured.

A case is crafted on some images at a time and depends on nothing but these, the model, the seed and
the settings. Hence it does not matter which process works on it, nor when.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torchattacks import PGD, Square

from captum_adv2.attacks import (
    ADV2,
    BitDepthADV2,
    QueryADV2,
    RandomClass,
    RandomPatch,
    Squeezing,
    StADV2,
)
from captum_adv2.attacks.frameworks import quantize
from captum_adv2.attacks.targets import TargetMap
from captum_adv2.defenses import BitDepth, FeatureSqueezing, MedianSmoothing, NonLocalMeans
from captum_adv2.evaluation import localization, metrics, robustness
from captum_adv2.study.data import Source
from captum_adv2.study.settings import Settings
from captum_adv2.study.subjects import Subject

SQUEEZERS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "2 bits": BitDepth(2, straight_through=True),
    "3 bits": BitDepth(3, straight_through=True),
    "3x3": MedianSmoothing(3),
    "11-3-4": NonLocalMeans(),
}
"""The squeezers of Table 4, which the adaptive attacks know with a gradient."""

NOISE = tuple((kind, share) for kind in ("normal", "uniform") for share in (0.03, 0.30))
"""Kind of noise, and share of the images on which it makes the classifier err (Figure 15)."""

DISTILLED = "RTS-A"
"""The interpreter trained against ADV2; it is compared with RTS, not studied for itself."""

CURVE = "curve"
"""The case that finds the least eps; see `captum_adv2.evaluation.robustness`."""

_MATCHING = 5.0  # weight of the further term of Algorithm 2


def known(attack: str) -> str:
    """Return the squeezer that an adaptive attack knows.

    >>> known("adaptive:2 bits"), known("adaptive:2 bits, Algorithm 2")
    ('2 bits', '2 bits')
    """
    return attack.partition(":")[2].partition(",")[0]


class Chunk(NamedTuple):
    """Images that are worked on together."""

    numbers: tuple[int, ...]  # in their source
    images: Tensor  # (B, C, H, W) in [0, 1]
    labels: Tensor  # (B,)
    target: Tensor  # the attacker's classes (B,), drawn from the seed
    boxes: tuple[Tensor, ...]  # true boxes of each image, (K, 4)
    seed: int

    @classmethod
    def of(
        cls, source: Source, numbers: Sequence[int], classes: int, seed: int, device: torch.device
    ) -> Self:
        """Read some images of a source."""
        samples = [source[number] for number in numbers]
        labels = [sample.label for sample in samples]
        wanted = [draw_target(seed, *pair, classes) for pair in zip(numbers, labels, strict=True)]
        return cls(
            tuple(numbers),
            torch.stack([sample.image for sample in samples]).to(device),
            torch.tensor(labels, device=device),
            torch.tensor(wanted, device=device),
            tuple(sample.boxes for sample in samples),
            seed,
        )


def draw_target(seed: int, number: int, own: int, classes: int) -> int:
    """Return a class other than an image's own, drawn for this image alone.

    >>> draw_target(0, 12, 3, 10) == draw_target(0, 12, 3, 10) != 3
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


class Case(NamedTuple):
    """One thing done to images."""

    attack: str  # its name, see `frame`
    aimed: str  # interpreter that it knows of; empty for none
    explained: tuple[str, ...]  # interpreters whose maps are measured
    craft: Callable[[Chunk], Tensor]  # makes adversarial images of a chunk's
    # Classes (B,) that maps explain, from the chunk and the classes predicted.
    reached: Callable[[Chunk, Tensor], Tensor] = lambda chunk, predicted: chunk.target
    aim: TargetMap | None = None  # the maps that it aims at, if not the benign ones


class Plan(NamedTuple):
    """All cases of a classifier's images."""

    subject: Subject
    settings: Settings
    seed: int
    pool: tuple[Tensor, Tensor] | None  # images and classes for the maps of other classes
    levels: Mapping[tuple[str, float], float]  # of the noise, see `NOISE`; empty without

    @property
    def main(self) -> tuple[str, ...]:
        """Interpreters that are studied for themselves."""
        return tuple(name for name in self.subject.interpreters if name != DISTILLED)

    def cases(self) -> Iterator[Case]:
        """Yield the cases; the benign one, which leaves the images as they are, comes first."""
        every = tuple(self.subject.interpreters)
        yield Case("benign", "", every, lambda chunk: chunk.images, lambda chunk, _: chunk.labels)
        if "pgd" in self.settings.frameworks:
            yield from self._pixels(every)
        if "stadv" in self.settings.frameworks:
            yield from self._flows()
        if "query" in self.settings.frameworks:
            yield from self._queries()
        for name in every if self.settings.curve else ():
            yield Case(CURVE, name, (name,), lambda chunk: chunk.images)
        for (kind, share), level in self.levels.items():
            both = tuple(name for name in every if name in ("RTS", DISTILLED))
            craft = partial(noisy, kind=kind, level=level)
            yield Case(f"noise:{kind}:{share}", "", both, craft, lambda _, predicted: predicted)

    def _pixels(self, every: tuple[str, ...]) -> Iterator[Case]:
        settings, model = self.settings, self.subject.model
        pgd = PGD(model, eps=settings.eps, steps=settings.steps, random_start=False)
        yield Case("PGD", "", every, partial(_towards, pgd))
        if "benign" in settings.targets:
            for name in every:
                yield Case("ADV2", name, (name,) if name == DISTILLED else every, self._adv2(name))
        for attack, aim in self._aims().items():
            for name in self.main:
                craft = self._adv2(name, target_map=aim)
                yield Case(attack, name, (name,), craft, aim=aim)
        if settings.detectors:
            for name in (name for name in self.main if name in settings.adaptive):
                yield from self._adaptive(name)

    def _adaptive(self, name: str) -> Iterator[Case]:
        """Yield attacks that know a squeezer: by its gradient, or for bit depths by Algorithm 2."""
        settings, model = self.settings, self.subject.model
        for title, squeezer in SQUEEZERS.items():
            terms = (Squeezing(model, (squeezer,)),)
            yield Case(f"adaptive:{title}", name, (name,), self._adv2(name, terms=terms))
            if isinstance(squeezer, BitDepth):
                second = self._attack(name)
                both = BitDepthADV2(second, squeezer.bits, steps=settings.steps, weight=_MATCHING)
                attack = f"adaptive:{title}, Algorithm 2"
                yield Case(attack, name, (name,), partial(_towards, both))

    def _flows(self) -> Iterator[Case]:
        settings, model = self.settings, self.subject.model
        common: dict[str, Any] = {"bound": settings.bound, "steps": settings.flow_steps}
        regular = StADV2(model, warmup=settings.flow_steps, **common)
        yield Case("stAdv", "", self.main, partial(_towards, regular))
        if "benign" in settings.targets:
            for name in self.main:
                interpreter = self.subject.interpreters[name]
                dual = StADV2(model, interpreter, **common, **self._ending())
                yield Case("StADV2", name, (name,), partial(_towards, dual))

    def _queries(self) -> Iterator[Case]:
        settings, model, seed = self.settings, self.subject.model, self.seed
        square = Square(model, eps=settings.eps, n_queries=settings.queries, seed=seed)
        yield Case("Square", "", self.main, partial(_towards, square))
        for name in self.main if "benign" in settings.targets else ():
            dual = QueryADV2(
                model,
                self.subject.interpreters[name],
                settings.eps,
                settings.queries,
                seed=seed,
                stop=settings.stop or None,
            )
            yield Case("QueryADV2", name, (name,), partial(_towards, dual))

    def _aims(self) -> dict[str, TargetMap]:
        aims: dict[str, TargetMap] = {"patch": RandomPatch(seed=self.seed)}
        if self.pool is not None:
            aims["class"] = RandomClass(*self.pool, seed=self.seed)
        return {name: aim for name, aim in aims.items() if name in self.settings.targets}

    def _adv2(self, name: str, **options: Any) -> Callable[[Chunk], Tensor]:
        return partial(_towards, self._attack(name, **options))

    def _attack(self, name: str, **options: Any) -> ADV2:
        """Return an attack on an interpreter."""
        settings = self.settings
        return ADV2(
            self.subject.model,
            self.subject.interpreters[name],
            eps=settings.eps,
            steps=settings.steps,
            **self._ending(),
            **options,
        )

    def _ending(self) -> dict[str, Any]:
        """Return how attacks on maps choose among their iterates, and end."""
        return {"keep": self.settings.keep or "best", "stop": self.settings.stop or None}


def _towards(attack: Any, chunk: Chunk) -> Tensor:
    attack.set_mode_targeted_by_label(quiet=True)
    adversarial: Tensor = attack(chunk.images, chunk.target)
    return adversarial


def measure(case: Case, plan: Plan, chunk: Chunk, benign: Mapping[str, Tensor]) -> dict[str, Any]:
    """Craft the images of a case, and measure maps and predictions.

    Args:
        case: The case.
        plan: The plan that it is of.
        chunk: The images.
        benign: Maps of the benign case, by interpreter; empty for that case itself.

    Returns:
        On the CPU: ``images`` uint8; ``target``, the classes explained; ``measures`` by interpreter
        and name; ``maps`` and, where there is one, ``aim`` by interpreter; ``scores`` of each
        squeezer; ``boxes`` by interpreter, of clean images.
    """
    if case.attack == CURVE:
        return _cpu(_least(case, plan, chunk))  # type: ignore[no-any-return]
    images = quantize(case.craft(chunk)).clamp(0, 1)
    with torch.no_grad():
        logits = plan.subject.model(images)
    target = case.reached(chunk, logits.argmax(dim=1))
    prediction = {
        "success": metrics.success(logits, target) & (target != chunk.labels),
        "confidence": metrics.confidence(logits, target),
    }
    found: dict[str, Any] = {"measures": {}, "maps": {}, "aim": {}, "scores": scores(plan, images)}
    found |= {"images": (images * 255).round().byte(), "target": target}
    for name in case.explained:
        interpreter = plan.subject.interpreters[name]
        maps = interpreter(images, target).detach()
        own = aim = benign.get(name, maps).to(images)
        if case.aim is not None:
            found["aim"][name] = aim = case.aim(interpreter, chunk.images, chunk.labels, target)
        found["maps"][name] = maps
        distances = _distances(maps, own, aim, plan.settings.threshold)
        missed = _unknown(chunk) if benign else _missed(maps, chunk, plan.settings.threshold)
        found["measures"][name] = prediction | distances | {"missed": missed}
    if not benign and any(map(len, chunk.boxes)):
        found["boxes"] = {name: tried(maps, chunk) for name, maps in found["maps"].items()}
    if not benign and {"RTS", DISTILLED} <= found["maps"].keys():
        drift = metrics.l1(*(found["maps"][name] for name in (DISTILLED, "RTS")))
        found["measures"][DISTILLED]["drift"] = drift
    return {name: _cpu(value) for name, value in found.items()}


def _least(case: Case, plan: Plan, chunk: Chunk) -> dict[str, Any]:
    """Return, in place of measures, the least eps that fools an interpreter."""
    subject = plan.subject
    found = robustness(
        subject.model,
        subject.interpreters[case.aimed],
        chunk.images,
        chunk.target,
        chunk.labels,
        steps=plan.settings.steps,
        threshold=plan.settings.threshold,
    )
    nothing = {"maps": {}, "aim": {}, "scores": chunk.images.new_zeros(len(chunk.images), 0)}
    measures = {case.aimed: {"least": found.least}}
    return nothing | {"target": chunk.target, "measures": measures}


def held_out(plan: Plan, chunk: Chunk, tune: int) -> dict[str, Any]:
    """Return the scores of held-out images; of the first, what each threshold makes of boxes."""
    boxes: dict[str, Tensor] = {}
    if tune and any(map(len, chunk.boxes)):
        for name, interpreter in plan.subject.interpreters.items():
            boxes[name] = tried(interpreter(chunk.images[:tune], chunk.labels[:tune]), chunk)
    return _cpu({"scores": scores(plan, chunk.images), "boxes": boxes})  # type: ignore[no-any-return]


def _distances(maps: Tensor, own: Tensor, aim: Tensor, threshold: float) -> dict[str, Tensor]:
    """Return distances to the benign map and to the map aimed at."""
    return {
        "l1": metrics.l1(maps, own),
        "l2": metrics.l2(maps, own),
        "iou": metrics.iou(maps, own, threshold),
        "iou_mean": metrics.iou(_salient(maps), _salient(own)),
        "target_l1": metrics.l1(maps, aim),
        "target_iou": metrics.iou(maps, aim, threshold),
    }


def _salient(maps: Tensor) -> Tensor:
    """Return 1 for the pixels above their map's mean, 0 for others."""
    return (maps > maps.mean(dim=(1, 2, 3), keepdim=True)).float()


def scores(plan: Plan, images: Tensor) -> Tensor:
    """Return how far each squeezer moves the predictions of images, ``(B, S)``; see `SQUEEZERS`."""
    if not plan.settings.detectors:
        return images.new_zeros(len(images), 0)
    return FeatureSqueezing(plan.subject.model, tuple(SQUEEZERS.values())).scores(images)


def _missed(maps: Tensor, chunk: Chunk, threshold: float) -> Tensor:
    """Return 1 where the map's box misses the object's, 0 where not, NaN where it is unknown."""
    height, width = chunk.images.shape[-2:]
    missed, known = _unknown(chunk), [i for i, boxes in enumerate(chunk.boxes) if len(boxes)]
    if known:
        found = localization.boxes(maps[known], (height, width), threshold).cpu()
        missed[known] = localization.wrong(found, [chunk.boxes[i] for i in known]).float()
    return missed


def tried(maps: Tensor, chunk: Chunk) -> Tensor:
    """Return the same for all of `localization.THRESHOLDS`, ``(B, K)``; NaN past the maps."""
    height, width = chunk.images.shape[-2:]
    missed = _unknown(chunk)[:, None].repeat(1, len(localization.THRESHOLDS))
    known = [i for i, boxes in enumerate(chunk.boxes[: len(maps)]) if len(boxes)]
    if known:
        truth = [chunk.boxes[i] for i in known]
        missed[known] = localization.errors(maps[known].cpu(), (height, width), truth).float()
    return missed


def _unknown(chunk: Chunk) -> Tensor:
    return torch.full((len(chunk.numbers),), torch.nan)


def _cpu(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _cpu(inner) for name, inner in value.items()}
    return value.detach().cpu()
