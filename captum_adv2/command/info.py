# SPDX-License-Identifier: MIT
"""``python -m captum_adv2 info``: what a report of a fault should say of the machine."""

from __future__ import annotations

import argparse
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import captum_adv2

_PACKAGES = (
    "torch",
    "torchvision",
    "captum",
    "torchattacks",
    "kornia",
    "numpy",
    "scipy",
    "matplotlib",
    "timm",
    "transformers",
)


def add_to(commands: Any) -> None:
    """Add the command to those of a parser."""
    text = "versions, device and threads, to paste into a report of a fault"
    commands.add_parser("info", help=text, description=text).set_defaults(run=_run)


def _run(args: argparse.Namespace, command: str) -> int:
    for name, value in facts().items():
        print(f"{name:14s} {value}")
    return 0


def facts() -> dict[str, str]:
    """Return versions, device and threads by name."""
    found = {"captum_adv2": captum_adv2.__version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    cuda = torch.cuda.is_available()
    return found | {
        "system": platform.platform(),
        "device": f"cuda, {torch.cuda.get_device_name()}" if cuda else "cpu",
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
    }
