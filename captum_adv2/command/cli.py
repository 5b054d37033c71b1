# SPDX-License-Identifier: MIT
"""``python -m captum_adv2``: its commands, and how they fail."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence

from captum_adv2.command import attack, info
from captum_adv2.study import cli as study


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit status, 2 where something given is wrong."""
    given = sys.argv[1:] if arguments is None else [*arguments]
    parser = argparse.ArgumentParser(
        "python -m captum_adv2",
        description="Fool an image classifier and its attribution map together.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for command in (attack, study, info):
        command.add_to(commands)
    args = parser.parse_args(given)
    try:
        status: int = args.run(args, shlex.join(["python", "-m", "captum_adv2", *given]))
    except (ValueError, TypeError, OSError, ImportError) as error:
        parser.exit(2, f"{parser.prog} {args.command}: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog} {args.command}: stopped\n")  # 128 + SIGINT
    return status
