# SPDX-License-Identifier: MIT
"""The images of a study, read one by one: folders of pictures, files of tensors, generated ones."""

from __future__ import annotations

import csv
import sys
import xml.etree.ElementTree as ET
from abc import ABC, abstractmethod
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.datasets.folder import IMG_EXTENSIONS, default_loader, make_dataset
from torchvision.transforms import v2

from captum_adv2.checks import expect_integer

__all__ = [
    "CorruptImage",
    "Embedded",
    "Folder",
    "ISIC2018",
    "Sample",
    "Source",
    "TensorFile",
    "embedded",
    "open_source",
]

EXAMPLES = Path(__file__).parents[3] / "examples"  # where the package lies in its repository


class CorruptImage(ValueError):
    """An image that cannot be read; the message names it."""


class Sample(NamedTuple):
    """An image of known class.

    Attributes:
        image: ``(C, H, W)`` float32 in [0, 1].
        label: Its class, a position in the source's ``classes``.
        name: The source's name for it.
        boxes: ``(K, 4)`` long: x0, y0, x1, y1 of the objects in pixels of ``image``, x1 and y1
            exclusive; K = 0 where they are not known.
    """

    image: Tensor
    label: int
    name: str
    boxes: Tensor


class Source(ABC):
    """A sequence of samples. Each is read when it is asked for, and not kept.

    Attributes:
        classes: Names of the classes, in the order of the labels.
        numbered: Whether labels are the classifier's own numbers, of which some may not occur.
    """

    classes: tuple[str, ...]
    numbered: bool = False

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of images, readable or not."""

    @abstractmethod
    def __getitem__(self, index: int) -> Sample:
        """Return one image.

        Raises:
            CorruptImage: It cannot be read.
            IndexError: There is no such image.
        """


def embedded() -> ModuleType:
    """Return the examples' package ``embedded``, with its modules ``models`` and ``shapes``.

    Raises:
        FileNotFoundError: This package was installed without its examples.
    """
    if not (EXAMPLES / "embedded" / "shapes.py").is_file():
        raise FileNotFoundError(
            f"expected the embedded models and pictures in {EXAMPLES}, got no such folder; clone "
            "the repository, or name a model and a folder of pictures"
        )
    if str(EXAMPLES) not in sys.path:
        sys.path.append(str(EXAMPLES))
    for name in ("models", "shapes"):
        import_module(f"embedded.{name}")
    return import_module("embedded")


class Embedded(Source):
    """The generated pictures that the embedded models know; theirs to train on are others.

    Args:
        count: Number of pictures.
        seed: Of the first block of pictures; the next ones follow.
    """

    # As many as `make_shapes` draws at once, which is what makes a block cheap.
    _BLOCK = 50

    def __init__(self, count: int = 10_000, seed: int = 2_000_000) -> None:
        self._count = expect_integer(count, "count", low=1)
        self._seed = expect_integer(seed, "seed", low=0)
        self._shapes = embedded().shapes
        self._drawn: tuple[int, Any] = (-1, None)
        self.classes = tuple(self._shapes.CLASSES)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Sample:
        number = range(self._count)[index]
        block, place = divmod(number, self._BLOCK)
        if self._drawn[0] != block:
            self._drawn = block, self._shapes.make_shapes(self._BLOCK, seed=self._seed + block)
        images, labels, _, boxes = self._drawn[1]
        image, box = images[place].clone(), boxes[place : place + 1].clone()
        return Sample(image, int(labels[place]), f"embedded-{number}", box)


class TensorFile(Source):
    """A file of `torch.save`: a dict of tensors, which stay on disk until they are asked for.

    Args:
        path: Holds ``images``, uint8, or floating in [0, 1], ``(N, 3, H, W)``, and integer
            ``labels`` ``(N,)``. It may hold ``boxes``, ``(N, 4)`` integers, or a list of
            ``(K, 4)``, see `Sample`; and ``classes``, a list of names.

    Raises:
        FileNotFoundError: No such file.
        ValueError: A file of something else.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = _existing(path, "a file of tensors")
        try:
            held = torch.load(self._path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # garbage makes the unpickler raise almost anything
            raise ValueError(
                f"expected a file of torch.save with nothing but tensors, got {path}: {error}"
            ) from error
        if not isinstance(held, dict) or not {"images", "labels"} <= held.keys():
            found = list(held) if isinstance(held, dict) else f"a {type(held).__name__}"
            raise ValueError(f"expected a dict of images and labels in {path}, got {found}")
        self._images, labels, boxes = held["images"], held["labels"], held.get("boxes")
        self._check_images()
        count = len(self._images)
        if not isinstance(labels, Tensor) or labels.shape != (count,) or not _integers(labels):
            raise ValueError(
                f"expected {count} integer labels in {path}, one an image, got {_shape(labels)}"
            )
        self._labels = labels.long()
        highest = int(self._labels.amax())
        self.numbered = not held.get("classes")
        self.classes = tuple(held.get("classes") or (str(label) for label in range(highest + 1)))
        if highest >= len(self.classes) or int(self._labels.amin()) < 0:
            raise ValueError(
                f"expected labels in [0, {len(self.classes) - 1}] in {path}, got values in "
                f"[{int(self._labels.amin())}, {highest}]"
            )
        self._boxes = [torch.zeros(0, 4)] * count if boxes is None else boxes
        known = isinstance(self._boxes, (Tensor, list)) and len(self._boxes) == count
        if not known or not all(_is_boxes(each) for each in self._boxes):
            raise ValueError(
                f"expected boxes (N, 4) or N times (K, 4) in {path}, integers, for {count} images, "
                f"got {_shape(self._boxes)}"
            )

    def _check_images(self) -> None:
        images = self._images
        fits = isinstance(images, Tensor) and images.ndim == 4 and images.shape[1] == 3
        if not fits or not len(images):
            raise ValueError(
                f"expected images (N, 3, H, W) in {self._path}, at least one, got {_shape(images)}"
            )
        if images.dtype != torch.uint8 and not images.is_floating_point():
            raise ValueError(
                f"expected images of dtype uint8 or a floating one in {self._path}, got "
                f"{images.dtype}"
            )

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Sample:
        number = range(len(self))[index]
        name = f"{self._path.name}[{number}]"
        stored = self._images[number]
        image = stored / 255 if stored.dtype == torch.uint8 else stored.to(torch.float32, copy=True)
        if not ((image >= 0) & (image <= 1)).all():  # also false for NaN
            low, high = (bound.item() for bound in image.aminmax())
            raise CorruptImage(f"expected {name} in [0, 1], got values in [{low:.4g}, {high:.4g}]")
        boxes = self._boxes[number].reshape(-1, 4).long()
        return Sample(image, int(self._labels[number]), name, boxes.clone())


def _integers(values: Tensor) -> bool:
    return not (values.is_floating_point() or values.is_complex() or values.dtype == torch.bool)


def _is_boxes(boxes: object) -> bool:
    """Return whether these are the boxes of one image; none may have any dtype."""
    if not isinstance(boxes, Tensor) or boxes.ndim not in (1, 2) or boxes.shape[-1] != 4:
        return False
    return _integers(boxes) or not boxes.numel()


def _shape(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    return type(value).__name__


class _Pictures(Source):
    """Files of pictures, all brought to one size.

    Attributes:
        files: Where they are.
        labels: Their classes.
    """

    def __init__(
        self,
        root: Path,
        files: Sequence[tuple[Path, int]],
        classes: Sequence[str],
        size: int,
        resize: int | None,
    ) -> None:
        expect_integer(size, "size", low=1)
        shorter = round(size * 8 / 7) if resize is None else resize  # 256 for 224, as usual
        expect_integer(shorter, "resize", low=size)
        self._root = root
        self._crop = v2.Compose([v2.Resize(shorter, antialias=True), v2.CenterCrop(size)])
        self.files = tuple(file for file, _ in files)
        self.labels = tuple(label for _, label in files)
        self.classes = tuple(classes)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        file = self.files[index]
        try:
            picture = default_loader(file)
        except Exception as error:  # garbage makes the decoders raise almost anything
            raise CorruptImage(f"expected a picture in {file}, got {error}") from error
        width, height = picture.size
        image, boxes = self._crop(
            picture,
            tv_tensors.BoundingBoxes(
                self._annotated(file) * torch.tensor([width, height, width, height]),
                format="XYXY",
                canvas_size=(height, width),
            ),
        )
        whole = boxes.as_subclass(Tensor).round().long()
        return Sample(
            v2.functional.pil_to_tensor(image) / 255,
            self.labels[index],
            file.relative_to(self._root).as_posix(),
            whole[(whole[:, 2:] > whole[:, :2]).all(dim=1)],
        )

    def _annotated(self, file: Path) -> Tensor:
        """Return an image's boxes as shares of its width and height, ``(K, 4)``."""
        return torch.zeros(0, 4)


class Folder(_Pictures):
    """A folder with a sub-folder of pictures for each class, as torchvision's `ImageFolder`.

    The classes are mixed, in an order that is the same for the same files. Pictures are resized,
    and cropped around their centre to a square.

    Args:
        root: The folder.
        size: Side of the square, in pixels.
        resize: Shorter side before the crop; by default eight sevenths of ``size``.
        boxes: Folder of annotations in the format of PASCAL VOC, at any depth, each named after
            its picture: ``ILSVRC2012_val_00000001.xml``. They count in pixels of the size that they
            state, which for ImageNet need not be that of the file.
        classes: Names of the sub-folders in the order of the classifier's classes, or a file with
            one a line, for a folder that holds some of the classes; for ImageNet the WordNet IDs.
            By default the sub-folders in alphabetical order.

    Raises:
        FileNotFoundError: No such folder or file, or nothing in it.
        ValueError: A sub-folder that is no class, or annotations that do not belong to pictures.
            So is a malformed annotation, once its picture is asked for.
    """

    def __init__(
        self,
        root: str | Path,
        size: int = 224,
        resize: int | None = None,
        boxes: str | Path | None = None,
        classes: str | Path | Sequence[str] | None = None,
    ) -> None:
        root = _existing(root, "a folder of pictures", folder=True)
        folders = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
        names = folders if classes is None else _names(classes)
        unknown = sorted(set(folders) - set(names))
        if unknown:
            raise ValueError(
                f"expected the folders in {root} to be classes, got {', '.join(unknown[:3])} and "
                f"{len(names)} classes such as {names[0]}"
            )
        positions = {name: label for label, name in enumerate(names)}
        found = make_dataset(root, positions, IMG_EXTENSIONS, allow_empty=True) if names else []
        if not found:
            raise FileNotFoundError(
                f"expected pictures ({', '.join(IMG_EXTENSIONS)}) in {root}, got none; it needs a "
                "sub-folder for each class"
            )
        order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0)).tolist()
        files = [(Path(found[index][0]), found[index][1]) for index in order]
        super().__init__(root, files, names, size, resize)
        self._annotations = {} if boxes is None else self._find(boxes)

    def _find(self, boxes: str | Path) -> dict[str, Path]:
        """Return the annotations by the names of their pictures."""
        folder = _existing(boxes, "a folder of annotations", folder=True)
        files = sorted(folder.rglob("*.xml"))
        found = {file.stem: file for file in files}
        if not any(file.stem in found for file in self.files):
            raise FileNotFoundError(
                f"expected annotations (.xml) named after the pictures in {folder}, got "
                f"{len(files)} files, none for a picture such as {self.files[0].name}"
            )
        if len(found) < len(files):
            twice = next(file for file in files if found[file.stem] != file)
            raise ValueError(f"expected one annotation a picture, got two named {twice.name}")
        return found

    def _annotated(self, file: Path) -> Tensor:
        annotation = self._annotations.get(file.stem)
        return super()._annotated(file) if annotation is None else _voc(annotation)


