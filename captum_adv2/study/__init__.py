# SPDX-License-Identifier: MIT
"""The paper's evaluation of a classifier and its interpreters, as one resumable study (§4, §5).

To run one, ``pip install "captum_adv2[study]"``.
"""

from __future__ import annotations

import shlex
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path

from captum_adv2 import storage
from captum_adv2.spec import checked
from captum_adv2.study.engine import Part, World, loaded, prepared, stored, work
from captum_adv2.study.results import Found
from captum_adv2.study.settings import PROFILES, Settings, options

__all__ = ["PROFILES", "Settings", "run"]


@checked
def run(
    settings: Settings,
    folder: str | Path,
    *,
    resume: bool = False,
    verbose: bool = True,
) -> Found | None:
    """Run a study; write records, tables, figures and a page that shows them.

    Under PyTorch's launcher ``torchrun`` the processes share the images. A study that was stopped
    at any point is continued by ``resume``, with any number of processes, and widened: with a
    larger ``count``, more ``seeds``, or the ``curve``.

    Args:
        settings: What to do.
        folder: Folder of the results; made if it does not exist, otherwise empty.
        resume: Continue the study in the folder, if there is one; networks and images have to be
            those that it began with.
        verbose: Show a progress bar for each process, with the time left.

    Returns:
        The results, in the first process; ``None`` in the others.
    """
    _expect_extra()
    folder = Path(folder)
    with World.joined() as world, nullcontext() if world.rank else storage.locked(folder):
        parts = prepared(settings, folder, world, resume)
        work(parts, world, verbose)
        if world.rank:
            return None
        return _written(folder, parts, settings)


@checked
def page(folder: str | Path) -> Found:
    """Write the page of what a study has so far, also while it runs; return that.

    Args:
        folder: Folder of the results.
    """
    _expect_extra()
    folder = Path(folder)
    settings = stored(folder)
    return _written(folder, loaded(settings, folder, World()), settings)


def _expect_extra() -> None:
    if find_spec("pandas") is None or find_spec("jinja2") is None:
        raise ImportError('expected pandas and jinja2; pip install "captum_adv2[study]"')


def _written(folder: Path, parts: list[Part], settings: Settings) -> Found:
    from captum_adv2.study import frame, report  # here: they need the extra

    found = Found(
        *frame.gather(parts, settings),
        {part.subject.name: part.chosen for part in parts},
        [file for part in parts for file in part.redone],
        [reason for part in parts for reason in part.subject.left_out],
        sum(part.absent() for part in parts),
    )
    command = ["python", "-m", "captum_adv2", "study", *options(settings), "--out", str(folder)]
    report.write(folder, found, settings, shlex.join(command))
    return found
