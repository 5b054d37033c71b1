# SPDX-License-Identifier: MIT
"""A study from beginning to end: its folder, the work, what people look at."""

from __future__ import annotations

import csv
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from captum_adv2 import storage
from captum_adv2.checks import expect_flag
from captum_adv2.study import figures, page, tables, verdicts
from captum_adv2.study.records import Frame
from captum_adv2.study.settings import Settings
from captum_adv2.study.work import Found, work
from captum_adv2.study.world import World

__all__ = ["run"]

_PACKAGES = ("captum_adv2", "torch", "torchvision", "captum", "torchattacks", "kornia", "numpy")
_SETTINGS = "study.json"


def run(
    settings: Settings,
    folder: str | Path,
    *,
    resume: bool = False,
    verbose: bool = True,
    command: str = "",
) -> Found | None:
    """Do a study; write records, tables, figures and a page that shows them.

    Under PyTorch's launcher ``torchrun`` the processes share the images. A study that was stopped
    at any point goes on with ``resume``, with as many processes as one likes; what is done is not
    done again.

    Args:
        settings: What to do.
        folder: Where everything goes; made if it does not exist.
        resume: Go on with the study in the folder, if there is one.
        verbose: Show a progress bar for each process, with the time left.
        command: How it was called, for the page.

    Returns:
        What was found, in the first process; ``None`` in the others.

    Raises:
        FileExistsError: There is something in the folder, and ``resume`` was not asked for.
        OSError: The folder cannot be written to.
        TypeError: Something of a wrong type.
        ValueError: Something in the settings that does not exist or does not fit, or other settings
            than those of the study to resume.
    """
    if not isinstance(settings, Settings):
        raise TypeError(f"expected settings to be study.Settings, got {type(settings).__name__}")
    if not isinstance(command, str):
        raise TypeError(f"expected command to be a text, got {type(command).__name__}")
    for name, value in (("resume", resume), ("verbose", verbose)):
        expect_flag(value, name)
    folder = Path(folder)
    with World.joined() as world:
        if world.rank == 0:
            _prepare(folder, settings, resume)
        world.share(None)  # the folder is there
        found = work(settings, folder, world, verbose)
        if found is not None:
            _present(found, folder, settings, command)
        return found


def _prepare(folder: Path, settings: Settings, resume: bool) -> None:
    """Make the folder, or see that it is this study's."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / _SETTINGS
    if any(folder.iterdir()):
        if not file.exists():
            raise FileExistsError(
                f"expected an empty folder, got {folder}, which has other things in it"
            )
        if not resume:
            raise FileExistsError(
                f"expected an empty folder, got {folder}, with a study in it; --resume goes on "
                "with it"
            )
        _expect_same(json.loads(file.read_text(encoding="utf-8")), settings.record(), folder)
        for part in folder.rglob("*.part"):
            part.unlink()  # of a process that was killed while it wrote
    with storage.whole(file) as part:
        part.write_text(json.dumps(settings.record(), indent=2) + "\n", encoding="utf-8")


def _expect_same(before: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    other = [name for name in now if before.get(name) != now[name]]
    if other:
        listed = "; ".join(f"{name} was {before.get(name)}, is {now[name]}" for name in other)
        raise ValueError(f"expected the settings of the study in {folder}, got others: {listed}")


def _present(found: Found, folder: Path, settings: Settings, command: str) -> None:
    """Write records, tables, figures and the page."""
    for name, frame in (("maps", found.maps), ("scores", found.scores)):
        _write(frame, folder / "records" / f"{name}.csv")
    facts = page.Facts(
        command=command,
        versions={
            "Python": platform.python_version(),
            **{name: _version(name) for name in _PACKAGES},
        },
        misclassified={name: s.misclassified for name, s in found.selections.items()},
        corrupt=tuple(dict.fromkeys(e for s in found.selections.values() for e in s.corrupt)),
        redone=found.redone,
        left_out=found.left_out,
    )
    page.write(
        folder,
        tables.build(found.maps, found.scores, settings),
        figures.build(found.maps, found.scores, found.pictures, settings),
        verdicts.judge(found.maps, found.scores, settings),
        settings,
        facts,
    )


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # this one, run from its source
        return "not installed"


def _write(frame: Frame, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    with storage.whole(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(frame.columns)
        table.writerows(frame)