class ISIC2018(_Pictures):
    """Skin lesions of seven diagnoses: task 3 of the ISIC 2018 challenge.

    Args:
        images: Folder of ``ISIC_0024306.jpg`` and so on. Pictures without a row are left out, so
            that a table of some rows is a part of the data set.
        ground_truth: Table with the header ``image,MEL,NV,BCC,AKIEC,BKL,DF,VASC``, and 1.0 in the
            column of an image's diagnosis.
        size: See `Folder`.
        resize: See `Folder`.

    Raises:
        FileNotFoundError: No such folder or file, or rows whose picture is missing.
        ValueError: A table of another format.
    """

    CLASSES = ("MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC")

    def __init__(
        self,
        images: str | Path,
        ground_truth: str | Path,
        size: int = 224,
        resize: int | None = None,
    ) -> None:
        root = _existing(images, "a folder of pictures", folder=True)
        files = [
            (root / f"{name}.jpg", label)
            for name, label in self._rows(_existing(ground_truth, "a table of diagnoses"))
        ]
        missing = [file.name for file, _ in files if not file.is_file()]
        if missing:
            raise FileNotFoundError(
                f"expected a picture in {root} for every row of {ground_truth}, got none for "
                f"{len(missing)} of {len(files)}, such as {missing[0]}"
            )
        super().__init__(root, files, self.CLASSES, size, resize)

    @classmethod
    def _rows(cls, table: Path) -> list[tuple[str, int]]:
        with table.open(newline="", encoding="utf-8-sig", errors="replace") as file:
            header, *rows = list(filter(None, csv.reader(file))) or [[]]
        if tuple(header) != ("image", *cls.CLASSES) or not rows:
            raise ValueError(
                f"expected the header image,{','.join(cls.CLASSES)} and rows in {table}, got "
                f"{len(rows)} rows under {','.join(header)[:80]!r}"
            )
        found = []
        for name, *cells in rows:
            try:
                values = [float(cell) for cell in cells]
            except ValueError:
                values = []
            if sorted(values) != [0.0] * 6 + [1.0]:
                raise ValueError(
                    f"expected six times 0.0 and one 1.0 for {name} in {table}, got "
                    f"{','.join(cells)}"
                )
            found.append((name, values.index(1.0)))
        return found


