# SPDX-License-Identifier: MIT
"""Frames against lists of dicts."""

from __future__ import annotations

import csv
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from captum_adv2.study import Frame
from captum_adv2.study.run import _write

NAMES = ("attack", "image", "l1")
rows = st.lists(
    st.tuples(st.sampled_from(("PGD", "ADV2", "a,b")), st.integers(0, 3), st.floats(0, 1))
)


@given(rows, st.sampled_from(("PGD", "ADV2")), st.integers(0, 3))
def test_where_is_a_filter(found: list[tuple[str, int, float]], attack: str, image: int) -> None:
    frame = Frame.of(found, NAMES)
    assert len(frame) == len(found)
    assert list(frame) == found
    assert list(frame.where(attack=attack)) == [row for row in found if row[0] == attack]
    both = frame.where(attack=attack, image=(image, 3))
    assert list(both) == [r for r in found if r[0] == attack and r[1] in (image, 3)]
    assert frame.values("image") == list(dict.fromkeys(row[1] for row in found))


def test_frames_are_written_as_they_are(tmp_path: Path) -> None:
    frame = Frame.of([("a,b", 1, 0.1), ("PGD", 2, float("nan"))], NAMES)
    _write(frame, tmp_path / "records" / "maps.csv")
    with (tmp_path / "records" / "maps.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [[*NAMES], ["a,b", "1", "0.1"], ["PGD", "2", "nan"]]
