# SPDX-License-Identifier: MIT
"""Sources give what torchvision gives, one image at a time, and boxes move with the pictures."""

from __future__ import annotations

import csv
import gc
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import isic
import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms
from torchvision.datasets import ImageFolder

from captum_adv2.study import sources
from captum_adv2.study.embedded.models import load_resnet
from captum_adv2.study.embedded.shapes import CLASSES, make_shapes
from captum_adv2.study.sources import (
    ISIC2018,
    CorruptImage,
    Embedded,
    Folder,
    Sample,
    Source,
    TensorFile,
    embedded,
    open_source,
)

Box = tuple[float, float, float, float]


def picture(seed: int = 0, size: tuple[int, int] = (40, 30)) -> Image.Image:
    """Return a picture of noise, of some width and height."""
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values)


def annotation(size: tuple[int, int], boxes: list[Box]) -> str:
    objects = "".join(
        "<object><name>n01440764</name><bndbox>"
        f"<xmin>{x0}</xmin><ymin>{y0}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax>"
        "</bndbox></object>"
        for x0, y0, x1, y1 in boxes
    )
    width, height = size
    return (
        f"<annotation><size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
        f"{objects}</annotation>"
    )


def folder(root: Path, count: int = 3, classes: tuple[str, ...] = ("cat", "dog")) -> Path:
    """Write pictures of some classes."""
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for number in range(count):
            suffix = ".png" if number % 2 else ".JPEG"
            picture(10 * label + number).save(root / name / f"{name}_{number}{suffix}")
    return root


def tensor_file(path: Path, **changes: Any) -> Path:
    generator = torch.Generator().manual_seed(0)
    held = {
        "images": torch.randint(0, 256, (4, 3, 8, 6), generator=generator, dtype=torch.uint8),
        "labels": torch.tensor([2, 0, 1, 2]),
    }
    held |= changes
    torch.save({name: value for name, value in held.items() if value is not None}, path)
    return path


def made(kind: str, root: Path) -> Source:
    """Return a source of each kind."""
    if kind == "embedded":
        return Embedded(count=60)
    if kind == "tensors":
        return TensorFile(tensor_file(root / "held.pt", boxes=torch.tensor([[1, 2, 4, 8]] * 4)))
    if kind == "floats":
        return TensorFile(tensor_file(root / "held.pt", images=torch.rand(4, 3, 8, 6)))
    if kind == "isic":
        return ISIC2018(*isic.generate(root, 9, size=(30, 40)), size=16)
    (root / "xml").mkdir()
    (root / "xml" / "cat_0.xml").write_text(annotation((40, 30), [(5, 6, 30, 29)]))
    return Folder(folder(root / "pictures"), size=16, boxes=root / "xml")


