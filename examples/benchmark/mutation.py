# SPDX-License-Identifier: MIT
"""Mutation tests: how many small mistakes in a module the tests notice (docs/testing.md).

    python examples/benchmark/mutation.py            # half an hour of one core, the first time
    python examples/benchmark/mutation.py --again    # with new tests: the survivors once more
    python examples/benchmark/mutation.py --last     # nothing is run: the figures of the last run
    python examples/benchmark/mutation.py --changes  # the same, with what each survivor changes

mutmut (``pip install -e .[mutation]``) makes the mistakes, one at a time, in a copy under
``mutants/``: which modules and which tests, ``pyproject.toml`` says. It goes on where it was
stopped, and otherwise tries functions that have changed since.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[2]
# What a test noticed: it failed, or did not come to an end, or the process died.
NOTICED = ("killed", "timeout", "segfault")


def mutmut(*args: str, quiet: bool = True) -> str:
    """Return what a command of mutmut prints; it works in the root of the repository."""
    done = subprocess.run(
        [sys.executable, "-c", "from mutmut.__main__ import cli; cli()", *args],
        cwd=ROOT,
        env={"OMP_NUM_THREADS": "1"} | os.environ,
        stdout=subprocess.PIPE if quiet else None,
        text=True,
        check=True,
    )
    return done.stdout or ""


def results() -> dict[str, str]:
    """Return what became of each mutant, by name."""
    pairs = (line.strip().rsplit(": ", 1) for line in mutmut("results", "--all", "1").splitlines())
    return {pair[0]: pair[1] for pair in pairs if len(pair) == 2}


def module(mutant: str) -> str:
    """Return the file that a mutant is in, below the package.

    >>> module("captum_adv2.attacks.targets.xǁRandomPatchǁ_draw__mutmut_7")
    'attacks/targets.py'
    """
    return "/".join(mutant.split(".")[1:-1]) + ".py"


def table(found: dict[str, str]) -> str:
    """Return a table: a row for each module, and one for all."""
    total, noticed = (
        Counter(module(name) for name, status in found.items() if status in wanted)
        for wanted in (set(found.values()), NOTICED)
    )
    rows = [(f"`{name}`", total[name], noticed[name]) for name in sorted(total)]
    rows.append(("all", total.total(), noticed.total()))
    lines = ["| Module | Mutants | Killed | Survived | Killed, % |", "| --- |" + 4 * " --- |"]
    lines += [
        f"| {name} | {count:,} | {killed:,} | {count - killed:,} | {100 * killed / count:.1f} |"
        for name, count, killed in rows
    ]
    return "\n".join(lines)


def survivors(found: dict[str, str]) -> list[str]:
    """Return the names of mutants that no test noticed."""
    return sorted(name for name, status in found.items() if status not in NOTICED)


def change(mutant: str) -> Iterable[str]:
    """Yield the lines that a mutant takes away and puts in."""
    for line in mutmut("show", mutant).splitlines():
        if line[:1] in ("-", "+") and line[:3] not in ("---", "+++"):
            yield f"    {line}"


def main() -> None:
    """Run mutmut unless told otherwise; print the table and the survivors."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--again", action="store_true", help="only the last run's survivors")
    parser.add_argument("--last", action="store_true", help="do not run anything")
    parser.add_argument("--changes", action="store_true", help="nor that; show what changes")
    parser.add_argument("--children", type=int, default=2, help="mutants at a time")
    parser.add_argument("mutants", nargs="*", help="names, * allowed; default: all that are new")
    options = parser.parse_args()
    if not (options.last or options.changes):
        names = [*options.mutants, *(survivors(results()) if options.again else ())]
        mutmut("run", "--max-children", str(options.children), *names, quiet=False)
    found = results()
    print(table(found))
    for name in survivors(found):
        print(f"{name}: {found[name]}")
        if options.changes:
            print(*change(name), sep="\n")


if __name__ == "__main__":
    main()
