# SPDX-License-Identifier: MIT
"""The command line says what it takes, takes it, and says what is wrong."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from captum_adv2.study import PROFILES, Settings
from captum_adv2.study.cli import _described, main

TINY = """--models embedded:resnet --interpreters CAM --frameworks pgd --targets benign
    --detectors --count 1 --held-out 0 --steps 1 --quiet""".split()  # noqa: SIM905


def test_help_explains_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["study", "--help"])
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    for field in fields(Settings):
        assert f"--{field.name.replace('_', '-')} " in text
        assert _described()[field.name].partition(".")[0] in text
    assert "torchrun" in text


def test_a_study_is_made(tmp_path: Path) -> None:
    assert main(["study", *TINY, "--eps", "4/255", "--out", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert "eps = 4/255" in page
    assert "python -m captum_adv2 study" in page


def test_options_win_over_profiles(tmp_path: Path) -> None:
    assert main(["study", "--profile", "quick", *TINY, "--out", str(tmp_path / "out")]) == 0
    settings = (tmp_path / "out" / "study.json").read_text()
    assert '"count": 1' in settings
    assert f'"flow_steps": {PROFILES["quick"]["flow_steps"]}' in settings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--count", "0"], "expected count at least 1, got 0"),
        (["--eps", "2"], "expected eps at least 0 and at most 1, got 2"),
        (["--frameworks", "cw"], "expected frameworks from pgd, stadv, got cw"),
        (["--targets", "cat"], "expected targets from benign, patch, class, got cat"),
        (["--models"], "expected at least one of models, got none"),
        (["--images", "/no/such/folder"], "no such path"),
    ],
)
def test_what_is_wrong_is_said_without_a_traceback(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["study", *TINY, *options, "--out", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said


def test_profiles_are_settings() -> None:
    for profile in PROFILES.values():
        Settings(**profile)