@pytest.fixture(params=["embedded", "tensors", "floats", "isic", "folder"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Source:
    return made(request.param, tmp_path)


def same(one: Sample, other: Sample) -> bool:
    return all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(one, other, strict=True)
    )


# What every source keeps to


def test_samples_are_what_they_say(source: Source) -> None:
    names = set()
    for index in range(len(source)):
        image, label, name, boxes = source[index]
        channels, height, width = image.shape
        assert (channels, image.dtype, type(image)) == (3, torch.float32, torch.Tensor)
        assert 0 <= image.min() < image.max() <= 1
        assert type(label) is int
        assert source.classes[label]
        assert (boxes.dtype, boxes.shape[1:], type(boxes)) == (torch.int64, (4,), torch.Tensor)
        for x0, y0, x1, y1 in boxes.tolist():
            assert 0 <= x0 < x1 <= width
            assert 0 <= y0 < y1 <= height
        names.add(name)
    assert len(names) == len(source)


def test_samples_are_the_same_in_any_order_and_nobody_elses(source: Source) -> None:
    last = len(source) - 1
    final, first = source[last], source[0]
    kept = first._replace(image=first.image.clone(), boxes=first.boxes.clone())
    assert not torch.equal(final.image, first.image)
    first.image.zero_()
    first.boxes.zero_()
    assert same(source[0], kept)
    assert same(source[-1], final)
    with pytest.raises(IndexError):
        source[len(source)]


# Folders


def test_a_folder_holds_what_image_folder_finds(tmp_path: Path) -> None:
    root = folder(tmp_path, classes=("b", "a", "c"))
    (root / "a" / "deeper").mkdir()
    picture(99).save(root / "a" / "deeper" / "one.PNG")
    (root / "a" / "notes.txt").write_text("no picture")
    found, expected = Folder(root), ImageFolder(str(root))
    pairs = [(str(file), label) for file, label in zip(found.files, found.labels, strict=True)]
    assert sorted(pairs) == sorted(expected.samples)
    assert list(found.classes) == expected.classes
    assert found[0].name == found.files[0].relative_to(root).as_posix()


@pytest.mark.parametrize(("size", "resize"), [(16, None), (16, 16), (20, 47), (16, 18)])
@pytest.mark.parametrize("shape", [(40, 30), (30, 41), (33, 33), (9, 70)])
def test_pictures_are_resized_and_cropped_as_torchvision_does(
    size: int, resize: int | None, shape: tuple[int, int], tmp_path: Path
) -> None:
    (tmp_path / "a").mkdir()
    picture(size=shape).save(tmp_path / "a" / "one.png")
    usual = transforms.Compose(
        [transforms.Resize(resize or 18), transforms.CenterCrop(size), transforms.ToTensor()]
    )
    expected = usual(picture(size=shape))
    assert torch.equal(Folder(tmp_path, size, resize)[0].image, expected)


def test_the_usual_sizes() -> None:
    for size, resize in ((224, 256), (299, 342)):
        assert round(size * 8 / 7) == resize
    with TemporaryDirectory() as name:
        root = folder(Path(name), 1, ("a",))
        assert torch.equal(Folder(root)[0].image, Folder(root, 224, 256)[0].image)


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P", "1"])
def test_pictures_of_any_mode_become_rgb(mode: str, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    converted = picture().convert(mode)
    converted.save(tmp_path / "a" / "one.tif")
    found = Folder(tmp_path, 30, 30)[0].image
    middle = converted.convert("RGB").crop((5, 0, 35, 30))
    assert torch.equal((found * 255).round().byte(), transforms.PILToTensor()(middle))


def test_the_classes_are_mixed_in_one_order(tmp_path: Path) -> None:
    root = folder(tmp_path, 20, ("a", "b", "c", "d"))
    found = Folder(root)
    assert found.files == Folder(root).files
    assert all(set(found.labels[start : start + 20]) == {0, 1, 2, 3} for start in (0, 20, 40, 60))


def test_classes_of_a_list_or_file_give_the_labels(tmp_path: Path) -> None:
    root = folder(tmp_path / "pictures")
    names = ["zebra", "dog", "ape", "cat"]
    (tmp_path / "names.txt").write_text("\n".join(names) + "\n\n")
    for classes in (names, tmp_path / "names.txt", str(tmp_path / "names.txt")):
        found = Folder(root, classes=classes)
        assert found.classes == tuple(names)
        assert all(
            found.classes[label] in file.name
            for file, label in zip(found.files, found.labels, strict=True)
        )
        assert set(found.labels) == {1, 3}


def test_classes_that_do_not_fit(tmp_path: Path) -> None:
    root = folder(tmp_path / "pictures")
    with pytest.raises(ValueError, match="to be classes, got dog"):
        Folder(root, classes=["cat", "n01440764"])
    with pytest.raises(ValueError, match="different names"):
        Folder(root, classes=["cat", "dog", "cat"])
    with pytest.raises(FileNotFoundError, match="a file of classes"):
        Folder(root, classes=tmp_path / "none.txt")


def test_folders_without_pictures(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="a folder of pictures, got .*: no such path"):
        Folder(tmp_path / "none")
    for name in ("flat.png", "a/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        picture().save(tmp_path / name, "png")
        with pytest.raises(FileNotFoundError, match=r"expected pictures \(\.jpg, .*got none; it"):
            Folder(tmp_path)


@pytest.mark.parametrize(
    ("size", "resize", "error"),
    [(0, None, ValueError), (16, 15, ValueError), (1.5, None, TypeError), (16, "x", TypeError)],
)
def test_sizes_that_are_none(
    size: Any, resize: Any, error: type[Exception], tmp_path: Path
) -> None:
    with pytest.raises(error, match="expected (size|resize)"):
        Folder(folder(tmp_path), size, resize)


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:200])


@pytest.mark.parametrize(
    "spoil",
    [
        _cut,
        Path.unlink,
        lambda file: file.write_bytes(b""),
        lambda file: file.write_text("no picture"),
        lambda file: file.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100)),
    ],
    ids=["truncated", "gone", "empty", "text", "broken chunk"],
)
@pytest.mark.parametrize("index", [0, 1, 2])
def test_corrupt_pictures_are_named_and_the_rest_is_read(
    spoil: Callable[[Path], Any], index: int, tmp_path: Path
) -> None:
    found = Folder(folder(tmp_path), size=16)
    spoil(found.files[index])
    with pytest.raises(CorruptImage, match=found.files[index].name):
        found[index]
    assert all(found[other].image.shape == (3, 16, 16) for other in range(6) if other != index)


