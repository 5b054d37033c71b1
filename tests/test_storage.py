# SPDX-License-Identifier: MIT
"""Files of tensors: written whole or not at all, and read only as they were written."""

import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

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


def test_a_file_of_a_few_bytes(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    with pytest.raises(ValueError, match="got .*file, unreadable: it has only 3 bytes"):
        storage.read(path, "a file of weights")


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


@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_is_found(tmp_path_factory, where, bit):
    path = tmp_path_factory.mktemp("flip") / "file"
    record = {"a": torch.arange(20.0), "b": {"c": torch.arange(3, dtype=torch.uint8)}, "d": "x"}
    storage.save(record, path, "thing")
    content = bytearray(path.read_bytes())
    content[int(where * len(content))] ^= 1 << bit
    path.write_bytes(content)
    with pytest.raises(ValueError, match="^expected the file of a thing"):
        storage.load(path, "thing")


def test_damage_in_a_file_of_others_is_found(tmp_path):
    path, values = tmp_path / "net.pt", torch.full((1000,), 0.7)
    torch.save({"weight": values}, path)
    assert torch.equal(storage.read(path, "weights")["weight"], values)
    content = bytearray(path.read_bytes())
    content[content.index(values.numpy().tobytes()) + 5] ^= 1
    path.write_bytes(content)
    for mmap in (False, True):
        with pytest.raises(ValueError, match="expected weights, got .*net.pt, unreadable: its che"):
            storage.read(path, "weights", mmap=mmap)


def test_numbers_of_numpy_come_back(tmp_path):
    record = {"a": np.float32(0.5), "b": [np.int64(3), {"c": np.bool_(True)}]}
    storage.save(record, tmp_path / "f", "t")
    assert storage.load(tmp_path / "f", "t") == {"kind": "t", **record}


def test_a_record_has_what_is_asked_for(tmp_path):
    storage.save({"a": [1, 2], "b": "x"}, tmp_path / "f", "thing")
    assert storage.load(tmp_path / "f", "thing", {"b": str})["a"] == [1, 2]
    with pytest.raises(ValueError, match="expected c in the file of a thing, got .* without it"):
        storage.load(tmp_path / "f", "thing", {"c": str})
    with pytest.raises(TypeError, match=r"expected a in .*f to be a str, got list"):
        storage.load(tmp_path / "f", "thing", {"a": str})


# Files that cannot be written or read


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("before", [True, False])
def test_a_full_disk_is_an_os_error_that_names_the_file(tmp_path, before):
    path = tmp_path / "file"
    if before:
        storage.save({"a": 1}, path, "thing")
    Path(f"{path}.{os.getpid()}.part").symlink_to("/dev/full")
    with pytest.raises(OSError, match="expected to write a file, got No space left.*/file'"):
        storage.save({"a": torch.ones(9)}, path, "thing")
    assert os.listdir(tmp_path) == ["file"] * before
    assert not before or storage.load(path, "thing")["a"] == 1


@pytest.mark.parametrize(
    ("place", "error"),
    [("no/file", FileNotFoundError), ("", IsADirectoryError), ("text/file", NotADirectoryError)],
)
def test_a_place_where_no_file_can_be(tmp_path, place, error):
    (tmp_path / "text").write_text("x")
    path = tmp_path / place
    for write in (storage.expect_writable, lambda path: storage.save({}, path, "thing")):
        with pytest.raises(error, match="expected .*file, got ") as caught:
            write(path)
        assert str(path) in str(caught.value)
    with pytest.raises(OSError, match="expected to read a file, got "):
        storage.load(path, "thing")
    assert os.listdir(tmp_path) == ["text"]


def test_asking_whether_a_file_can_be_written_changes_nothing(tmp_path):
    storage.expect_writable(tmp_path / "file")
    assert not os.listdir(tmp_path)


# Folders of one process


HOLDER = """
import sys, time
from pathlib import Path
from captum_adv2 import storage
with storage.locked(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""


def test_a_folder_is_one_processs_until_that_ends(tmp_path):
    folder = tmp_path / "new"
    other = subprocess.Popen([sys.executable, "-c", HOLDER, folder], stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == b"locked\n"
        with pytest.raises(OSError, match="no other process works on, got one in use.*new"):
            storage.locked(folder).__enter__()
    finally:
        other.send_signal(signal.SIGKILL)
        other.communicate()
    with storage.locked(folder):
        assert storage.content(folder) == []
        (folder / "mine").write_text("x")
    assert storage.content(folder) == ["mine"]


@pytest.mark.parametrize("before", [True, False])
def test_a_new_folder_that_stays_empty_is_removed(tmp_path, before):
    folder = tmp_path / "new"
    if before:
        folder.mkdir()
    with pytest.raises(ZeroDivisionError), storage.locked(folder):
        raise ZeroDivisionError
    assert folder.exists() == before


def test_unfinished_files_are_ours_alone(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("deep/a.pt.123.part", "b.part", "deep/c.x.part", ".lock"):
        (tmp_path / name).write_text("x")
    assert sorted(storage.content(tmp_path)) == ["b.part", "deep"]
    storage.clean(tmp_path)
    assert sorted(f.name for f in tmp_path.rglob("*.part")) == ["b.part", "c.x.part"]


# Digests


class Held:
    def __init__(self, module):
        self.module = module


def network(bias=0.0):
    net = nn.Linear(2, 3)
    nn.init.constant_(net.weight, 0.5)
    nn.init.constant_(net.bias, bias)
    return net


DIFFERENT = [
    torch.zeros(4), torch.zeros(2, 2), torch.zeros(4).double(), torch.zeros(4).bfloat16(),
    torch.zeros(3), torch.tensor(0.0), torch.tensor([0.0, 0, 0, 1]), torch.tensor([True]), None,
    [torch.zeros(2), torch.zeros(2)], [[torch.zeros(2)], torch.zeros(2)], {"a": 1}, {"b": 1}, "a",
    1, 1.5, network(), network(1.0), Held(network()), Held(network(1.0)), "\udcff",
]  # fmt: skip


def test_digests_tell_values_apart():
    assert len({storage.digest(value) for value in DIFFERENT}) == len(DIFFERENT)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_quantised_weights_count():
    one, other = (
        torch.quantize_per_tensor(torch.full((4,), v), 0.1, 0, torch.qint8) for v in (0.5, 0.6)
    )
    assert storage.digest(one) != storage.digest(other)


def test_equal_values_have_one_digest_in_every_process():
    values = network(), Held(network()), torch.arange(6.0).view(2, 3), lambda x: x
    other = network(), Held(network()), torch.arange(6.0).view(3, 2).T.reshape(2, 3), lambda x: x
    views = torch.arange(9.0)[3:6], torch.arange(3.0) + 3
    assert storage.digest(*views[:1]) == storage.digest(*views[1:])
    assert storage.digest(values[0].train()) == storage.digest(other[0].eval())
    assert storage.digest(values[1]) == storage.digest(other[1])
    code = "import torch; from captum_adv2.storage import digest; print(digest(torch.ones(3), 'a'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == storage.digest(torch.ones(3), "a")
