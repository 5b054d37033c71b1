# SPDX-License-Identifier: MIT
"""Every reader of files refuses files that are damaged or of something else, by a clear error."""

from __future__ import annotations

import copy
import io
import os
import pickle
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from conftest import blobs, untrained
from PIL import Image
from torch import nn
from torchvision import models

from captum_adv2 import storage
from captum_adv2.defenses import BitDepth, FeatureSqueezing
from captum_adv2.interpreters import MaskingModel, train_masking_model
from captum_adv2.study import Settings
from captum_adv2.study.data import open_source
from captum_adv2.study.selection import Selection
from captum_adv2.study.subjects import load_model

NET = "shufflenet_v2_x0_5"


class Reader(NamedTuple):
    """How a file is made and read."""

    write: Callable[[Path, nn.Module], Any]
    read: Callable[[Path, nn.Module], Any]
    sealed: bool = True  # whether every change of it is found


def _net(path: Path, model: nn.Module) -> None:
    torch.save(models.get_model(NET, weights=None).state_dict(), path)


def _tensors(path: Path, model: nn.Module) -> None:
    torch.save({"images": torch.rand(3, 3, 8, 8), "labels": torch.arange(3)}, path)


def _learn(path: Path, model: nn.Module) -> None:
    settings = {"epochs": 1, "verbose": False, "checkpoint": path}
    train_masking_model(model, [blobs(2)], untrained(model), **settings)


def _picture(path: Path, model: nn.Module) -> None:
    values = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    Image.fromarray(values).save(path, "PNG")


def _folder(path: Path, model: nn.Module) -> Any:
    place = path.parent / "pictures" / "a"
    place.mkdir(parents=True, exist_ok=True)
    (place / "one.png").write_bytes(path.read_bytes())
    return open_source(Settings(images=str(place.parent), size=8))[0]


SHOWN = "<annotation><size><width>9</width><height>9</height></size></annotation>"


def _boxes(path: Path, model: nn.Module) -> Any:
    _picture(path.parent / "good", model)
    (path.parent / "xml").mkdir(exist_ok=True)
    (path.parent / "xml" / "one.xml").write_bytes(path.read_bytes())
    _folder(path.parent / "good", model)
    where = {"images": str(path.parent / "pictures"), "boxes": str(path.parent / "xml")}
    return open_source(Settings(size=8, **where))[0]


SQUEEZERS = (BitDepth(3),)
READERS = {
    "record": Reader(
        lambda path, model: storage.save({"a": torch.rand(5)}, path, "thing"),
        lambda path, model: storage.load(path, "thing", {"a": torch.Tensor}),
    ),
    "masking model": Reader(lambda path, model: untrained(model).save(path),
                            lambda path, model: MaskingModel.load(path, model)),
    "detector": Reader(
        lambda path, model: FeatureSqueezing(model, SQUEEZERS).fit(blobs(4)[0]).save(path),
        lambda path, model: FeatureSqueezing.load(path, model, SQUEEZERS),
    ),
    "training": Reader(_learn, _learn),
    "weights": Reader(_net, lambda path, model: load_model(f"{NET}={path}"), False),
    "tensors": Reader(_tensors, lambda p, m: open_source(Settings(images=str(p)))[1], False),
    "picture": Reader(_picture, _folder, False),
    "boxes": Reader(lambda path, model: path.write_text(SHOWN), _boxes, False),
}  # fmt: skip


class Bomb:
    def __reduce__(self) -> Any:
        return os.mkdir, ("exploded",)


def _saved(value: Any, **how: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **how)
    return buffer.getvalue()