# Boxes


def one_picture(root: Path, image: Image.Image, text: str, size: int, resize: int) -> Sample:
    (root / "a").mkdir()
    (root / "xml" / "deeper").mkdir(parents=True)
    image.save(root / "a" / "one.png")
    (root / "xml" / "deeper" / "one.xml").write_text(text)
    return Folder(root, size, resize, boxes=root / "xml", classes=["a", "xml"])[0]


sides = st.integers(20, 90)


@given(sides, sides, st.integers(8, 40), st.integers(0, 40), st.integers(1, 3), st.data())
def test_boxes_move_with_the_picture(
    width: int, height: int, size: int, more: int, scale: int, data: st.DataObject
) -> None:
    def span(side: int) -> tuple[int, int]:
        low = data.draw(st.integers(0, side - 1))
        return low, data.draw(st.integers(low + 1, side))

    (x0, x1), (y0, y1) = span(width), span(height)
    resize = size + more
    values = np.zeros((height, width, 3), dtype=np.uint8)
    values[y0:y1, x0:x1] = 255
    # The annotation counts in pixels of another size than the file's, as some of ImageNet's do.
    text = annotation((width * scale, height * scale), [tuple(scale * v for v in (x0, y0, x1, y1))])
    with TemporaryDirectory() as name:
        image, _, _, boxes = one_picture(Path(name), Image.fromarray(values), text, size, resize)
    # The corners by hand: resized, shifted, clipped, rounded.
    shorter = min(width, height)
    across, down = (int(resize * side / shorter) for side in (width, height))
    left, top = (round((side - size) / 2) for side in (across, down))
    exact = [
        min(max(value, 0.0), float(size))
        for value in (
            x0 * across / width - left,
            y0 * down / height - top,
            x1 * across / width - left,
            y1 * down / height - top,
        )
    ]
    if not len(boxes):
        assert min(exact[2] - exact[0], exact[3] - exact[1]) < 1
        return
    assert (boxes[0] - torch.tensor(exact)).abs().max() < 0.501
    # And the object itself, where it is wide enough to be seen after the resampling.
    blur = 2 * max(1.0, resize / shorter, shorter / resize)
    assume(min(exact[2] - exact[0], exact[3] - exact[1]) > blur)
    inside = image[0] > 0.5
    columns, rows = inside.any(dim=0).nonzero(), inside.any(dim=1).nonzero()
    seen = torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
    assert (seen - boxes[0]).abs().max() <= 1


def test_several_boxes_and_those_outside_the_crop(tmp_path: Path) -> None:
    boxes = [(0, 0, 40, 20), (12, 4, 20, 10), (0, 0, 9, 20), (31, 0, 40, 20), (9, 0, 11, 3)]
    text = annotation((40, 20), boxes)
    found = one_picture(tmp_path, picture(size=(40, 20)), text, 20, 20).boxes
    assert found.tolist() == [[0, 0, 20, 20], [2, 4, 10, 10], [0, 0, 1, 3]]


def test_boxes_are_those_of_the_picture_of_that_name(tmp_path: Path) -> None:
    root = folder(tmp_path / "pictures")
    (tmp_path / "xml").mkdir()
    for name, box in (("cat_1", (0, 0, 10, 10)), ("dog_0", (20, 10, 40, 30))):
        (tmp_path / "xml" / f"{name}.xml").write_text(annotation((40, 30), [box]))
    found = Folder(root, 30, 30, boxes=tmp_path / "xml")
    boxes = {file.stem: found[index].boxes.tolist() for index, file in enumerate(found.files)}
    assert boxes.pop("cat_1") == [[0, 0, 5, 10]]
    assert boxes.pop("dog_0") == [[15, 10, 30, 30]]
    assert set(map(len, boxes.values())) == {0}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<annotation>",
        "<annotation/>",
        "<annotation><size><width>4</width></size></annotation>",
        annotation((0, 30), []),
        annotation((40, 30), [("left", 0, 1, 1)]),  # type: ignore[list-item]
        annotation((40, 30), [(0, 0, 1, 1)]).replace("ymax", "top"),
        annotation((40, 30), []).replace("40", "nan"),
    ],
)
def test_malformed_annotations_are_named(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"PASCAL VOC in .*one\.xml"):
        one_picture(tmp_path, picture(), text, 20, 20)


