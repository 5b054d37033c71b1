# SPDX-License-Identifier: MIT
"""What the command does to pictures: PGD, and ADV2 on each interpreter, judged from their files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torchattacks import PGD
from torchvision.transforms import v2

from captum_adv2.attacks.adv2 import ADV2
from captum_adv2.attacks.targets import RandomPatch
from captum_adv2.evaluation.evaluate import Report, evaluate
from captum_adv2.interpreters import Interpreter
from captum_adv2.progress import progress_bar
from captum_adv2.study.classifiers import Classifier
from captum_adv2.study.data import read

_TOGETHER = 8  # pictures in memory at a time


@dataclass(frozen=True)
class Scene:
    """Pictures, and all that is needed to attack them."""

    classifier: Classifier
    images: Tensor  # (N, 3, H, W) in [0, 1]
    own: Tensor  # (N,), their classes
    target: Tensor  # (N,), the classes to reach
    interpreters: Mapping[str, Interpreter]
    map: str  # what maps should show: benign, patch, or a file
    drawn: Tensor | None  # what is in the file, (1, 1, H, W)
    settings: Mapping[str, Any]  # of both attacks
    seed: int

    def parts(self) -> Iterator[Scene]:
        """Yield the scene in parts of a few pictures."""
        for start in range(0, len(self.images), _TOGETHER):
            part = slice(start, start + _TOGETHER)
            yield replace(
                self, images=self.images[part], own=self.own[part], target=self.target[part]
            )


class Row(NamedTuple):
    """A picture after an attack, read from its file, under one interpreter."""

    picture: int  # its number
    attack: str  # "benign", "PGD" or "ADV2"
    interpreter: str
    image: Tensor  # (3, H, W)
    map: Tensor  # (1, h, w)
    label: int  # the class that it has now
    probability: float
    file: Path
    success: bool  # whether that is the class to reach; of a benign one, its own
    l1: float  # of its map and the one to show
    l2: float
    iou: float
    linf: float  # largest change of a pixel


class Store(Protocol):
    """Writes images to files."""

    def save(self, image: Tensor, picture: int, name: str) -> Path:
        """Write an image ``(C, H, W)`` of a picture, by its number; return the file."""


def attacked(scene: Scene, store: Store, *, verbose: bool) -> Iterator[Row]:
    """Attack pictures; yield what became of them."""
    first = 0
    for part in scene.parts():
        yield from _attacked(part, store, first, verbose)
        first += len(part.images)


def _attacked(scene: Scene, store: Store, first: int, verbose: bool) -> Iterator[Row]:
    """Attack the pictures of one part of a scene."""
    model, clean, target = scene.classifier.model, scene.images, scene.target
    given = {"benign": clean, "PGD": _regular(scene, verbose)}
    stored = {name: _stored(images, store, first, name) for name, images in given.items()}
    for name, interpreter in scene.interpreters.items():
        aim = aimed(scene, interpreter)
        attack = ADV2(model, interpreter, verbose=verbose, **scene.settings)
        attack.attack = f"ADV2 on {name}"  # the title of the progress bar
        attack.set_mode_targeted_by_label(quiet=True)
        both = attack(clean, target, target_maps=aim)
        stored["ADV2"] = _stored(both, store, first, f"ADV2-{name}")
        for title, (images, paths) in stored.items():
            classes = scene.own if title == "benign" else target
            report = evaluate(model, interpreter, clean, images, classes, benign_maps=aim)
            for number, image_map in enumerate(report.adversarial_maps):
                store.save(_large(image_map, clean), first + number, f"{title}-{name}-map")
            yield from _rows(scene, report, images, paths, first, title, name)


def _regular(scene: Scene, verbose: bool) -> Tensor:
    """Return the images that PGD makes of a scene's."""
    model, settings = scene.classifier.model, scene.settings
    alpha = 2.5 * settings["eps"] / settings["steps"]  # settles; longer steps jump over the class
    attack = PGD(model, alpha=alpha, random_start=False, **settings)
    attack.set_mode_targeted_by_label(quiet=True)
    with progress_bar(total=attack.steps, desc="PGD", shown=verbose) as bar:

        def count(*_: Any) -> None:
            bar.update()

        with model.register_forward_hook(count):
            images: Tensor = attack(scene.images, scene.target)
    return images


def aimed(scene: Scene, interpreter: Interpreter) -> Tensor:
    """Return the maps ``(N, 1, h, w)`` that an attack should make the interpreter show."""
    with torch.no_grad():
        benign = interpreter(scene.images, scene.own)
    if scene.map == "benign":
        return benign
    if scene.drawn is None:
        patch = RandomPatch(seed=scene.seed)
        return patch(interpreter, scene.images, scene.own, scene.target)
    drawn = scene.drawn.to(benign)
    sized = F.interpolate(drawn, benign.shape[-2:], mode="bilinear", antialias=True)
    low, high = sized.aminmax()
    return ((sized - low) / (high - low)).expand_as(benign).clone()


def _stored(images: Tensor, store: Store, first: int, name: str) -> tuple[Tensor, list[Path]]:
    """Write images to files; return them as they are read again, and the files."""
    paths = [store.save(image, number, name) for number, image in enumerate(images, first)]
    again = torch.stack([read(path, 0, v2.Identity()).image for path in paths])
    return again.to(images), paths


def _large(image_map: Tensor, images: Tensor) -> Tensor:
    """Return a map ``(1, h, w)`` at the images' size."""
    sized = F.interpolate(image_map[None].detach(), images.shape[-2:], mode="bilinear")
    return sized[0].clamp(0, 1)


@torch.no_grad()
def _rows(
    scene: Scene,
    report: Report,
    images: Tensor,
    paths: list[Path],
    first: int,
    attack: str,
    interpreter: str,
) -> Iterator[Row]:
    """Yield a row for each picture."""
    best = scene.classifier.model(images).softmax(dim=1).max(dim=1)
    columns = (images.cpu(), report.adversarial_maps.cpu(), best.indices, best.values)
    for number, path in enumerate(paths):
        image, shown, label, probability = (column[number] for column in columns)
        yield Row(
            first + number,
            attack,
            interpreter,
            image,
            shown,
            int(label),
            probability.item(),
            path,
            bool(report.success[number]),
            l1=report.l1[number].item(),
            l2=report.l2[number].item(),
            iou=report.iou[number].item(),
            linf=report.linf[number].item(),
        )
