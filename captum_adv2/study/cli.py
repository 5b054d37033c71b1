# SPDX-License-Identifier: MIT
"""``python -m captum_adv2 study``, and options from the fields of a dataclass."""

from __future__ import annotations

import argparse
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from captum_adv2.study import page, run
from captum_adv2.study.engine import began, stored
from captum_adv2.study.results import Found
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
    python -m captum_adv2 study --out study-resnet50 --resume --count 200 --curve
  two processes, going on where a study stopped; one thread each on a machine's CPU:
    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m captum_adv2 study --out study --resume
"""


def add_to(commands: Any) -> None:
    """Add the command to those of a parser."""
    study = commands.add_parser(
        "study",
        help="the paper's evaluation of your classifier and pictures",
        usage="%(prog)s --out FOLDER [options]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = study.add_argument
    add("--out", type=Path, required=True, help="folder for all that it makes")
    add(
        "--resume",
        action="store_true",
        help="go on with the study in the folder, by its settings; begins one if there is none",
    )
    add(
        "--page",
        action="store_true",
        help="write the page of what the study in the folder has so far, by its settings",
    )
    add("--quiet", action="store_true", help="show no progress bars")
    add(
        "--profile",
        choices=PROFILES,
        help="how large, unless an option below says otherwise (default: full)",
    )
    declare(study, Settings)
    study.set_defaults(run=_run)
    text = "the rule of each observation, applied to the paper's tables"
    rules = commands.add_parser("rules", help=text, description=text)
    rules.set_defaults(run=_rules)


def _run(args: argparse.Namespace, command: str) -> int:
    """Make a study, or the page of one; return the exit status."""
    given = chosen(args, Settings)
    if args.page:
        if given or args.profile:
            names = ", ".join(["profile"] * bool(args.profile) + [*given])
            raise ValueError(f"expected --page without settings, got {names}; --resume takes some")
        print(_told(page(args.out), args.out))
        return 0
    begun = args.resume and not args.profile and began(args.out)
    base = asdict(stored(args.out)) if begun else PROFILES[args.profile or "full"]
    found = run(Settings(**(base | given)), args.out, resume=args.resume, verbose=not args.quiet)
    if found:
        print(_told(found, args.out))
    return 0


def _told(found: Found, out: Path) -> str:
    """Return what was studied, where it may be less than what was asked for, and where it is."""
    chosen = [
        f"{name}: {len(each.numbers)} of {each.asked} images, {len(each.held_out)} held out"
        for name, each in found.selections.items()
    ]
    notes = [f"Left out: {reason}" for reason in found.left_out]
    notes += [f"Unfinished: {found.missing} parts; --resume goes on"] if found.missing else []
    text = "\n".join([*chosen, *notes, f"All of it: {out / 'index.html'}"])
    return text.encode("utf-8", "backslashreplace").decode()  # names of folders need not be text


def _rules(args: argparse.Namespace, command: str) -> int:
    """Print each observation's rule, applied to the paper's tables; return the exit status."""
    from captum_adv2.study.verdicts import rules  # here: it needs the extra

    print(rules())
    return 0


def chosen(args: argparse.Namespace, kind: type[Any]) -> dict[str, Any]:
    """Return the fields of a dataclass that a command line gives."""
    return {
        field.name: tuple(value) if isinstance(value, list) else value
        for field in fields(kind)
        if (value := getattr(args, field.name)) is not None
    }


def declare(parser: argparse.ArgumentParser, kind: type[Any]) -> None:
    """Add an option for every field of a dataclass; see `settings.option`."""
    for field in fields(kind):
        default: Any = field.default
        option = f"--{field.name.replace('_', '-')}"
        if isinstance(default, bool):
            parser.add_argument(
                option, action="store_const", const=True, help=field.metadata["help"]
            )
            continue
        several = isinstance(default, tuple)
        cast = type((*default, "")[0]) if several else type(default)
        shown = " ".join(map(str, default)) if several else default
        shown = f"{shown:.4g}" if cast is float else shown
        parser.add_argument(
            option,
            type=_number if cast is float else cast,
            metavar={str: "TEXT", int: "N", float: "X"}[cast],
            help=f"{field.metadata['help']} (default: {'none' if shown == '' else shown})".replace(
                "%", "%%"
            ),
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
