# SPDX-License-Identifier: MIT
"""Files of tensors: whole or not at all, and nothing but ours."""

import os
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from captum_adv2 import storage

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(record=st.dictionaries(st.text().filter(lambda name: name != "kind"), PLAIN, max_size=4))
def test_a_record_comes_back(tmp_path_factory, record):
    path = tmp_path_factory.mktemp("storage") / "file"
    tensors = {"state": {"weight": torch.rand(2, 3), "count": torch.tensor(3)}}
    storage.save(record | tensors, path, "thing")
    found = storage.load(str(path), "thing")
    assert torch.equal(found.pop("state")["weight"], tensors["state"]["weight"])
    assert found == {k: v for k, v in record.items() if k != "state"} | {"kind": "thing"}
    assert os.listdir(path.parent) == ["file"]


class Stubborn:
    """Cannot be written."""

    def __reduce__(self):
        raise KeyboardInterrupt


@pytest.mark.parametrize("before", [True, False])
def test_an_exception_while_writing_leaves_the_folder_as_it_was(tmp_path, before):
    path = tmp_path / "file"
    if before:
        storage.save({"a": torch.ones(3)}, path, "thing")
    content = path.read_bytes() if before else None
    with pytest.raises(KeyboardInterrupt):
        storage.save({"a": torch.zeros(3), "b": Stubborn()}, path, "thing")
    assert os.listdir(tmp_path) == (["file"] if before else [])
    assert not before or path.read_bytes() == content


def test_the_file_is_only_replaced_when_the_new_one_is_whole(tmp_path, monkeypatch):
    path, seen = tmp_path / "file", []
    storage.save({"a": 1}, path, "thing")
    real = torch.save

    def slow(record, part):
        real(record, part)
        seen.append((part != path, storage.load(path, "thing")["a"]))
        raise OSError("the process dies here")

    monkeypatch.setattr(torch, "save", slow)
    with pytest.raises(OSError, match="dies here"):
        storage.save({"a": 2}, path, "thing")
    assert seen == [(True, 1)]
    assert storage.load(path, "thing")["a"] == 1


def test_a_later_record_replaces_an_earlier_one(tmp_path):
    path = tmp_path / "file"
    for number in range(3):
        storage.save({"a": number}, path, "thing")
    assert storage.load(path, "thing")["a"] == 2


def test_a_file_of_another_kind(tmp_path):
    path = tmp_path / "file"
    storage.save({}, path, "thing")
    with pytest.raises(ValueError, match=r"expected the file of a gadget, got .*file, of a thing"):
        storage.load(path, "gadget")


def test_a_missing_file_and_a_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError):
        storage.load(tmp_path / "none", "thing")
    with pytest.raises((OSError, RuntimeError)):
        storage.save({}, tmp_path / "none" / "file", "thing")
    assert not os.listdir(tmp_path)


@given(content=st.binary(max_size=60))
def test_garbage(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("garbage") / "file"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="expected the file of a thing"):
        storage.load(path, "thing")


@pytest.mark.parametrize("value", [torch.ones(2), [1], "kind", {"a": 1}, {"kind": 3}])
def test_torchs_files_that_are_none_of_ours(tmp_path, value):
    torch.save(value, tmp_path / "file")
    with pytest.raises(ValueError, match="expected the file of a thing"):
        storage.load(tmp_path / "file", "thing")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_half_a_file(tmp_path, share):
    path = tmp_path / "file"
    storage.save({"a": torch.rand(1000)}, path, "thing")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ValueError, match="expected the file of a thing"):
        storage.load(path, "thing")


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize(
    "write", [torch.save, lambda v, p: p.write_bytes(pickle.dumps(v, protocol=2))]
)
def test_code_in_a_file_is_not_run(tmp_path, monkeypatch, write):
    monkeypatch.chdir(tmp_path)
    write({"kind": "thing", "bomb": Bomb()}, tmp_path / "file")
    with pytest.raises(ValueError, match="expected the file of a thing"):
        storage.load(tmp_path / "file", "thing")
    assert os.listdir(tmp_path) == ["file"]


def test_any_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    with storage.whole(path) as part:
        part.write_text("one")
        assert not path.exists()
    assert path.read_text() == "one"

    def killed():
        with storage.whole(str(path)) as part:
            part.write_text("tw")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        killed()
    assert path.read_text() == "one"
    assert os.listdir(tmp_path) == ["file"]
