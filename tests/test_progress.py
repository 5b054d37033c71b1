# SPDX-License-Identifier: MIT
"""Progress: a bar in a terminal, lines in a log, nothing where none is asked for."""

from __future__ import annotations

import io

import pytest

from captum_adv2 import progress
from captum_adv2.progress import progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch, every: float, steps: int) -> str:
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setattr(progress, "_EVERY", every)
    with progress_bar(total=steps, desc="ADV2", shown=True) as bar:
        for number in range(steps):
            bar.set_postfix(confidence=number, refresh=False)
            bar.update()
    return stream.getvalue()


def test_a_log_has_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(io.StringIO(), monkeypatch, 1000.0, 300)
    assert "\r" not in text
    first, last = text.splitlines()  # no step takes a thousand seconds
    assert first.startswith("ADV2: 0/300, ")
    assert last.startswith("ADV2: 300/300, ")
    assert last.endswith("confidence=299")


def test_a_log_has_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = shown(io.StringIO(), monkeypatch, 0.0, 4).splitlines()
    assert len(lines) == 5
    assert all(" left" in line for line in lines)


def test_a_terminal_has_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(Terminal(), monkeypatch, 0.0, 300)
    assert "\r" in text
    assert "300/300" in text


def test_what_is_iterated_over_is_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    for wanted in (False, True):
        assert [*progress_bar(range(3), shown=wanted, desc="MASK")] == [0, 1, 2]
        assert bool(capsys.readouterr().err) is wanted
