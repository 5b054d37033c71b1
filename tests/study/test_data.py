# SPDX-License-Identifier: MIT
"""Sources give what torchvision gives, one image at a time, and boxes move with the pictures."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms
from torchvision.datasets import ImageFolder

from captum_adv2.study import Settings
from captum_adv2.study.data import CorruptImage, Embedded, Folder, Sample, Source, open_source
from captum_adv2.study.embedded import CLASSES, make_shapes


def picture(seed: int = 0, size: tuple[int, int] = (40, 30)) -> Image.Image:
    """Return a picture of noise, of some width and height."""
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values)


def annotation(size: tuple[int, int], *boxes: tuple[Any, ...]) -> str:
    corners = "<xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax>"
    objects = (f"<object><bndbox>{corners.format(*box)}</bndbox></object>" for box in boxes)
    side = "<size><width>{}</width><height>{}</height></size>".format(*size)
    return f"<annotation>{side}{''.join(objects)}</annotation>"


def folder(root: Path, count: int = 3, classes: tuple[str, ...] = ("cat", "dog")) -> Path:
    """Write pictures of some classes."""
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for number in range(count):
            suffix = ".png" if number % 2 else ".JPEG"
            picture(10 * label + number).save(root / name / f"{name}_{number}{suffix}")
    return root


def tensors(path: Path, **changes: Any) -> Path:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4, 3, 8, 6), generator=generator, dtype=torch.uint8)
    torch.save({"images": images, "labels": torch.tensor([2, 0, 1, 2]), **changes}, path)
    return path


def opened(images: Path | str, size: int = 16, **settings: Any) -> Source:
    return open_source(Settings(images=str(images), size=size, **settings))


@pytest.fixture(params=["embedded", "tensors", "floats", "folder"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Source:
    """A source of each kind."""
    if request.param == "embedded":
        return opened("embedded")
    if request.param == "folder":
        (tmp_path / "xml").mkdir()
        (tmp_path / "xml" / "cat_0.xml").write_text(annotation((40, 30), (5, 6, 30, 29)))
        return opened(folder(tmp_path / "pictures"), boxes=str(tmp_path / "xml"))
    images = {"images": torch.rand(4, 3, 8, 6)} if request.param == "floats" else {}
    return opened(tensors(tmp_path / "held.pt", boxes=torch.tensor([[1, 2, 4, 8]] * 4), **images))


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


def test_a_folder_holds_what_image_folder_finds_in_one_mixed_order(tmp_path: Path) -> None:
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


@pytest.mark.parametrize(("size", "resize"), [(16, 0), (16, 16), (20, 47)])
@pytest.mark.parametrize("shape", [(40, 30), (30, 41), (9, 70)])
def test_pictures_are_resized_and_cropped_as_torchvision_does(
    size: int, resize: int, shape: tuple[int, int], tmp_path: Path
) -> None:
    (tmp_path / "a").mkdir()
    picture(size=shape).save(tmp_path / "a" / "one.png")
    usual = transforms.Compose(
        [transforms.Resize(resize or 18), transforms.CenterCrop(size), transforms.ToTensor()]
    )
    found = opened(tmp_path, size, resize=resize)[0]
    assert torch.equal(found.image, usual(picture(size=shape)))
    assert found.name == "a/one.png"


def test_a_file_of_classes_gives_the_labels(tmp_path: Path) -> None:
    root, names, file = (
        folder(tmp_path / "pictures"),
        ["ape", "dog", "my cat", "cat"],
        tmp_path / "n",
    )
    file.write_text("\n".join(names) + "\n\n")
    found = opened(root, classes=str(file))
    assert isinstance(found, Folder)
    assert list(found.classes) == names
    labels = {(Path(path).parent.name, label) for path, label in found.samples}
    assert labels == {("dog", 1), ("cat", 3)}
    file.write_text("cat\nn01440764")
    with pytest.raises(ValueError, match="to be classes, got dog"):
        opened(root, classes=str(file))


GREYS = np.array([[0, 20_000], [40_000, 65_535]])  # of 16 bits
TRUE = np.array([[0, 78], [156, 255]])  # of 8 bits: 65535 is 255 * 257


@pytest.mark.parametrize(
    ("values", "suffix"),
    [
        (GREYS.astype(np.uint16), ".png"),
        (GREYS.astype(np.uint16), ".tif"),
        (GREYS.astype(np.uint16), ".pgm"),
        ((GREYS / 65_535).astype(np.float32), ".tiff"),
        (TRUE.astype(np.uint8), ".png"),
    ],
)
def test_greys_of_every_depth_are_scaled(values: Any, suffix: str, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    Image.fromarray(values).save(tmp_path / "a" / f"one{suffix}")
    found = (opened(tmp_path, 2, resize=2)[0].image * 255).round()
    assert found.tolist() == [TRUE.tolist()] * 3


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.array([[0.0, 200]], dtype=np.float32), r"values in \[0, 200\]; scale them"),
        (np.array([[0.0, -0.1]], dtype=np.float32), r"values in \[-0.1, 0\]; scale them"),
        (np.array([[0.0, np.nan]], dtype=np.float32), r"values in \[nan, nan\]; scale them"),
        (np.array([[0, 200]], dtype=np.int32), "integers of 32 bits"),
        (np.zeros((1, 1001), dtype=np.uint8), "1001 x 1 pixels; crop it"),
    ],
)
def test_pictures_of_unknown_range_or_without_end_are_corrupt(
    values: Any, reason: str, tmp_path: Path
) -> None:
    (tmp_path / "a").mkdir()
    Image.fromarray(values).save(tmp_path / "a" / "one.tiff")
    with pytest.raises(CorruptImage, match=rf"picture in .*one\.tiff, got {reason}"):
        opened(tmp_path)[0]


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "YCbCr"])
def test_pictures_of_every_mode_show_their_colour(mode: str, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    picture = Image.new("RGB", (20, 20), (255,) * 3).convert(mode)
    if mode in ("CMYK", "YCbCr"):
        picture.save(tmp_path / "a" / "one.jpg")
    if mode != "YCbCr":  # of which Pillow before 13 writes a part only
        picture.save(tmp_path / "a" / "two.tif")
    for sample in opened(tmp_path):  # type: ignore[attr-defined]
        assert sample.image.min() > 0.98


def test_of_an_animated_picture_the_first_frame_counts(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    for suffix in ("png", "webp", "tif"):
        file = tmp_path / "a" / f"one.{suffix}"
        frames[0].save(
            file,
            save_all=True,
            append_images=frames[1:],
            **({"lossless": True} if suffix == "webp" else {}),
        )
    found = opened(tmp_path)
    for index in range(3):
        assert found[index].image.mean(dim=(1, 2)).tolist() == pytest.approx([1, 0, 0], abs=0.02)


def test_each_real_file_counts_once_where_it_is(tmp_path: Path) -> None:
    root, store = folder(tmp_path / "pictures"), folder(tmp_path / "store", classes=("in", "out"))
    expected = {(str(file), label) for file, label in ImageFolder(str(root)).samples}
    (root / "cat" / "up").symlink_to("..")
    (root / "cat" / "other").symlink_to("../dog")
    (root / "dog" / "other").symlink_to("../cat")
    (root / "cat" / "again.png").symlink_to("../dog/dog_1.png")
    (root / "cat" / "twice.png").symlink_to("cat_1.png")
    found = opened(root)
    assert isinstance(found, Folder)
    assert set(found.samples) == expected
    assert len(found) == len(expected)
    # Elsewhere: a class, a folder and a picture that are links.
    (root / "emu").symlink_to(store / "in")
    (root / "dog" / "more").symlink_to(store / "out")
    (root / "dog" / "most").symlink_to(store)
    found = opened(root)
    assert isinstance(found, Folder)
    assert len(found) == len(expected) + 6
    assert sorted(found[index].name for index in range(len(found)))[:4] == [
        "cat/cat_0.JPEG", "cat/cat_1.png", "cat/cat_2.JPEG", "dog/dog_0.JPEG"
    ]  # fmt: skip


@pytest.mark.parametrize("content", [None, b"", b"\x89PNG\r\n\x1a\n" + bytes(100)])
def test_corrupt_pictures_are_named_and_the_rest_is_read(
    content: bytes | None, tmp_path: Path
) -> None:
    found = opened(folder(tmp_path))
    assert isinstance(found, Folder)
    file = Path(found.samples[2][0])
    file.unlink() if content is None else file.write_bytes(content)
    with pytest.raises(CorruptImage, match=file.name):
        found[2]
    assert all(found[other].image.shape == (3, 16, 16) for other in (0, 1, 3, 4, 5))


def boxed(root: Path, text: str, size: tuple[int, int], side: int, resize: int) -> Sample:
    """Return a picture that has an annotation."""
    (root / "pictures" / "a").mkdir(parents=True)
    (root / "xml" / "deeper").mkdir(parents=True)
    picture(size=size).save(root / "pictures" / "a" / "one.png")
    (root / "xml" / "deeper" / "one.xml").write_text(text)
    return opened(root / "pictures", side, resize=resize, boxes=str(root / "xml"))[0]


def spans(side: int) -> st.SearchStrategy[tuple[int, int]]:
    low = st.integers(0, side - 1)
    return low.flatmap(lambda first: st.tuples(st.just(first), st.integers(first + 1, side)))


@given(*(st.integers(20, 90),) * 2, st.integers(8, 40), st.integers(0, 40), st.data())
def test_boxes_move_with_the_picture(
    width: int, height: int, side: int, more: int, data: st.DataObject
) -> None:
    (x0, x1), (y0, y1) = data.draw(spans(width)), data.draw(spans(height))
    # The annotation counts in pixels of another size than the file's, as some of ImageNet's do.
    text = annotation((3 * width, 3 * height), (3 * x0, 3 * y0, 3 * x1, 3 * y1))
    with TemporaryDirectory() as name:
        boxes = boxed(Path(name), text, (width, height), side, side + more).boxes
    # The corners by hand: resized, shifted, clipped, rounded.
    across, down = (int((side + more) * each / min(width, height)) for each in (width, height))
    left, top = (round((each - side) / 2) for each in (across, down))
    xs, ys = np.array([x0, x1]) * across / width - left, np.array([y0, y1]) * down / height - top
    (x0, x1), (y0, y1) = np.clip(xs, 0, side), np.clip(ys, 0, side)
    if len(boxes):
        assert (boxes[0] - torch.tensor([x0, y0, x1, y1])).abs().max() < 0.501
    else:
        assert min(x1 - x0, y1 - y0) < 1


def test_an_annotation_is_of_one_picture(tmp_path: Path) -> None:
    (tmp_path / "xml").mkdir()
    (tmp_path / "xml" / "one.xml").write_text(annotation((40, 30), (0, 0, 9, 9)))
    for name in ("a", "b"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        picture().save(tmp_path / "pictures" / name / "one.png")
    with pytest.raises(ValueError, match=r"expected one picture named as .*one\.xml"):
        opened(tmp_path / "pictures", boxes=str(tmp_path / "xml"))


def test_several_boxes_and_those_outside_the_crop(tmp_path: Path) -> None:
    boxes = [(0, 0, 40, 20), (12, 4, 20, 10), (0, 0, 9, 20), (31, 0, 40, 20), (9, 0, 11, 3)]
    found = boxed(tmp_path, annotation((40, 20), *boxes), (40, 20), 20, 20)
    assert found.boxes.tolist() == [[0, 0, 20, 20], [2, 4, 10, 10], [0, 0, 1, 3]]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<annotation/>",
        annotation((0, 30)),
        annotation((40, 30), ("left", 0, 1, 1)),
        annotation((40, 30), (0, 0, 1, 1)).replace("ymax", "top"),
    ],
)
def test_malformed_annotations_are_named(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"PASCAL VOC in .*one\.xml"):
        boxed(tmp_path, text, (40, 30), 20, 20)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float64, torch.float16])
def test_tensors_come_back(dtype: torch.dtype, tmp_path: Path) -> None:
    levels = torch.arange(4 * 3 * 8 * 6).view(4, 3, 8, 6) % 256
    images = levels.byte() if dtype == torch.uint8 else (levels / 255).to(dtype)
    boxes = [torch.tensor([[0, 0, 6, 8], [1, 1, 2, 2]]), *[torch.zeros(0, 4)] * 3]
    found = opened(tensors(tmp_path / "a.pt", images=images, boxes=boxes, classes=["x", "y", "z"]))
    for index, label in enumerate([2, 0, 1, 2]):
        near = 1e-3 if dtype == torch.float16 else 0
        torch.testing.assert_close(found[index].image, levels[index] / 255, atol=near, rtol=0)
        assert (found[index].label, found[index].name) == (label, f"a.pt[{index}]")
        assert found[index].boxes.tolist() == boxes[index].tolist()
    assert found.classes == ("x", "y", "z")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"images": torch.zeros(4, 8, 6)}, r"images \(N, 3, H, W\)"),
        ({"images": [1, 2, 3, 4]}, r"to be a torch\.Tensor, got list"),
        ({"labels": torch.zeros(3).long()}, "a label, and boxes, for each image"),
        ({"labels": torch.zeros(4)}, "an integer dtype"),
        ({"boxes": torch.zeros(3, 4).long()}, "a label, and boxes, for each image"),
        ({"boxes": [torch.zeros(3)] * 4}, "boxes of four corners"),
        ({"boxes": [[0, 1, 2, 3]] * 4}, "boxes in .* to be a torch.Tensor, got list"),
        ({"classes": [1, 2, 3]}, r"classes in .*\[0\] to be a str, got int"),
        ({"images": torch.zeros(4, 3, 8, 6).int()}, "uint8 or floating, in .*, torch.int32"),
        (None, r"a file of torch\.save"),
    ],
)
def test_files_that_do_not_fit(changes: dict[str, Any] | None, match: str, tmp_path: Path) -> None:
    file = tensors(tmp_path / "named.pt", **(changes or {}))
    if changes is None:
        file.write_bytes(b"no tensors")
    with pytest.raises((ValueError, TypeError), match=match) as caught:
        opened(file)
    assert "named.pt" in str(caught.value)


@pytest.mark.parametrize("value", [1.01, -0.01, float("nan"), float("inf")])
def test_tensors_out_of_range_are_corrupt_and_the_rest_is_read(
    value: float, tmp_path: Path
) -> None:
    images = torch.full((4, 3, 8, 6), 0.5)
    images[[0, 2], 1, 3, 3] = value
    found = opened(tensors(tmp_path / "a.pt", images=images))
    with pytest.raises(CorruptImage, match=r"a\.pt\[2\] in \[0, 1\]"):
        found[2]
    assert all(found[index].image.eq(0.5).all() for index in (1, 3))


def test_embedded_pictures_are_shapes_that_no_network_was_trained_on() -> None:
    found = Embedded()
    assert found.classes == CLASSES
    for index, block, place in ((0, 0, 0), (69, 1, 19), (49, 0, 49), (50, 1, 0)):
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
    )
    monkeypatch.syspath_prepend(tmp_path)
    root = folder(tmp_path / "pictures")
    assert same(opened(f"mine_pictures:pictures={root}")[1], opened(root)[1])
    with pytest.raises(ValueError, match="package.module:function, got module .* has no attribute"):
        opened("mine_pictures:photographs")


def test_names_that_do_not_exist_and_options_that_do_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="got nowhere; there is no such path"):
        opened("nowhere")
    with pytest.raises(ValueError, match="boxes and classes with a folder alone, got embedded"):
        opened("embedded", boxes=".")
    folder(tmp_path / "embedded")  # a folder of that name
    assert isinstance(opened("embedded"), Embedded)
    assert isinstance(opened("./embedded"), Folder)
    with pytest.raises(ValueError, match="expected resize at least 16, the size, got 15"):
        opened("./embedded", 16, resize=15)
    with pytest.raises(FileNotFoundError, match="annotations .* named after pictures"):
        opened("./embedded", boxes=".")
    (tmp_path / "empty" / "a").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="a sub-folder of pictures"):
        opened("empty")
