# SPDX-License-Identifier: MIT
"""The images of a study, read one by one: folders of pictures, files of tensors, generated ones."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from pkgutil import resolve_name
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.datasets import ImageFolder, VOCDetection
from torchvision.datasets.folder import default_loader
from torchvision.transforms import v2

from captum_adv2.spec import Classes, Images, expect
from captum_adv2.study.embedded import CLASSES, make_shapes
from captum_adv2.study.embedded.shapes import Shapes
from captum_adv2.study.settings import Settings


class CorruptImage(ValueError):
    """An image that cannot be read; the message names it."""


class Sample(NamedTuple):
    """An image of known class.

    Attributes:
        image: ``(C, H, W)`` float32 in [0, 1].
        label: Its class.
        name: The source's name for it.
        boxes: ``(K, 4)`` long: x0, y0, x1, y1 of the objects in pixels of ``image``, x1 and y1
            exclusive; K = 0 where they are not known.
    """

    image: Tensor
    label: int
    name: str
    boxes: Tensor


class Source(Protocol):
    """A sequence of samples. Each is read when it is asked for, and not kept.

    Attributes:
        classes: Names of the classes in the order of the labels; empty where they are not known.
    """

    classes: tuple[str, ...]

    def __len__(self) -> int:
        """Return the number of images, readable or not."""

    def __getitem__(self, index: int) -> Sample:
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
        return source
    raise FileNotFoundError(
        "expected embedded, a folder, a file of tensors or package.module:function, got "
        f"{settings.images}; there is no such path"
    )


class Pictures:
    """Files of pictures, transformed, and their boxes.

    Args:
        files: Each with its class.
        classes: See `Source`.
        transform: Of pictures and their boxes, by ``torchvision.transforms.v2``.
        boxes: Annotations in the format of PASCAL VOC by the names (stems) of their pictures. They
            count in pixels of the size that they state, which need not be the file's.
    """

    def __init__(
        self,
        files: Sequence[tuple[str | Path, int]],
        classes: Sequence[str],
        transform: v2.Transform,
        boxes: Mapping[str, Path] = MappingProxyType({}),
    ) -> None:
        self.files = [(Path(file), label) for file, label in files]
        self.classes = tuple(classes)
        self._transform = transform
        self._annotations = boxes

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        file, label = self.files[index]
        try:
            picture = default_loader(file)
        except Exception as error:  # garbage makes the decoders raise almost anything
            raise CorruptImage(f"expected a picture in {file}, got {error}") from error
        image, boxes = self._transform(
            picture,
            tv_tensors.BoundingBoxes(
                self._shares(file.stem) * torch.tensor([*picture.size, *picture.size]),
                format="XYXY",
                canvas_size=picture.size[::-1],
            ),
        )
        corners = boxes.as_subclass(Tensor).round().long()
        inside = (corners[:, 2:] > corners[:, :2]).all(dim=1)
        name = f"{file.parent.name}/{file.name}"
        return Sample(v2.functional.pil_to_tensor(image) / 255, label, name, corners[inside])

    def _shares(self, stem: str) -> Tensor:
        """Return a picture's boxes ``(K, 4)`` as shares of its width and height."""
        file = self._annotations.get(stem)
        if file is None:
            return torch.zeros(0, 4)
        try:
            found = VOCDetection.parse_voc_xml(ET.parse(file).getroot())["annotation"]
            width, height = (float(found["size"][name]) for name in ("width", "height"))
            if not (width > 0 and height > 0):
                raise ValueError(f"a size of {width:g} x {height:g}")
            corners = [
                [float(each["bndbox"][name]) for name in ("xmin", "ymin", "xmax", "ymax")]
                for each in found["object"]
            ]
        except (ET.ParseError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"expected an annotation in the format of PASCAL VOC in {file}, got {error!r}"
            ) from error
        return torch.tensor(corners).view(-1, 4) / torch.tensor([width, height, width, height])