def _existing(path: str | Path, what: str, *, folder: bool = False) -> Path:
    found = Path(path).expanduser()
    if not (found.is_dir() if folder else found.is_file()):
        state = "something else" if found.exists() else "no such path"
        raise FileNotFoundError(f"expected {what}, got {path}: {state}")
    return found


def _names(classes: str | Path | Sequence[str]) -> list[str]:
    """Return names of classes, or those in a file."""
    if isinstance(classes, (str, Path)):
        lines = _existing(classes, "a file of classes").read_text(encoding="utf-8").splitlines()
        names = [line.strip() for line in lines if line.strip()]
    else:
        names = list(classes)
    if not names or len(set(names)) < len(names):
        raise ValueError(f"expected different names of classes, got {len(names)}: {names[:3]}")
    return names


def _voc(file: Path) -> Tensor:
    """Return the boxes of an annotation as shares of the width and height that it states."""
    try:
        root = ET.parse(file).getroot()
        width, height = (_value(root, f"size/{name}") for name in ("width", "height"))
        if not (width > 0 and height > 0):
            raise ValueError(f"a size of {width:g} x {height:g}")
        corners = [
            [_value(box, name) for name in ("xmin", "ymin", "xmax", "ymax")]
            for box in root.findall("object/bndbox")
        ]
    except (ET.ParseError, ValueError) as error:
        raise ValueError(
            f"expected an annotation in the format of PASCAL VOC in {file}, got {error}"
        ) from error
    return torch.tensor(corners).view(-1, 4) / torch.tensor([width, height, width, height])


