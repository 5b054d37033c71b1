# SPDX-License-Identifier: MIT
"""Progress bars in a terminal or a notebook; in a log, a line now and then."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, TextIO

from tqdm.auto import notebook_tqdm, tqdm
from tqdm.std import tqdm as plain

_EVERY = 10.0  # seconds between two lines of a log
_LINE = "{desc}: {n_fmt}/{total_fmt}, {elapsed}, {remaining} left{postfix}"


def progress_bar(steps: Iterable[Any] | None = None, *, shown: bool, **options: Any) -> Any:
    """Return a progress bar of tqdm's with the time left.

    Where the output is no terminal, the bar is replaced by a line every ten seconds.

    Args:
        steps: What to iterate over; default: ``update`` is called.
        shown: Whether there is a bar at all.
        **options: tqdm's: ``total``, ``desc``, ``unit``, ...
    """
    notebook = notebook_tqdm is not plain
    if not shown or notebook or sys.stderr.isatty():
        return tqdm(steps, disable=not shown, **options)
    options |= {"file": _Lines(sys.stderr), "bar_format": _LINE, "position": 0}
    return plain(steps, mininterval=_EVERY, miniters=1, **options)


class _Lines:
    """A log: what a bar writes over and over in one line becomes lines."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._last = stream, ""

    def write(self, text: str) -> None:
        """Write a state of the bar as a line."""
        line = text.strip()  # of carriage returns, and of blanks that hide what was longer
        if line and line != self._last:
            self._stream.write(f"{line}\n")
            self._last = line

    def flush(self) -> None:
        """Flush the log."""
        self._stream.flush()
