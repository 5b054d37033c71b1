# SPDX-License-Identifier: MIT
"""Sources give what torchvision gives, one image at a time, and boxes move with the pictures."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms
from torchvision.datasets import ImageFolder

from captum_adv2.study import Settings
from captum_adv2.study.data import (
    CorruptImage,
    Embedded,
    Folder,
    Sample,
    Source,
    Tensors,
    open_source,
)
from captum_adv2.study.embedded import CLASSES, make_shapes

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


def opened(images: Path | str, size: int = 16, **settings: Any) -> Source:
    return open_source(Settings(images=str(images), size=size, **settings))


def made(kind: str, root: Path) -> Source:
    """Return a source of each kind."""
    if kind == "embedded":
        return opened("embedded")
    if kind == "folder":
        (root / "xml").mkdir()
        (root / "xml" / "cat_0.xml").write_text(annotation((40, 30), [(5, 6, 30, 29)]))
        return opened(folder(root / "pictures"), boxes=str(root / "xml"))
    images = {"images": torch.rand(4, 3, 8, 6)} if kind == "floats" else {}
    boxes = torch.tensor([[1, 2, 4, 8]] * 4)
    return opened(tensor_file(root / "held.pt", boxes=boxes, **images))


@pytest.fixture(params=["embedded", "tensors", "floats", "folder"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Source:
    return made(request.param, tmp_path)


def same(one: Sample, other: Sample) -> bool:
    pairs = zip(one, other, strict=True)
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def test_samples_are_what_they_say_in_any_order_and_may_be_changed(source: Source) -> None:
    count = min(len(source), 60)
    samples = [source[index] for index in reversed(range(count))][::-1]
    assert len({sample.name for sample in samples}) == count
    for index, (image, label, _, boxes) in enumerate(samples):
        channels, height, width = image.shape
        assert (channels, image.dtype, type(image)) == (3, torch.float32, torch.Tensor)
        assert 0 <= image.min() < image.max() <= 1
        assert type(label) is int
        assert (boxes.dtype, boxes.shape[1:], type(boxes)) == (torch.int64, (4,), torch.Tensor)
        for x0, y0, x1, y1 in boxes.tolist():
            assert 0 <= x0 < x1 <= width
            assert 0 <= y0 < y1 <= height
        kept = samples[index]._replace(image=image.clone(), boxes=boxes.clone())
        image.zero_()
        boxes.zero_()
        assert same(source[index], kept)


class TestFolder:
    def test_it_holds_what_image_folder_finds_in_one_mixed_order(self, tmp_path: Path) -> None:
        root = folder(tmp_path, 20, classes=("b", "a", "c", "d"))
        (root / "a" / "deeper").mkdir()
        picture(99).save(root / "a" / "deeper" / "one.PNG")
        (root / "a" / "notes.txt").write_text("no picture")
        found, expected = opened(root), ImageFolder(str(root))
        assert isinstance(found, Folder)
        assert sorted(found.samples) == sorted(expected.samples)
        assert found.samples == opened(root).samples != expected.samples
        assert list(found.classes) == expected.classes
        labels = [label for _, label in found.samples]
        assert all(set(labels[start : start + 20]) == {0, 1, 2, 3} for start in (0, 20, 40, 60))

    @pytest.mark.parametrize(("size", "resize"), [(16, 0), (16, 16), (20, 47), (16, 18)])
    @pytest.mark.parametrize("shape", [(40, 30), (30, 41), (33, 33), (9, 70)])
    def test_pictures_are_resized_and_cropped_as_torchvision_does(
        self, size: int, resize: int, shape: tuple[int, int], tmp_path: Path
    ) -> None:
        (tmp_path / "a").mkdir()
        picture(size=shape).save(tmp_path / "a" / "one.png")
        usual = transforms.Compose(
            [transforms.Resize(resize or 18), transforms.CenterCrop(size), transforms.ToTensor()]
        )
        found = opened(tmp_path, size, resize=resize)[0]
        assert torch.equal(found.image, usual(picture(size=shape)))
        assert found.name == "a/one.png"

    def test_a_file_of_classes_gives_the_labels(self, tmp_path: Path) -> None:
        root, names = folder(tmp_path / "pictures"), ["zebra", "dog", "wild ape", "cat"]
        (tmp_path / "names.txt").write_text("\n".join(names) + "\n\n")
        found = opened(root, classes=str(tmp_path / "names.txt"))
        assert isinstance(found, Folder)
        assert list(found.classes) == names
        assert {(Path(file).parent.name, label) for file, label in found.samples} == {
            ("dog", 1),
            ("cat", 3),
        }
        (tmp_path / "names.txt").write_text("cat\nn01440764")
        with pytest.raises(ValueError, match="to be classes, got dog"):
            opened(root, classes=str(tmp_path / "names.txt"))

    def test_folders_without_pictures(self, tmp_path: Path) -> None:
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "notes.txt").write_text("no picture")
        with pytest.raises(FileNotFoundError, match="a sub-folder of pictures"):
            opened(tmp_path)

    def test_a_crop_larger_than_the_picture_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="expected resize at least 16, the size, got 15"):
            opened(folder(tmp_path), 16, resize=15)

    @pytest.mark.parametrize("content", [None, b"", b"\x89PNG\r\n\x1a\n" + bytes(100)])
    def test_corrupt_pictures_are_named_and_the_rest_is_read(
        self, content: bytes | None, tmp_path: Path
    ) -> None:
        found = opened(folder(tmp_path))
        assert isinstance(found, Folder)
        file = Path(found.samples[2][0])
        file.unlink() if content is None else file.write_bytes(content)
        with pytest.raises(CorruptImage, match=file.name):
            found[2]
        assert all(found[other].image.shape == (3, 16, 16) for other in (0, 1, 3, 4, 5))


class TestBoxes:
    def one(self, root: Path, image: Image.Image, text: str, size: int, resize: int) -> Sample:
        (root / "pictures" / "a").mkdir(parents=True)
        (root / "xml" / "deeper").mkdir(parents=True)
        image.save(root / "pictures" / "a" / "one.png")
        (root / "xml" / "deeper" / "one.xml").write_text(text)
        return opened(root / "pictures", size, resize=resize, boxes=str(root / "xml"))[0]

    @given(
        *(st.integers(20, 90),) * 2,
        st.integers(8, 40),
        st.integers(0, 40),
        st.integers(1, 3),
        st.data(),
    )
    def test_they_move_with_the_picture(
        self, width: int, height: int, size: int, more: int, scale: int, data: st.DataObject
    ) -> None:
        def span(side: int) -> tuple[int, int]:
            low = data.draw(st.integers(0, side - 1))
            return low, data.draw(st.integers(low + 1, side))

        (x0, x1), (y0, y1) = span(width), span(height)
        resize = size + more
        values = np.zeros((height, width, 3), dtype=np.uint8)
        values[y0:y1, x0:x1] = 255
        # The annotation counts in pixels of another size than the file's, as some of ImageNet's do.
        scaled = tuple(scale * corner for corner in (x0, y0, x1, y1))
        text = annotation((width * scale, height * scale), [scaled])
        with TemporaryDirectory() as name:
            image, _, _, boxes = self.one(Path(name), Image.fromarray(values), text, size, resize)
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

    def test_several_and_those_outside_the_crop(self, tmp_path: Path) -> None:
        boxes = [(0, 0, 40, 20), (12, 4, 20, 10), (0, 0, 9, 20), (31, 0, 40, 20), (9, 0, 11, 3)]
        found = self.one(tmp_path, picture(size=(40, 20)), annotation((40, 20), boxes), 20, 20)
        assert found.boxes.tolist() == [[0, 0, 20, 20], [2, 4, 10, 10], [0, 0, 1, 3]]

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "<annotation/>",
            annotation((0, 30), []),
            annotation((40, 30), [("left", 0, 1, 1)]),  # type: ignore[list-item]
            annotation((40, 30), [(0, 0, 1, 1)]).replace("ymax", "top"),
        ],
    )
    def test_malformed_annotations_are_named(self, text: str, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"PASCAL VOC in .*one\.xml"):
            self.one(tmp_path, picture(), text, 20, 20)

    def test_annotations_of_other_pictures(self, tmp_path: Path) -> None:
        root, xml = folder(tmp_path / "pictures"), tmp_path / "xml"
        for name in ("other", "dog_1"):
            with pytest.raises(FileNotFoundError, match="annotations"):
                opened(root, boxes=str(xml))
            xml.mkdir(exist_ok=True)
            (xml / f"{name}.xml").write_text(annotation((40, 30), [(0, 0, 40, 30)]))
        found = opened(root, boxes=str(xml))
        boxes = {sample.name: len(sample.boxes) for sample in (found[i] for i in range(6))}
        assert [name for name, count in boxes.items() if count] == ["dog/dog_1.png"]


class TestTensors:
    @pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64, torch.float16])
    def test_tensors_come_back(self, dtype: torch.dtype, tmp_path: Path) -> None:
        levels = torch.arange(4 * 3 * 8 * 6).view(4, 3, 8, 6) % 256
        images = levels.byte() if dtype == torch.uint8 else (levels / 255).to(dtype)
        found = Tensors(tensor_file(tmp_path / "a.pt", images=images))
        assert [found[index].label for index in range(len(found))] == [2, 0, 1, 2]
        near = 1e-3 if dtype == torch.float16 else 0
        for index in range(4):
            expected = levels[index] / 255
            torch.testing.assert_close(found[index].image, expected, atol=near, rtol=0)
        assert found.classes == ()
        assert (found[3].name, found[3].boxes.shape) == ("a.pt[3]", (0, 4))

    def test_boxes_and_classes(self, tmp_path: Path) -> None:
        one = torch.tensor([[0, 0, 6, 8], [1, 1, 2, 2], [0, 4, 3, 5], [2, 2, 6, 6]])
        several = [one[:2], one[2:3], torch.zeros(0, 4), one[[3, 1]].int()]
        found = Tensors(tensor_file(tmp_path / "a.pt", boxes=one))
        assert [found[i].boxes.tolist() for i in range(4)] == [[box] for box in one.tolist()]
        found = Tensors(tensor_file(tmp_path / "b.pt", boxes=several, classes=["x", "y", "z"]))
        assert [found[i].boxes.tolist() for i in range(4)] == [box.tolist() for box in several]
        assert found.classes == ("x", "y", "z")

    @pytest.mark.parametrize(
        ("changes", "match"),
        [
            ({"labels": None}, "images and labels"),
            ({"images": torch.zeros(3, 8, 6)}, "images .* with 4 dimensions"),
            ({"images": torch.zeros(0, 3, 8, 6)}, "at least one"),
            ({"labels": torch.zeros(3).long()}, "a label, and boxes, for each image"),
            ({"labels": torch.zeros(4)}, "an integer dtype"),
            ({"boxes": torch.zeros(3, 4).long()}, "a label, and boxes, for each image"),
        ],
    )
    def test_files_that_do_not_fit(
        self, changes: dict[str, Any], match: str, tmp_path: Path
    ) -> None:
        file = tensor_file(tmp_path / "named.pt", **changes)
        with pytest.raises((ValueError, TypeError), match=match) as caught:
            Tensors(file)
        assert "named.pt" in str(caught.value)
        file.write_bytes(b"no tensors")
        with pytest.raises(ValueError, match=r"torch\.save .*named\.pt"):
            Tensors(file)

    @pytest.mark.parametrize("value", [1.01, -0.01, float("nan"), float("inf")])
    def test_images_out_of_range_are_corrupt_and_the_rest_is_read(
        self, value: float, tmp_path: Path
    ) -> None:
        images = torch.full((4, 3, 8, 6), 0.5)
        images[2, 1, 3, 3] = value
        found = Tensors(tensor_file(tmp_path / "a.pt", images=images))
        with pytest.raises(CorruptImage, match=r"a\.pt\[2\] in \[0, 1\]"):
            found[2]
        assert all(found[index].image.eq(0.5).all() for index in (0, 1, 3))


def test_embedded_pictures_are_shapes_that_no_network_was_trained_on() -> None:
    found = Embedded()
    assert found.classes == CLASSES
    for index, block, place in ((0, 0, 0), (69, 1, 19), (49, 0, 49), (50, 1, 0), (3, 0, 3)):
        shapes = make_shapes(50, seed=2_000_000 + block)
        image, label, _, boxes = found[index]
        assert torch.equal(image, shapes.images[place])
        assert label == shapes.labels[place]
        assert boxes.tolist() == [shapes.boxes[place].tolist()]
    for seed in (0, 1_000_003):
        assert not torch.equal(found[0].image, make_shapes(1, seed=seed).images[0])


def test_a_function_makes_a_source_of_the_transform_and_a_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine_pictures.py").write_text(
        "from captum_adv2.study.data import Folder\n"
        "def pictures(transform, root):\n"
        "    return Folder(root, transform)\n"
        "number = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    root = folder(tmp_path / "pictures")
    assert same(opened(f"mine_pictures:pictures={root}")[1], opened(root)[1])
    for spec, message in (("pictures_", "has no attribute"), ("number", "a function, got int")):
        with pytest.raises(ValueError, match=message):
            opened(f"mine_pictures:{spec}")
    with pytest.raises(ValueError, match="package.module:function, got No module named 'nowhere'"):
        opened("nowhere:pictures")


def test_names_that_do_not_exist_and_options_that_do_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FileNotFoundError, match="got nowhere; there is no such path"):
        opened("nowhere")
    for images in ("embedded", str(tensor_file(tmp_path / "held.pt"))):
        with pytest.raises(ValueError, match="boxes and classes with a folder alone"):
            opened(images, boxes=str(tmp_path))
    folder(tmp_path / "embedded")
    monkeypatch.chdir(tmp_path)  # where a folder has that name
    assert isinstance(opened("embedded"), Embedded)
    assert isinstance(opened("./embedded"), Folder)
