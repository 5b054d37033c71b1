# SPDX-License-Identifier: MIT
"""The images of a study, read one by one: folders of pictures, files of tensors, generated ones."""

from __future__ import annotations

import os
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.datasets import ImageFolder, VOCDetection
from torchvision.datasets.folder import is_image_file
from torchvision.transforms import v2

from captum_adv2 import storage
from captum_adv2.spec import Classes, Images, Positive, expect
from captum_adv2.study.embedded import CLASSES, make_shapes
from captum_adv2.study.embedded.shapes import Shapes
from captum_adv2.study.settings import Settings

_LONGEST = 1000  # times the other side of a picture


class CorruptImage(ValueError):
    """An image that cannot be read; the message names it."""


class Sample(NamedTuple):
    """An image of known class."""

    image: Tensor  # (C, H, W) float32 in [0, 1]
    label: int
    name: str  # the source's name for it
    # Of the objects, (K, 4) long: x0, y0, x1, y1 in pixels of the image, x1 and y1 exclusive; K = 0
    # where they are not known.
    boxes: Tensor


class Source(Protocol):
    """A sequence of samples, each of which is read when it is asked for."""

    @property
    def classes(self) -> Sequence[str]:
        """Names of the classes in the order of the labels; empty where they are not known."""

    def __len__(self) -> int:
        """Return the number of images, readable or not."""

    def __getitem__(self, index: int, /) -> Sample:
        """Return one image; raise `CorruptImage` if it cannot be read."""


def make(spec: str, *given: Any) -> Any:
    """Return the result of ``package.module:function`` or ``package.module:function=ARGUMENT``.

    Args:
        spec: Names the function, and maybe a text to pass as its last argument.
        *given: Arguments before that.
    """
    path, _, argument = spec.partition("=")
    try:
        function = resolve_name(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"expected {path} to be package.module:function, got {error}; is its folder on "
            "PYTHONPATH?"
        ) from error
    if not callable(function):
        raise ValueError(f"expected {path} to be a function, got {type(function).__name__}")
    return function(*given, *([argument] if argument else []))


def open_source(settings: Settings) -> Source:
    """Return the images that settings name."""
    path = Path(settings.images).expanduser()
    shorter = settings.resize or round(settings.size * 8 / 7)  # 256 for 224, as usual
    if shorter < settings.size:
        raise ValueError(f"expected resize at least {settings.size}, the size, got {shorter}")
    transform = v2.Compose([v2.Resize(shorter, antialias=True), v2.CenterCrop(settings.size)])
    if settings.images != "embedded" and path.is_dir():
        return Folder(path, transform, settings.classes, settings.boxes)
    if settings.boxes or settings.classes:
        raise ValueError(f"expected boxes and classes with a folder alone, got {settings.images}")
    if settings.images == "embedded":
        return Embedded()
    if path.is_file():
        return Tensors(path)
    if ":" in settings.images:
        source: Source = make(settings.images, transform)
        if not all(hasattr(source, name) for name in ("classes", "__len__", "__getitem__")):
            raise TypeError(f"expected {settings.images} to return a Source, got {source!r}")
        return source
    raise FileNotFoundError(
        "expected embedded, a folder, a file of tensors or package.module:function, got "
        f"{settings.images}; there is no such path"
    )


def read(
    file: str | Path, label: int, transform: v2.Transform, annotation: Path | None = None
) -> Sample:
    """Return the transformed picture of a file, named after the file and its folder.

    Args:
        file: The picture.
        label: Its class.
        transform: Of pictures and boxes, by ``torchvision.transforms.v2``.
        annotation: File of its boxes in the format of PASCAL VOC. They count in pixels of the size
            that it states, which need not be the picture's.
    """
    try:
        picture = _opened(file)
    except Exception as error:  # garbage makes the decoders raise almost anything
        raise CorruptImage(f"expected a picture in {file}, got {error}") from error
    shares = _voc(annotation) if annotation else torch.zeros(0, 4)
    image, boxes = transform(
        picture,
        tv_tensors.BoundingBoxes(
            shares * torch.tensor([*picture.size, *picture.size]),
            format="XYXY",
            canvas_size=picture.size[::-1],
        ),
    )
    corners = boxes.as_subclass(Tensor).round().long()
    inside = (corners[:, 2:] > corners[:, :2]).all(dim=1)
    name = "/".join(Path(file).parts[-2:])
    return Sample(v2.functional.pil_to_tensor(image) / 255, label, name, corners[inside])


