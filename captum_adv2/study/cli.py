# SPDX-License-Identifier: MIT
"""The command line: ``python -m captum_adv2 study``."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from captum_adv2.study import page, run
from captum_adv2.study.settings import PROFILES, Settings

_DESCRIPTION = """\
The evaluation of 'Interpretable Deep Learning under Fire' (Zhang et al., USENIX Security 2020) on
classifiers and pictures of your choice: tables, figures, and a verdict on each of its nine
observations. OUT/index.html shows them."""

_EPILOG = """\
examples:
  the networks and pictures that come along, in minutes:
    python -m captum_adv2 study --profile quick --out study
  torchvision's ResNet-50 on your pictures:
    python -m captum_adv2 study --models resnet50 --images FOLDER --classes wnids.txt \\
        --interpreters GRAD CAM MASK GradCAM --out study-resnet50
  a larger study from a smaller one, and how far explanations can be trusted:
    python -m captum_adv2 study ... --count 40 --curve --resume
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
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _declare(study)
    commands.add_parser("rules", help="the rule of each observation, applied to the paper's tables")
    args = vars(parser.parse_args(given))
    if args["command"] == "rules":
        from captum_adv2.study.verdicts import rules  # here: it needs the extra

        print(rules())
        return 0
    chosen = {
        field.name: tuple(value) if isinstance(value, list) else value
        for field in fields(Settings)
        if (value := args[field.name]) is not None
    }
    command = shlex.join(["python", "-m", "captum_adv2", *given])
    try:
        if args["page"]:
            page(args["out"])
            return 0
        run(
            Settings(**(PROFILES[args["profile"]] | chosen)),
            args["out"],
            resume=args["resume"],
            verbose=not args["quiet"],
            command=command,
        )
    except (ValueError, TypeError, OSError, ImportError) as error:
        study.exit(2, f"{study.prog}: {error}\n")
    return 0


def _declare(parser: argparse.ArgumentParser) -> None:
    """Add an option for every field of `Settings`."""
    parser.add_argument("--out", type=Path, required=True, help="folder for all that it makes")
    parser.add_argument("--resume", action="store_true", help="go on with the study in the folder")
    parser.add_argument(
        "--page",
        action="store_true",
        help="write the page of what the study in the folder has so far; nothing else",
    )
    parser.add_argument("--quiet", action="store_true", help="show no progress bars")
    parser.add_argument(
        "--profile",
        choices=PROFILES,
        default="full",
        help="how large, unless an option below says otherwise (default: full)",
    )
    for field in fields(Settings):
        default: Any = field.default
        option = f"--{field.name.replace('_', '-')}"
        if isinstance(default, bool):
            parser.add_argument(
                option, action="store_const", const=True, help=field.metadata["help"]
            )
            continue
        several = isinstance(default, tuple)
        kind = type(default[0]) if several else type(default)
        shown = " ".join(map(str, default)) if several else default
        parser.add_argument(
            option,
            type=_number if kind is float else kind,
            metavar={str: "TEXT", int: "N", float: "X"}[kind],
            help=f"{field.metadata['help']} (default: {shown or 'none'})".replace("%", "%%"),
            nargs="*" if several else None,
        )


def _number(text: str) -> float:
    """Return a number; fractions are welcome: ``8/255``."""
    top, _, bottom = text.partition("/")
    try:
        return float(top) / float(bottom or 1)
    except (ValueError, ZeroDivisionError) as error:
        wanted = "expected a number or a fraction such as 8/255"
        raise argparse.ArgumentTypeError(f"{wanted}, got {text!r}") from error
