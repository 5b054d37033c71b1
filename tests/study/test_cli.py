# SPDX-License-Identifier: MIT
"""The command line explains its options, takes them, and rejects wrong ones."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from captum_adv2.command.cli import main
from captum_adv2.study import PROFILES, Settings
from captum_adv2.study.cli import _told
from captum_adv2.study.results import Found

TINY = """--models embedded:resnet --interpreters CAM --frameworks pgd --targets benign
    --detectors --count 1 --held-out 0 --steps 1 --quiet""".split()  # noqa: SIM905


def test_help_explains_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["study", "--help"])
    text = re.sub(r"-\s+", "-", capsys.readouterr().out)
    text = re.sub(r"\s+", " ", text)
    for field in fields(Settings):
        assert f"--{field.name.replace('_', '-')} " in text
        assert re.sub(r"-\s+", "-", field.metadata["help"]) in text
    assert "torchrun" in text


def test_a_study_is_made(tmp_path: Path) -> None:
    given = ["study", "--profile", "quick", *TINY, "--eps", "4/255", "--out", str(tmp_path / "out")]
    assert main(given) == 0
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert "eps = 4/255" in page
    assert "python -m captum_adv2 study" in page
    # Options win over profiles.
    settings = json.loads((tmp_path / "out" / "study.json").read_text())
    assert settings["count"] == 1
    assert settings["flow_steps"] == PROFILES["quick"]["flow_steps"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--count", "0"], "expected count at least 1, got 0"),
        (["--eps", "2"], "expected eps in [0, 1], got 2"),
        (["--eps", "1/0"], "expected a number or a fraction such as 8/255, got '1/0'"),
        (["--eps", "4/5/6"], "expected a number or a fraction such as 8/255, got '4/5/6'"),
        (["--eps", "1e400"], "expected eps in [0, 1], got inf"),
        (["--eps", "1e999999999"], "expected eps in [0, 1], got inf"),
        (["--eps", "nan"], "expected eps in [0, 1], got nan"),
        (["--frameworks", "cw"], "one of ['pgd', 'stadv', 'query'], got 'cw'"),
        (["--targets", "cat"], "one of ['benign', 'patch', 'class'], got 'cat'"),
        (["--models"], "expected at least one of models, got none"),
        (["--seeds", "0", "0"], "expected different seeds, got 0, 0"),
        (["--models", "embedded:resnet", "my:resnet"], "expected different models"),
        (["--interpreters", "CAM", "my:CAM"], "expected different interpreters"),
        (["--images", "/no/such/folder"], "no such path"),
        (["--adaptive", "CAM", "GRADD"], "expected adaptive interpreters from GRAD, CAM, "),
    ],
)
def test_wrong_options_end_without_a_traceback_and_leave_nothing(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["study", *TINY, *options, "--out", str(tmp_path / "out")])
    errors = capsys.readouterr().err
    assert message in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "out").exists()


def test_rules_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rules"]) == 0
    text = capsys.readouterr().out
    assert "3. Feature squeezing detects ADV2 about as often as PGD." in text
    assert "On the paper's own tables: does not hold." in text


def test_a_page_needs_a_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["study", "--page", "--out", str(tmp_path)])
    assert "expected a study in" in capsys.readouterr().err
    out = str(tmp_path / "out")
    assert main(["study", *TINY, "--out", out]) == 0
    assert main(["study", "--page", "--out", out]) == 0
    with pytest.raises(SystemExit, match="2"):
        main(["study", "--page", "--profile", "quick", "--count", "2", "--out", out])
    assert "expected --page without settings, got profile, count" in capsys.readouterr().err


def test_a_study_goes_on_by_its_own_settings(tmp_path: Path, capsys) -> None:
    out = ["--out", str(tmp_path / "out")]
    assert main(["study", *TINY, "--eps", "4/255", *out]) == 0
    page = tmp_path / "out" / "index.html"
    before = page.read_text(encoding="utf-8")
    page.unlink()
    assert main(["study", "--resume", "--quiet", *out]) == 0
    assert page.read_text(encoding="utf-8") == before  # which names the command
    capsys.readouterr()
    wider = ["--count", "2", "--interpreters", "CAM", "--eps", "4/255"]
    assert main(["study", "--resume", "--quiet", *wider, *out]) == 0
    assert capsys.readouterr().out == f"resnet: 2 of 2 images, 0 held out\nAll of it: {page}\n"
    assert "--count 2 --held-out 0 --eps 0.01568" in page.read_text(encoding="utf-8")
    with pytest.raises(SystemExit, match="2"):
        main(["study", "--resume", "--profile", "quick", *out])
    assert "expected the settings in" in capsys.readouterr().err


def test_what_is_not_there_is_told() -> None:
    parts = Found(None, None, None, [], {}, [], ["RTS on x needs a masking model"], missing=7)
    told = _told(parts, Path(os.fsdecode(b"out\xff")))
    assert "Left out: RTS on x needs" in told
    assert "Unfinished: 7 parts" in told
    assert told.encode("utf-8").endswith(b"index.html")


def test_without_the_extra_the_networks_load_and_a_study_names_what_to_install(
    tmp_path: Path,
) -> None:
    code = f"""
import sys
sys.modules |= {{"pandas": None, "jinja2": None}}  # as if they were not installed
from captum_adv2.study.embedded import load_resnet
load_resnet()
from captum_adv2.command.cli import main
main(["study", *{TINY!r}, "--out", "out"])
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert 'pip install "captum_adv2[study]"' in done.stderr
    assert "Traceback" not in done.stderr


def test_profiles_are_settings() -> None:
    for profile in PROFILES.values():
        Settings(**profile)