def _opened(file: str | Path) -> Image.Image:
    """Return a picture of a file, the first if there are several, in RGB.

    As torchvision's loader does, which ignores transparency; besides, values of more than 8 bits
    are scaled, where that loader clips them.
    """
    with Image.open(file) as held:
        if max(held.size) > _LONGEST * min(held.size):  # resized, it would take gigabytes
            raise ValueError(f"{held.size[0]} x {held.size[1]} pixels; crop it")
        if held.mode.split(";")[0] not in ("I", "F"):
            return held.convert("RGB")
        values = np.asarray(held, dtype=np.float64)
        if held.mode != "F":
            if held.mode == "I" and held.format not in ("PNG", "PPM"):
                raise ValueError("integers of 32 bits, whose range is not known; save it as 8 bits")
            values = values / 65535
        low, high = values.min(), values.max()
        if not (low >= 0 and high <= 1):  # so that NaN fails, too
            raise ValueError(f"values in [{low:g}, {high:g}]; scale them to [0, 1]")
        return Image.fromarray((values * 255).round().astype(np.uint8)).convert("RGB")


def _voc(file: Path) -> Tensor:
    """Return the boxes of an annotation ``(K, 4)`` as shares of the width and height it states."""
    try:
        found = VOCDetection.parse_voc_xml(ET.parse(file).getroot())["annotation"]
        width, height = (float(found["size"][name]) for name in ("width", "height"))
        corners = [
            [float(each["bndbox"][name]) for name in ("xmin", "ymin", "xmax", "ymax")]
            for each in found["object"]
        ]
        expect(min(width, height), Positive, "width and height")
    except (ET.ParseError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"expected an annotation in the format of PASCAL VOC in {file}, got {error!r}"
        ) from error
    return torch.tensor(corners).view(-1, 4) / torch.tensor([width, height, width, height])


class Folder(ImageFolder):  # type: ignore[misc]
    """A folder with a sub-folder of pictures for each class, mixed in an order of its own.

    A picture that links lead to as well counts once, where it is.

    Args:
        root: The folder.
        transform: See `read`.
        classes: File with the sub-folders' names in the order of the classifier's classes, for a
            folder that holds some of them; empty: the sub-folders in alphabetical order.
        boxes: Folder of annotations, at any depth, each named after its picture:
            ``ILSVRC2012_val_00000001.xml``; empty: there are none.
    """

    samples: list[tuple[str, int]]

    def __init__(
        self, root: Path, transform: v2.Transform, classes: str = "", boxes: str = ""
    ) -> None:
        given = Path(classes).expanduser().read_bytes() if classes else b""
        lines = os.fsdecode(given).splitlines()  # as names of folders are decoded
        self._names = [line.strip() for line in lines if line.strip()]
        super().__init__(os.path.realpath(root), transform, allow_empty=True)
        if not self.samples:
            raise FileNotFoundError(f"expected a sub-folder of pictures for each class in {root}")
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(0))
        self.samples = [self.samples[index] for index in order.tolist()]
        found = Path(boxes).expanduser().rglob("*.xml") if boxes else ()
        self._annotations = {file.stem: file for file in found}
        stems = Counter(Path(file).stem for file, _ in self.samples)
        shared = [stem for stem in self._annotations if stems[stem]]
        if boxes and not shared:
            raise FileNotFoundError(f"expected annotations (.xml) named after pictures in {boxes}")
        for stem in shared:
            if stems[stem] > 1:
                raise ValueError(f"expected one picture named as {self._annotations[stem]}")

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        """Return the names of the classes, and the position of each."""
        found, positions = super().find_classes(directory)
        unknown = sorted(set(found) - set(self._names))
        if not self._names:
            return found, positions
        if unknown:
            raise ValueError(
                f"expected the folders in {directory} to be classes, got {', '.join(unknown[:3])} "
                f"and {len(self._names)} classes such as {self._names[0]}"
            )
        return self._names, {name: label for label, name in enumerate(self._names)}

    @staticmethod
    def make_dataset(
        directory: str | Path, class_to_idx: dict[str, int], *_: Any, **__: Any
    ) -> list[tuple[str, int]]:
        """Return the pictures in a folder, with their classes, each real file once."""
        entered = {folder for folder, *_ in os.walk(directory)}
        found = [
            (file, class_to_idx[name])
            for name in sorted(class_to_idx)
            for file in sorted(_pictures(os.path.join(directory, name), entered), key=os.path.split)
        ]
        direct = sorted(found, key=lambda pair: os.path.realpath(pair[0]) != pair[0])
        chosen = {os.path.realpath(file): file for file, _ in reversed(direct)}
        kept = set(chosen.values())
        return [pair for pair in found if pair[0] in kept]

    def __getitem__(self, index: int) -> Sample:
        """Return one picture, named after the file and its folders."""
        file, label = self.samples[index]
        found = read(file, label, self.transform, self._annotations.get(Path(file).stem))
        return found._replace(name=Path(file).relative_to(self.root).as_posix())