def test_annotations_that_do_not_belong(tmp_path: Path) -> None:
    root, xml = folder(tmp_path / "pictures"), tmp_path / "xml"
    with pytest.raises(FileNotFoundError, match="a folder of annotations"):
        Folder(root, boxes=xml)
    (xml / "deeper").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="got 0 files"):
        Folder(root, boxes=xml)
    (xml / "other.xml").write_text(annotation((40, 30), []))
    with pytest.raises(FileNotFoundError, match="got 1 files"):
        Folder(root, boxes=xml)
    for place in (xml, xml / "deeper"):
        (place / "cat_0.xml").write_text(annotation((40, 30), []))
    with pytest.raises(ValueError, match=r"two named cat_0\.xml"):
        Folder(root, boxes=xml)


# Files of tensors


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64, torch.float16])
def test_tensors_come_back(dtype: torch.dtype, tmp_path: Path) -> None:
    bytes_ = torch.arange(4 * 3 * 8 * 6).view(4, 3, 8, 6) % 256
    images = bytes_.byte() if dtype == torch.uint8 else (bytes_ / 255).to(dtype)
    found = TensorFile(tensor_file(tmp_path / "a.pt", images=images))
    assert len(found) == 4
    for index in range(4):
        torch.testing.assert_close(
            found[index].image,
            bytes_[index] / 255,
            atol=1e-3 if dtype == torch.float16 else 0,
            rtol=0,
        )
        assert found[index].label == [2, 0, 1, 2][index]
    assert found.classes == ("0", "1", "2")
    assert (found[3].name, found[3].boxes.shape) == ("a.pt[3]", (0, 4))