def spoiled(content: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield files that are none of a reader's, with their names."""
    png = io.BytesIO()
    Image.new("L", (2, 2)).save(png, "PNG")
    yield from {
        "empty": b"",
        "garbage": random.Random(0).randbytes(500),
        "zeros": bytes(len(content)),
        "text": b"{'a': 1}",
        "pickle": pickle.dumps({"kind": "thing", "a": 1}, 2),
        "bomb": pickle.dumps(Bomb(), 2),
        "bomb of torch": _saved({"kind": "thing", "images": Bomb()}),
        "list": _saved([1, 2]),
        "tensor": _saved(torch.ones(3)),
        "number": _saved(3),
        "odd keys": _saved({1: 2, None: torch.ones(2)}),
        "other kind": _saved({"kind": 3, "images": 1, "labels": None}),
        "other": _saved({"kind": "gadget", "images": torch.ones(2), "labels": torch.ones(2)}),
        "old format": _saved({"a": 1}, _use_new_zipfile_serialization=False),
        "zip": b"PK\x05\x06" + bytes(18),
        "half": content[: len(content) // 2],
        "but a byte": content[:-1],
        "twice": content + content[: len(content) // 3],
    }.items()


def flipped(content: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield files with a flipped bit, all over the file."""
    for place in range(0, len(content), max(1, len(content) // 40)):
        yield (
            f"bit of {place}",
            content[:place] + bytes([content[place] ^ 8]) + content[place + 1 :],
        )


@pytest.fixture
def prepared(
    request: pytest.FixtureRequest, tmp_path: Path, model: nn.Module, monkeypatch: Any
) -> tuple[Reader, Path]:
    monkeypatch.chdir(tmp_path)
    reader = READERS[request.param]
    reader.write(tmp_path / "file", model)
    return reader, tmp_path / "file"


every_reader = pytest.mark.parametrize("prepared", READERS, indirect=True)


def error_of(reader: Reader, path: Path, model: nn.Module) -> str:
    """Return the text of the error, empty if the file can be read."""
    try:
        reader.read(path, copy.deepcopy(model))
    except (ValueError, TypeError, OSError) as error:
        return str(error)
    return ""


@every_reader
def test_files_of_something_else_are_refused(
    prepared: tuple[Reader, Path], model: nn.Module
) -> None:
    reader, path = prepared
    assert error_of(reader, path, model) == ""
    for name, content in spoiled(path.read_bytes()):
        path.write_bytes(content)
        error = error_of(reader, path, model)
        assert "expected" in error or (name in ("but a byte", "twice") and not reader.sealed), name
        assert str(path.parent) in error or not error, name
    assert not Path("exploded").exists()


@every_reader
def test_a_flipped_bit_is_refused(prepared: tuple[Reader, Path], model: nn.Module) -> None:
    reader, path = prepared
    for name, content in flipped(path.read_bytes()):
        path.write_bytes(content)
        error = error_of(reader, path, model)
        assert "expected" in error if reader.sealed or error else True, name


RECORDS = ("masking model", "detector", "training")


@pytest.mark.parametrize("prepared", RECORDS, indirect=True)
@pytest.mark.parametrize("value", [None, 3, "x", [], {}, {"a": None}, torch.ones(2)], ids=repr)
def test_records_without_a_part_or_with_another_are_refused(
    prepared: tuple[Reader, Path], model: nn.Module, value: Any
) -> None:
    reader, path = prepared
    kind = torch.load(path, weights_only=True)["kind"]
    record = storage.load(path, kind)
    for name in record.keys() - {"kind", "encoder", "model"}:
        for changed in ({**record, name: value}, {k: v for k, v in record.items() if k != name}):
            fits = name in ("done", "threshold") and changed.get(name) == 3
            storage.save({k: v for k, v in changed.items() if k != "kind"}, path, kind)
            assert "expected" in error_of(reader, path, model) or fits, name


def test_a_selection_of_an_earlier_form_is_refused(tmp_path: Path) -> None:
    storage.save({"numbers": [1], "names": ["a"]}, tmp_path / "file", "selection of images")
    hints = dict.fromkeys(Selection._fields, Any)
    with pytest.raises(ValueError, match="expected labels in the file of a selection of images"):
        storage.load(tmp_path / "file", "selection of images", hints)