def _pictures(top: str, entered: set[str]) -> Iterator[str]:
    """Yield the pictures below a folder; links are followed to folders not yet entered."""
    for folder, inside, files in os.walk(top, followlinks=True):
        yield from (os.path.join(folder, name) for name in files if is_image_file(name))
        paths = {name: os.path.join(folder, name) for name in inside}
        real = {name: os.path.realpath(path) for name, path in paths.items()}
        inside[:] = [n for n in inside if real[n] == paths[n] or real[n] not in entered]
        entered.update(real.values())


class Tensors:
    """A file of `torch.save`: a dict of tensors, which stay on disk until they are asked for.

    Args:
        path: Holds ``images``, uint8, or floating in [0, 1], ``(N, 3, H, W)``, and integer
            ``labels`` ``(N,)``. It may hold ``boxes``, ``(N, 4)`` integers or a list of
            ``(K, 4)``, see `Sample`; and ``classes``, a list of names.
    """

    def __init__(self, path: Path) -> None:
        held = storage.read(path, "a file of torch.save with images and labels", mmap=True)
        expect(held, Mapping[str, Any], f"what {path} holds")
        self._images, self._labels = held.get("images"), held.get("labels")
        expect(self._images, Tensor, f"images in {path}")
        expect(self._labels, Classes, f"labels in {path}")
        shape, dtype = tuple(self._images.shape), self._images.dtype
        if len(shape) != 4 or not (dtype.is_floating_point or dtype == torch.uint8):
            wanted = "images (N, 3, H, W), uint8 or floating"
            raise ValueError(f"expected {wanted}, in {path}, got shape {shape}, {dtype}")
        self._boxes = held.get("boxes", [torch.zeros(0, 4)] * len(self._images))
        expect(self._boxes, Tensor | Sequence[Tensor], f"boxes in {path}")
        if not len(self._images) == len(self._labels) == len(self._boxes):
            raise ValueError(f"expected a label, and boxes, for each image in {path}")
        if any(boxes.numel() % 4 for boxes in self._boxes):
            raise ValueError(f"expected boxes of four corners in {path}")
        self.classes = tuple(held.get("classes", ()))
        expect(self.classes, tuple[str, ...], f"classes in {path}")
        self._name = path.name

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Sample:
        name, stored = f"{self._name}[{index}]", self._images[index]
        image = stored / 255 if stored.dtype == torch.uint8 else stored.to(torch.float32, copy=True)
        try:
            expect(image[None], Images, name)
        except ValueError as error:
            raise CorruptImage(str(error)) from error
        boxes = self._boxes[index].reshape(-1, 4).to(torch.long, copy=True)
        return Sample(image, int(self._labels[index]), name, boxes)


class Embedded:
    """Generated pictures, other ones than the embedded networks were trained on."""

    classes = CLASSES

    def __len__(self) -> int:
        return 10_000

    def __getitem__(self, index: int) -> Sample:
        block, place = divmod(index, _BLOCK)
        image, label, _, box = (part[place].clone() for part in _shapes(block))
        return Sample(image, int(label), f"embedded-{index}", box[None])


_BLOCK = 50  # pictures that are drawn at once


@lru_cache(maxsize=1)
def _shapes(block: int) -> Shapes:
    return make_shapes(_BLOCK, seed=2_000_000 + block)
