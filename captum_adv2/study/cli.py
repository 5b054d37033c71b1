# SPDX-License-Identifier: MIT
"""The command line: ``python -m captum_adv2 study``."""

from __future__ import annotations

import argparse
import inspect
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import MISSING, fields
from fractions import Fraction
from pathlib import Path
from typing import Any

from captum_adv2.study.run import run
from captum_adv2.study.settings import PROFILES, Settings

__all__ = ["main"]

_EPILOG = """\
examples:
  the networks and pictures that come along, in minutes:
    python -m captum_adv2 study --profile quick --out study
  torchvision's ResNet-50 on your pictures:
    python -m captum_adv2 study --models resnet50 --images FOLDER --classes wnids.txt \\
        --interpreters GRAD CAM MASK GradCAM --out study-resnet50
  two processes, going on where a study stopped; one thread each on a machine's CPU:
    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m captum_adv2 study ... --resume
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return the exit status: 0, or 2 where something given is wrong."""
    given = sys.argv[1:] if arguments is None else [*arguments]
    parser = argparse.ArgumentParser(
        "python -m captum_adv2", description="ADV2 on the command line."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    study = commands.add_parser(
        "study",
        help="the paper's evaluation of your classifier and pictures",
        description="The evaluation of 'Interpretable Deep Learning under Fire' (Zhang et al.,\n"
        "USENIX Security 2020) on classifiers and pictures of your choice: tables, figures,\n"
        "and a verdict on each of its nine observations. OUT/index.html shows them.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _declare(study)
    args = vars(parser.parse_args(given))
    names = {field.name for field in fields(Settings)}
    chosen = {name: value for name, value in args.items() if name in names and value is not None}
    try:
        settings = Settings(**(PROFILES[args["profile"]] | chosen))
        run(
            settings,
            args["out"],
            resume=args["resume"],
            verbose=not args["quiet"],
            command=shlex.join(["python", "-m", "captum_adv2", *given]),
        )
    except (ValueError, TypeError, OSError) as error:
        study.exit(2, f"{study.prog}: {error}\n")
    return 0


def _declare(parser: argparse.ArgumentParser) -> None:
    """Add an option for every setting; its help is what `Settings` says of it."""
    parser.add_argument("--out", type=Path, required=True, help="folder for all that it makes")
    parser.add_argument("--resume", action="store_true", help="go on with the study in the folder")
    parser.add_argument("--quiet", action="store_true", help="show no progress bars")
    parser.add_argument(
        "--profile",
        choices=PROFILES,
        default="full",
        help="how large, unless an option below says otherwise (default: full)",
    )
    described = _described()
    for field in fields(Settings):
        default: Any = field.default
        assert default is not MISSING
        several = isinstance(default, tuple)
        kind = type(default[0]) if several and default else type(default)
        shown = " ".join(map(str, default)) if several else default
        extra: dict[str, Any] = {"nargs": "*"} if several else {}
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=_number if kind is float else kind,
            metavar={str: "TEXT", int: "N", float: "X"}[kind],
            help=f"{described[field.name]} (default: {shown or 'none'})".replace("%", "%%"),
            **extra,
        )


def _number(text: str) -> float:
    """Return a number; fractions are welcome: ``8/255``."""
    return float(Fraction(text))


def _described() -> dict[str, str]:
    """Return what the docstring of `Settings` says of each."""
    text = inspect.getdoc(Settings) or ""
    section = text.partition("Args:\n")[2].partition("\n\n")[0]
    entries = re.findall(r"^    (\w+): (.*?)(?=^    \w+: |\Z)", section, re.MULTILINE | re.DOTALL)
    return {name: re.sub(r"\s+", " ", entry).strip().replace("`", "") for name, entry in entries}