class Folder(Pictures):
    """A folder with a sub-folder of pictures for each class, mixed in an order of its own.

    Args:
        root: The folder.
        transform: See `Pictures`.
        classes: File with the sub-folders' names in the order of the classifier's classes, for a
            folder that holds some of them; empty: the sub-folders in alphabetical order.
        boxes: Folder of annotations, at any depth, each named after its picture:
            ``ILSVRC2012_val_00000001.xml``; empty: there are none.
    """

    def __init__(
        self, root: Path, transform: v2.Transform, classes: str = "", boxes: str = ""
    ) -> None:
        lines = Path(classes).expanduser().read_text("utf-8").splitlines() if classes else []
        found = _Named(root, [line.strip() for line in lines if line.strip()])
        if not found.samples:
            raise FileNotFoundError(f"expected a sub-folder of pictures a class in {root}")
        order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))
        files = [found.samples[index] for index in order.tolist()]
        annotations = Path(boxes).expanduser().rglob("*.xml") if boxes else ()
        super().__init__(files, found.classes, transform, {file.stem: file for file in annotations})
        if boxes and not any(file.stem in self._annotations for file, _ in self.files):
            raise FileNotFoundError(f"expected annotations (.xml) named after pictures in {boxes}")


class _Named(ImageFolder):
    """An `ImageFolder` whose class numbers come from a list of names."""

    def __init__(self, root: Path, names: list[str]) -> None:
        self._names = names
        super().__init__(root, allow_empty=True)

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        """Return the names, and the position of each."""
        found, positions = super().find_classes(directory)
        if not self._names:
            return found, positions
        unknown = sorted(set(found) - set(self._names))
        if unknown:
            raise ValueError(
                f"expected the folders in {directory} to be classes, got {', '.join(unknown[:3])}"
                f" and {len(self._names)} classes such as {self._names[0]}"
            )
        return self._names, {name: label for label, name in enumerate(self._names)}


class Tensors:
    """A file of `torch.save`: a dict of tensors, which stay on disk until they are asked for.

    Args:
        path: Holds ``images``, uint8, or floating in [0, 1], ``(N, 3, H, W)``, and integer
            ``labels`` ``(N,)``. It may hold ``boxes``, ``(N, 4)`` integers or a list of
            ``(K, 4)``, see `Sample`; and ``classes``, a list of names.
    """

    def __init__(self, path: Path) -> None:
        try:
            held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            self._images, self._labels = held["images"], held["labels"]
        except Exception as error:  # garbage makes the unpickler raise almost anything
            raise ValueError(
                f"expected a file of torch.save with images and labels in {path}, got {error!r}"
            ) from error
        expect(self._images[:1] / 255, Images, f"images in {path}")
        expect(self._labels, Classes, f"labels in {path}")
        self._boxes = held.get("boxes", [torch.zeros(0, 4)] * len(self._images))
        lengths = {len(self._images), len(self._labels), len(self._boxes)}
        if len(lengths) > 1:
            raise ValueError(f"expected a label, and boxes, for each image in {path}")
        self.classes = tuple(held.get("classes", ()))
        self._name = path.name

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Sample:
        name, image = f"{self._name}[{index}]", self._images[index]
        image = image / 255 if image.dtype == torch.uint8 else image.float()
        try:
            expect(image[None], Images, name)
        except ValueError as error:
            raise CorruptImage(str(error)) from error
        boxes = self._boxes[index].reshape(-1, 4).long()
        return Sample(image, int(self._labels[index]), name, boxes)


class Embedded:
    """Generated pictures, other ones than the embedded networks were trained on."""

    classes = CLASSES

    def __len__(self) -> int:
        return 10_000

    def __getitem__(self, index: int) -> Sample:
        block, place = divmod(index, _BLOCK)
        shapes = _shapes(block)
        return Sample(
            shapes.images[place].clone(),
            int(shapes.labels[place]),
            f"embedded-{index}",
            shapes.boxes[place : place + 1],
        )


_BLOCK = 50  # pictures that are drawn at once


@lru_cache(maxsize=1)
def _shapes(block: int) -> Shapes:
    return make_shapes(_BLOCK, seed=2_000_000 + block)