def test_boxes_of_tensors(tmp_path: Path) -> None:
    one = torch.tensor([[0, 0, 6, 8], [1, 1, 2, 2], [0, 4, 3, 5], [2, 2, 6, 6]])
    several = [one[:2], one[2:3], torch.zeros(0, 4), one[[3, 1]].int()]
    found = TensorFile(tensor_file(tmp_path / "a.pt", boxes=one))
    assert [found[index].boxes.tolist() for index in range(4)] == [[box] for box in one.tolist()]
    found = TensorFile(tensor_file(tmp_path / "b.pt", boxes=several, classes=["x", "y", "z", "w"]))
    assert [found[index].boxes.tolist() for index in range(4)] == [box.tolist() for box in several]
    assert found[2].boxes.dtype == torch.int64
    assert found.classes == ("x", "y", "z", "w")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"images": None}, "a dict of images and labels"),
        ({"labels": None}, "a dict of images and labels"),
        ({"images": torch.zeros(4, 1, 8, 6)}, r"images \(N, 3, H, W\)"),
        ({"images": torch.zeros(3, 8, 6)}, r"images \(N, 3, H, W\)"),
        ({"images": torch.zeros(0, 3, 8, 6)}, "at least one"),
        ({"images": torch.zeros(4, 3, 8, 6).long()}, "uint8 or a floating"),
        ({"images": [1, 2, 3, 4]}, r"images \(N, 3, H, W\)"),
        ({"labels": torch.zeros(3).long()}, "4 integer labels"),
        ({"labels": torch.zeros(4)}, "4 integer labels"),
        ({"labels": [0, 1, 2, 2]}, "4 integer labels"),
        ({"labels": torch.tensor([0, -1, 0, 0])}, r"labels in \[0, 0\]"),
        ({"classes": ["a", "b"]}, r"labels in \[0, 1\]"),
        ({"boxes": torch.zeros(3, 4).long()}, "expected boxes"),
        ({"boxes": torch.zeros(4, 4)}, "expected boxes"),
        ({"boxes": [torch.zeros(1, 3).long()] * 4}, "expected boxes"),
        ({"boxes": 7}, "expected boxes"),
    ],
)
def test_tensors_that_do_not_fit(changes: dict[str, Any], match: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        TensorFile(tensor_file(tmp_path / "named.pt", **changes))
    assert "named.pt" in str(caught.value)


def test_files_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="a file of tensors"):
        TensorFile(tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("no tensors")
    with pytest.raises(ValueError, match=r"torch\.save"):
        TensorFile(tmp_path / "text.pt")
    torch.save({"images": Path("code"), "labels": print}, tmp_path / "code.pt")
    with pytest.raises(ValueError, match=r"torch\.save"):
        TensorFile(tmp_path / "code.pt")
    torch.save(torch.zeros(2), tmp_path / "tensor.pt")
    with pytest.raises(ValueError, match="got a Tensor"):
        TensorFile(tmp_path / "tensor.pt")


@pytest.mark.parametrize("value", [1.01, -0.01, float("nan"), float("inf")])
def test_images_out_of_range_are_corrupt_and_the_rest_is_read(value: float, tmp_path: Path) -> None:
    images = torch.full((4, 3, 8, 6), 0.5)
    images[2, 1, 3, 3] = value
    found = TensorFile(tensor_file(tmp_path / "a.pt", images=images))
    with pytest.raises(CorruptImage, match=r"a\.pt\[2\] in \[0, 1\]"):
        found[2]
    assert all(found[index].image.eq(0.5).all() for index in (0, 1, 3))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_tensors_stay_on_disk(tmp_path: Path) -> None:
    def private() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

    megabytes = 48
    images = torch.zeros(megabytes, 3, 512, 683, dtype=torch.uint8)
    file = tensor_file(tmp_path / "a.pt", images=images, labels=torch.arange(megabytes))
    del images
    gc.collect()
    before = private()
    found = TensorFile(file)
    assert sum(found[index].label for index in range(megabytes)) == sum(range(megabytes))
    assert private() - before < 1024 * megabytes / 2  # kB


# Skin lesions


@pytest.fixture
def lesions(tmp_path: Path) -> tuple[Path, Path]:
    return isic.generate(tmp_path, 14, size=(30, 40))


def rows(table: Path) -> list[list[str]]:
    with table.open(newline="") as file:
        return list(csv.reader(file))


def test_lesions_have_the_diagnoses_of_the_table(lesions: tuple[Path, Path]) -> None:
    found = ISIC2018(*lesions, size=16)
    header, *table = rows(lesions[1])
    assert ",".join(header) == "image,MEL,NV,BCC,AKIEC,BKL,DF,VASC"
    assert len(found) == len(table) == 14
    for index, (name, *cells) in enumerate(table):
        sample = found[index]
        assert sample.name == f"{name}.jpg"
        assert cells[sample.label] == "1.0"
        assert header[1 + sample.label] == found.classes[sample.label]
        usual = transforms.Compose(
            [transforms.Resize(18), transforms.CenterCrop(16), transforms.ToTensor()]
        )
        assert torch.equal(sample.image, usual(Image.open(lesions[0] / sample.name)))
    assert sorted(found.labels) == sorted([*range(7)] * 2)


def test_a_table_of_some_rows_is_a_part(lesions: tuple[Path, Path], tmp_path: Path) -> None:
    lines = lesions[1].read_text().splitlines()
    part = tmp_path / "part.csv"
    part.write_text("\ufeff" + "\r\n".join([lines[0], lines[3], lines[9], "", ""]))
    whole, found = ISIC2018(*lesions), ISIC2018(lesions[0], part)
    assert found.files == (whole.files[2], whole.files[8])
    assert found.labels == (whole.labels[2], whole.labels[8])


def test_rows_without_a_picture(lesions: tuple[Path, Path]) -> None:
    (lesions[0] / "ISIC_0024307.jpg").unlink()
    (lesions[0] / "ISIC_0024310.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"none for 2 of 14, such as ISIC_0024307\.jpg"):
        ISIC2018(*lesions)


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ("image,MEL,NV", "image,NV,MEL", "the header"),
        ("image,", "", "the header"),
        ("ISIC_0024306,0.0", "ISIC_0024306,1.0", "ISIC_0024306"),
        ("ISIC_0024306,0.0", "ISIC_0024306", "ISIC_0024306"),
        ("ISIC_0024306,0.0", "ISIC_0024306,0.5", "ISIC_0024306"),
        ("ISIC_0024306,0.0", "ISIC_0024306,x", "ISIC_0024306"),
        ("ISIC_0024306,0.0", "ISIC_0024306,nan", "ISIC_0024306"),
    ],
)
def test_tables_of_another_format(
    old: str, new: str, match: str, lesions: tuple[Path, Path]
) -> None:
    text = lesions[1].read_text()
    assert old in text
    lesions[1].write_text(text.replace(old, new))
    with pytest.raises(ValueError, match=match) as caught:
        ISIC2018(*lesions)
    assert "ground-truth.csv" in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"", b"image,MEL,NV,BCC,AKIEC,BKL,DF,VASC\n", bytes(range(256))]
)
def test_tables_without_rows(content: bytes, lesions: tuple[Path, Path]) -> None:
    lesions[1].write_bytes(content)
    with pytest.raises(ValueError, match="the header"):
        ISIC2018(*lesions)