def _value(element: ET.Element, path: str) -> float:
    text = element.findtext(path)
    if text is None:
        raise ValueError(f"no {path}")
    return float(text)


def open_source(
    spec: str,
    *,
    size: int = 224,
    resize: int | None = None,
    boxes: str | Path | None = None,
    classes: str | Path | Sequence[str] | None = None,
) -> Source:
    """Return the images that a command line names.

    Args:
        spec: ``embedded``, a folder, a file of tensors (``.pt``), or
            ``isic:FOLDER:GROUND_TRUTH.csv``.
        size: Side of the images of a folder, see `Folder`.
        resize: Likewise.
        boxes: Likewise; for a folder alone.
        classes: Likewise; for a folder alone.

    Raises:
        FileNotFoundError: No such path, or nothing in it.
        ValueError: Something else is there, or what is for a folder alone.
    """
    path = Path(spec).expanduser()
    isic = spec.startswith("isic:")
    if spec != "embedded" and not isic and path.is_dir():
        return Folder(path, size, resize, boxes, classes)
    if boxes is not None or classes is not None:
        raise ValueError(f"expected boxes and classes with a folder of pictures alone, got {spec}")
    if spec == "embedded":
        return Embedded()
    if isic:
        images, _, table = spec.removeprefix("isic:").rpartition(":")
        if not images or not table:
            raise ValueError(f"expected isic:FOLDER:GROUND_TRUTH.csv, got {spec}")
        return ISIC2018(images, table, size, resize)
    if not path.exists():
        raise FileNotFoundError(
            "expected embedded, a folder, a file of tensors (.pt) or "
            f"isic:FOLDER:GROUND_TRUTH.csv, got {spec}; there is no such path"
        )
    return TensorFile(path)
