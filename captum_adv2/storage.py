# SPDX-License-Identifier: MIT
"""Files written whole or not at all; files of tensors, read without running what is in them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

__all__ = ["load", "save", "whole"]


@contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """Give a path to write to, which becomes the file at the end if nothing was raised.

    A process killed on the way leaves the file as it was.

    Args:
        path: File to write; its folder exists.
    """
    final = Path(path)
    part = final.with_name(f"{final.name}.{os.getpid()}.part")
    try:
        yield part
        part.replace(final)
    finally:
        part.unlink(missing_ok=True)


def save(record: dict[str, Any], path: str | Path, kind: str) -> None:
    """Write a record, whole or not at all; see `whole`.

    Args:
        record: Tensors, numbers, strings, and lists and dicts of them.
        path: File to write; its folder exists.
        kind: What the record is of; `load` asks for it again.
    """
    with whole(path) as part:
        torch.save({"kind": kind, **record}, part)


def load(path: str | Path, kind: str) -> dict[str, Any]:
    """Read a record onto the CPU.

    Raises:
        FileNotFoundError: No such file.
        ValueError: A file of another kind.
    """
    with Path(path).open("rb") as file:
        try:
            record: Any = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # garbage makes the unpickler raise almost anything
            raise ValueError(
                f"expected the file of a {kind}, got {path}, not one of ours"
            ) from error
    found = record.get("kind") if isinstance(record, dict) else None
    if not isinstance(record, dict) or found != kind:
        raise ValueError(f"expected the file of a {kind}, got {path}, of a {found}")
    return record
