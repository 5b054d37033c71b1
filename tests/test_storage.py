# SPDX-License-Identifier: MIT
"""Files of tensors: written whole or not at all, and read without running code."""

import os
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from captum_adv2 import storage

LEAVES = st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.text()
PLAIN = st.recursive(
    LEAVES | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(record=st.dictionaries(st.text().filter(lambda name: name != "kind"), PLAIN, max_size=4))
def test_a_record_comes_back(tmp_path_factory, record):
    path = tmp_path_factory.mktemp("storage") / "file"
    weight = torch.rand(2, 3)
    storage.save(record | {"state": {"weight": weight}}, path, "thing")
    found = storage.load(str(path), "thing")
    assert torch.equal(found.pop("state")["weight"], weight)
    assert found == {k: v for k, v in record.items() if k != "state"} | {"kind": "thing"}
    assert os.listdir(path.parent) == ["file"]


class Unpicklable:
    def __reduce__(self):
        raise KeyboardInterrupt


@pytest.mark.parametrize("before", [True, False])
def test_an_exception_while_writing_leaves_the_folder_as_it_was(tmp_path, before):
    path = tmp_path / "file"
    if before:
        storage.save({"a": torch.ones(3)}, path, "thing")
    content = path.read_bytes() if before else None
    with pytest.raises(KeyboardInterrupt):
        storage.save({"a": torch.zeros(3), "b": Unpicklable()}, path, "thing")
    assert os.listdir(tmp_path) == (["file"] if before else [])
    assert not before or path.read_bytes() == content


def test_a_file_is_replaced_only_when_the_new_one_is_whole(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def interrupted():
        with storage.whole(path) as part:
            part.write_text("half")
            assert path.read_text() == "old"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    with storage.whole(str(path)) as part:
        part.write_text("new")
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["file"]


@given(content=st.binary(max_size=60) | st.floats(0.01, 0.999))
def test_garbage_and_parts_of_a_file(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("garbage") / "file"
    storage.save({"a": torch.rand(1000)}, path, "thing")
    if isinstance(content, float):
        whole = path.read_bytes()
        content = whole[: int(len(whole) * content)]
    path.write_bytes(content)
    with pytest.raises(ValueError, match="expected the file of a thing"):
        storage.load(path, "thing")


@pytest.mark.parametrize("value", [torch.ones(2), [1], {"a": 1}, {"kind": 3}, {"kind": "gadget"}])
def test_other_files_of_torch(tmp_path, value):
    torch.save(value, tmp_path / "file")
    with pytest.raises(ValueError, match=r"expected the file of a thing, got .*file, of a"):
        storage.load(tmp_path / "file", "thing")


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("write", [torch.save, lambda v, p: p.write_bytes(pickle.dumps(v, 2))])
def test_code_in_a_file_is_not_run(tmp_path, monkeypatch, write):
    monkeypatch.chdir(tmp_path)
    write({"kind": "thing", "bomb": Bomb()}, tmp_path / "file")
    with pytest.raises(ValueError, match="expected the file of a thing"):
        storage.load(tmp_path / "file", "thing")
    assert os.listdir(tmp_path) == ["file"]
