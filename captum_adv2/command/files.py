# SPDX-License-Identifier: MIT
"""What the command leaves behind: images, maps, one picture of all, and a report."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torchvision.transforms.v2 import functional

from captum_adv2 import storage
from captum_adv2.command import info
from captum_adv2.command.work import Row, Scene
from captum_adv2.evaluation import visualize

_REPORT, _PICTURE = "report.json", "overview.png"
_DRAWN = 6  # pictures in the overview


class Folder:
    """A folder with a sub-folder for each picture.

    Args:
        root: The folder.
        pictures: The pictures' files.
    """

    def __init__(self, root: Path, pictures: Sequence[Path]) -> None:
        self.root, self.pictures, self.began = root, pictures, time.monotonic()
        self.names: list[str] = []  # of the sub-folders, different ones whatever the case
        for file in pictures:
            taken = {name.casefold() for name in self.names}
            numbered = (f"{file.stem}-{number}" for number in itertools.count(2))
            names = itertools.chain([file.stem], numbered)
            self.names.append(next(name for name in names if name.casefold() not in taken))

    @classmethod
    def made(cls, root: Path, pictures: Sequence[Path]) -> Folder:
        """Return a folder that can be written to, without an older report; raise if it cannot."""
        found = cls(root, pictures)
        report, picture = found._file(_REPORT), found._file(_PICTURE)
        try:
            for name in found.names:
                (root / name).mkdir(parents=True, exist_ok=True)
            storage.expect_writable(report)
            report.unlink(missing_ok=True)  # it would describe images that are written over
            picture.unlink(missing_ok=True)
        except OSError as error:
            raise ValueError(
                f"expected a folder that can be written to, got {root}: {error.strerror}; --out "
                "names another"
            ) from error
        return found

    def save(self, image: Tensor, picture: int, name: str) -> Path:
        """Write an image ``(C, H, W)`` in [0, 1] to a PNG file of 8 bits; return the file."""
        file = self._file(self.names[picture], f"{name}.png")
        levels = (image.detach().cpu() * 255).round().to(torch.uint8)
        with storage.whole(file) as part:
            functional.to_pil_image(levels).save(part, format="png")
        return file

    def _file(self, *parts: str) -> Path:
        """Return a file of the folder; raise if it is one of the pictures."""
        file = self.root.joinpath(*parts)
        if any(file.resolve() == given.resolve() for given in self.pictures):
            raise ValueError(f"expected not to write over {file}, a picture; --out names a folder")
        return file

    def write(self, rows: Sequence[Row], scene: Scene, settings: Any, command: str) -> None:
        """Write the report, and the picture of all."""
        report = {
            "command": command,
            "settings": asdict(settings),
            "machine": info.facts(),
            "seconds": round(time.monotonic() - self.began, 1),
            "pictures": [
                self._of(picture, [row for row in rows if row.picture == picture], scene)
                for picture in range(len(self.pictures))
            ],
        }
        with storage.whole(self.root / _REPORT) as part:
            part.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        with storage.whole(self.root / _PICTURE) as part:
            overview(rows, scene).savefig(part, dpi=150, format="png")

    def _of(self, picture: int, rows: Sequence[Row], scene: Scene) -> dict[str, Any]:
        """Return all that is known of one picture."""
        own, target = int(scene.own[picture]), int(scene.target[picture])
        return {
            "picture": str(self.pictures[picture]),
            "class": {"number": own, "name": title(scene, own)},
            "target": {"number": target, "name": title(scene, target)},
            "results": [
                {
                    "attack": row.attack,
                    "interpreter": row.interpreter,
                    "image": row.file.relative_to(self.root).as_posix(),
                    "class": {"number": row.label, "name": title(scene, row.label)},
                    "probability": row.probability,
                    "of the wanted class": row.success,
                    "map": {"l1": row.l1, "l2": row.l2, "iou": row.iou},
                    "largest change of a pixel": row.linf,
                }
                for row in rows
            ],
        }


def title(scene: Scene, number: int) -> str:
    """Return the name of a class, or its number."""
    names = scene.classifier.names
    return names[number] if names else f"class {number}"


def table(rows: Sequence[Row], scene: Scene, folder: Folder) -> str:
    """Return the table that is printed, and what it means."""
    head = ("picture", "attack", "interpreter", "class", "prob.", "map L1", "map IoU")
    lines = [head]
    for row in sorted(rows, key=lambda row: row.picture):
        near = (f"{row.l1:.4f}", f"{row.iou:.3f}") if row.success else ("-", "-")
        numbers = (f"{row.probability:.3f}", *near)
        name = folder.names[row.picture]
        lines.append((name, row.attack, row.interpreter, title(scene, row.label), *numbers))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    shown = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
    dual = [row for row in rows if row.attack == "ADV2"]
    reached = sum(row.success for row in dual)
    aim = "the map before" if scene.map == "benign" else f"the map asked for, {scene.map}"
    height, width = scene.images.shape[-2:]
    shown += [
        "",
        f"Read again from their files, {reached} of {len(dual)} images by ADV2 are of the target "
        f"class. Map L1 and IoU are to {aim}; - where the class was not reached.",
        f"They are {width} x {height} pixels: give them to the model without resizing.",
        f"All of it: {folder.root / _PICTURE}, {folder.root / _REPORT}",
    ]
    return "\n".join(shown)


def overview(rows: Sequence[Row], scene: Scene) -> Figure:
    """Draw the first pictures: before, after PGD and after ADV2, with their maps."""
    kept = [row for row in rows if row.picture < _DRAWN]
    inputs: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
    notes: dict[str, dict[str, list[str]]] = {}
    for attack in ("benign", "PGD", "ADV2"):
        for name in scene.interpreters:
            found = [row for row in kept if (row.attack, row.interpreter) == (attack, name)]
            shown = torch.stack([row.image for row in found]), torch.stack([r.map for r in found])
            inputs.setdefault(attack, {})[name] = shown
            classes = [f"{title(scene, row.label)} {row.probability:.0%}" for row in found]
            notes.setdefault(attack, {"image": classes})[name] = [
                f"L1 {row.l1:.3f}  IoU {row.iou:.2f}" if attack != "benign" and row.success else ""
                for row in found
            ]
    return visualize.bands(inputs, notes)