# Generated pictures


def test_embedded_pictures_are_the_shapes(tmp_path: Path) -> None:
    found = Embedded(count=70, seed=11)
    assert (len(found), found.classes) == (70, tuple(CLASSES))
    for index, seed, place in ((0, 11, 0), (69, 12, 19), (49, 11, 49), (50, 12, 0), (3, 11, 3)):
        shapes = make_shapes(50, seed=seed)
        image, label, _, boxes = found[index]
        assert torch.equal(image, shapes.images[place])
        assert label == shapes.labels[place]
        assert boxes.tolist() == [shapes.boxes[place].tolist()]


def test_a_block_is_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    module = embedded().shapes
    monkeypatch.setattr(
        module,
        "make_shapes",
        lambda count, seed: drawn.append(seed) or make_shapes(count, seed=seed),
    )
    found = Embedded(count=120, seed=5)
    assert not drawn
    for index in range(120):
        found[index]
    assert drawn == [5, 6, 7]


def test_embedded_pictures_are_not_those_to_train_on() -> None:
    assert not torch.equal(Embedded()[0].image, make_shapes(1, seed=0).images[0])
    assert not torch.equal(Embedded()[0].image, make_shapes(1, seed=1_000_003).images[0])


def test_the_embedded_package_is_the_examples() -> None:
    assert embedded().shapes.make_shapes is make_shapes
    assert embedded().models.load_resnet is load_resnet


def test_without_the_examples(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sources, "EXAMPLES", tmp_path)
    with pytest.raises(FileNotFoundError, match="clone the repository"):
        open_source("embedded")


# By name


def test_open_source_finds_each_kind(
    tmp_path: Path, lesions: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = folder(tmp_path / "embedded")
    (tmp_path / "names.txt").write_text("dog\ncat")
    file = tensor_file(tmp_path / "held.pt")
    assert isinstance(open_source(str(root)), Folder)
    assert isinstance(open_source(str(file)), TensorFile)
    found = open_source(f"isic:{lesions[0]}:{lesions[1]}", size=20, resize=25)
    assert isinstance(found, ISIC2018)
    assert same(found[3], ISIC2018(*lesions, size=20, resize=25)[3])
    named = open_source(str(root), size=12, resize=20, classes=str(tmp_path / "names.txt"))
    assert same(named[2], Folder(root, 12, 20, classes=["dog", "cat"])[2])
    monkeypatch.chdir(tmp_path)  # where a folder has that name
    assert isinstance(open_source("embedded"), Embedded)
    assert isinstance(open_source("./embedded"), Folder)


def test_open_source_passes_boxes_on(tmp_path: Path) -> None:
    root = folder(tmp_path / "pictures", 1, ("cat",))
    (tmp_path / "xml").mkdir()
    (tmp_path / "xml" / "cat_0.xml").write_text(annotation((40, 30), [(5, 0, 35, 30)]))
    found = open_source(str(root), size=30, resize=30, boxes=tmp_path / "xml")
    assert found[0].boxes.tolist() == [[0, 0, 30, 30]]


@pytest.mark.parametrize(
    ("spec", "options", "error", "match"),
    [
        ("nowhere", {}, FileNotFoundError, "got nowhere; there is no such path"),
        ("isic:", {}, ValueError, r"isic:FOLDER:GROUND_TRUTH\.csv"),
        ("isic:here", {}, ValueError, r"isic:FOLDER:GROUND_TRUTH\.csv"),
        ("isic:here:there", {}, FileNotFoundError, "got here: no such path"),
        ("isic:.:there", {}, FileNotFoundError, "got there: no such path"),
        ("embedded", {"boxes": "."}, ValueError, "with a folder of pictures alone"),
        ("isic:here:there", {"classes": ["a"]}, ValueError, "with a folder of pictures alone"),
        ("embedded/", {}, FileNotFoundError, "no such path"),
        (".", {}, FileNotFoundError, "expected pictures"),
    ],
)
def test_open_source_says_what_it_expects(
    spec: str,
    options: dict[str, Any],
    error: type[Exception],
    match: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=match):
        open_source(spec, **options)
