# SPDX-License-Identifier: MIT
"""Files of tensors: written whole or not at all, read without running what is in them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

__all__ = ["load", "save"]


def save(record: dict[str, Any], path: str | Path, kind: str) -> None:
    """Write a record; a process killed on the way leaves the file as it was.

    Args:
        record: Tensors, numbers, strings, and lists and dicts of them.
        path: File to write; its folder exists.
        kind: What the record is of; `load` asks for it again.
    """
    whole = Path(path)
    part = whole.with_name(f"{whole.name}.{os.getpid()}.part")
    try:
        torch.save({"kind": kind, **record}, part)
        part.replace(whole)
    finally:
        part.unlink(missing_ok=True)


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
