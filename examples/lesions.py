# SPDX-License-Identifier: MIT
"""Pictures of skin lesions in the format of the ISIC 2018 challenge, real ones or drawn ones.

A folder, or a zip file of it, holds ``ISIC2018_Task3_Training_Input/ISIC_0024306.jpg`` and so on,
the table ``ISIC2018_Task3_Training_GroundTruth.csv``, and maybe masks of the lesions,
``masks/ISIC_0024306_segmentation.png``, and ``lesions.csv``, which says which pictures show the
same lesion. HAM10000 (Tschandl et al. 2018) is such a set of 10,015 pictures.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes
from torchvision.transforms import v2

from captum_adv2.study.data import CorruptImage, Sample

CLASSES = ("MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC")
PICTURES = "ISIC2018_Task3_Training_Input"
TABLE = "ISIC2018_Task3_Training_GroundTruth.csv"


class Lesions:
    """The pictures that a table of diagnoses lists, as a source of a study.

    The box of a picture is that of its lesion's mask, where there is one.

    Args:
        data: Folder or zip file.
        transform: Of pictures, and of masks with them.
        table: CSV with the columns image, MEL, NV, ..., and 1.0 in that of an image's diagnosis;
            default: that of the data.
    """

    classes = CLASSES

    def __init__(
        self, data: str | Path, transform: v2.Transform, table: str | Path | None = None
    ) -> None:
        self._root = zipfile.Path(data) if zipfile.is_zipfile(data) else Path(data)
        with (Path(table) if table else self._root / TABLE).open() as file:
            found = pd.read_csv(file, index_col="image")[list(CLASSES)]
        if found.empty or not (found.isin([0, 1]).all(axis=None) and found.sum(axis=1).eq(1).all()):
            raise ValueError(f"expected one 1.0 and six 0.0 in each row of {table or TABLE}")
        self.names = [str(name) for name in found.index]
        self.labels = found.to_numpy().argmax(axis=1).tolist()
        self._transform = transform

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        image, mask = self.masked(index)
        boxes = masks_to_boxes(mask).long() + torch.tensor([0, 0, 1, 1])
        return Sample(image, self.labels[index], f"{self.names[index]}.jpg", boxes)

    def masked(self, index: int) -> tuple[Tensor, Tensor]:
        """Return a picture ``(3, H, W)`` and its lesion's mask, bool ``(1, H, W)``.

        The mask is ``(0, H, W)`` where there is none, or no pixel of the lesion is left.
        """
        name = self.names[index]
        try:
            picture = tv_tensors.Image(self._read(f"{PICTURES}/{name}.jpg", "RGB"))
            mask = torch.zeros(1, *picture.shape[1:], dtype=torch.uint8)
            if (self._root / f"masks/{name}_segmentation.png").exists():
                mask = self._read(f"masks/{name}_segmentation.png", "L")
        except Exception as error:  # garbage makes the decoders raise almost anything
            raise CorruptImage(f"expected a picture, and a mask, of {name}, got {error}") from error
        image, mask = self._transform(picture, tv_tensors.Mask(mask))
        inside = mask.as_subclass(Tensor) > 0
        return image.as_subclass(Tensor) / 255, inside[inside.any(dim=2).any(dim=1)]

    def groups(self) -> list[str]:
        """Return the name of each picture's lesion; the picture's own where it is not known."""
        file = self._root / "lesions.csv"
        if not file.exists():
            return self.names
        with file.open() as text:
            found = pd.read_csv(text, index_col="image").lesion_id
        return [str(name) for name in found[self.names]]

    def _read(self, name: str, mode: str) -> Tensor:
        with (self._root / name).open("rb") as file, Image.open(file) as picture:
            return v2.functional.pil_to_tensor(picture.convert(mode))


def crop(size: int) -> v2.Transform:
    """Return the transform of a study: seven eighths of the shorter side, at a size in pixels."""
    return v2.Compose([v2.Resize(round(size * 8 / 7)), v2.CenterCrop(size)])


def write_table(file: Path, names: Sequence[str], labels: Sequence[int]) -> None:
    """Write a table of diagnoses."""
    cells = pd.DataFrame(np.eye(len(CLASSES))[list(labels)], names, CLASSES)
    cells.to_csv(file, index_label="image")


_SKIN = (225, 175, 150)
_COLOURS = (
    *((60, 40, 45), (120, 75, 55), (215, 130, 125), (190, 70, 60)),
    *((170, 130, 80), (225, 200, 180), (120, 20, 50)),
)


def _lesion(
    label: int, size: tuple[int, int], rng: np.random.Generator
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
    """Return a picture of skin with a disc whose colour depends on the class, and the disc."""
    height, width = size
    y, x = np.mgrid[:height, :width] - rng.uniform(0.4, 0.6, (2, 1, 1)) * np.reshape(
        size, (2, 1, 1)
    )
    inside = np.hypot(x, y) < rng.uniform(0.18, 0.32) * height
    picture = np.where(inside[..., None], _COLOURS[label], _SKIN) + rng.normal(0, 8, 3)
    noisy = picture + rng.normal(0, 4, picture.shape)
    return np.clip(noisy, 0, 255).astype(np.uint8), inside


def generate(
    folder: Path, count: int = 140, seed: int = 0, size: tuple[int, int] = (225, 300)
) -> Path:
    """Draw lesions, two pictures of each, into a folder; return it."""
    for name in (PICTURES, "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    labels = [int(label) for label in rng.permutation(np.arange(count) // 2 % len(CLASSES))]
    names = [f"ISIC_{24306 + index:07d}" for index in range(count)]
    for name, label in zip(names, labels, strict=True):
        picture, inside = _lesion(label, size, rng)
        Image.fromarray(picture).save(folder / PICTURES / f"{name}.jpg", quality=92)
        Image.fromarray(inside).save(folder / "masks" / f"{name}_segmentation.png")
    write_table(folder / TABLE, names, labels)
    seen: dict[int, int] = dict.fromkeys(range(len(CLASSES)), 0)
    lesions = []
    for label in labels:
        lesions.append(f"HAM_{label}{seen[label] // 2:06d}")
        seen[label] += 1
    pd.DataFrame({"image": names, "lesion_id": lesions}).to_csv(folder / "lesions.csv", index=False)
    return folder
