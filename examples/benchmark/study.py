# SPDX-License-Identifier: MIT
"""Measure how a study uses two processes, and whether it survives being killed.

    python examples/benchmark/study.py kill processes quick

``kill`` kills all processes of a study (SIGKILL) at ten random moments, each time in a new folder,
resumes it with one process or two, and compares the records, byte by byte, with those of a run that
was not killed. Half of the studies, by chance, begin with fewer images, and are widened as they are
resumed. ``processes`` compares the images a second of two processes with those of one, one
thread each, in pairs of runs. ``quick`` times ``--profile quick``.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

SMALL = """--models embedded:resnet --interpreters CAM RTS --count 8 --held-out 20 --chunk 2
    --steps 10 --flow-steps 10 --targets benign patch --adaptive""".split()  # noqa: SIM905


def start(folder: Path, processes: int, *options: str) -> subprocess.Popen[str]:
    """Start a study in processes of one thread each."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else ()), "-m", "captum_adv2", "study"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}  # the installed package
    return subprocess.Popen(
        [*command, *options, "--quiet", "--out", str(folder)],
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def kill_all(folder: Path) -> None:
    """Kill the processes whose command line names a folder: a launcher and all that it started."""
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it may have ended by itself
            if str(folder).encode() in file.read_bytes():
                os.kill(int(file.parent.name), signal.SIGKILL)


def finish(process: subprocess.Popen[str]) -> None:
    """Wait for a study; stop with its errors if it fails."""
    _, errors = process.communicate()
    if process.returncode:
        raise SystemExit(f"the study failed with status {process.returncode}:\n{errors}")


def records(folder: Path) -> bytes:
    """Return a study's records."""
    return b"".join(
        (folder / "records" / f"{name}.csv").read_bytes() for name in ("maps", "scores", "boxes")
    )


def kill(folder: Path, args: argparse.Namespace) -> None:
    """Kill and resume at random moments; print whether the records are the same."""
    finish(start(folder / "whole", 1, *SMALL))
    whole, files = records(folder / "whole"), len(list((folder / "whole").rglob("*.pt")))
    draw = random.Random(args.seed)
    same = 0
    for number in range(args.times):
        out = folder / f"killed-{number}"
        processes, others, enough = draw.choice((1, 2)), draw.choice((1, 2)), draw.randrange(files)
        count = draw.choice(("3", "8"))
        process = start(out, processes, *SMALL, "--count", count)
        while process.poll() is None and len(list(out.rglob("*.pt"))) < enough:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.3))
        kill_all(out)
        process.communicate()
        done = len(list(out.rglob("*.pt")))
        finish(start(out, others, *SMALL, "--resume"))
        equal = records(out) == whole
        same += equal
        print(
            f"killed {processes} process(es) on {count} images with {done:2d} of {files} files, "
            f"resumed with {others} on 8: records {'identical' if equal else 'DIFFERENT'}",
            flush=True,
        )
    print(f"{same} of {args.times} identical to the run that was not killed")


def processes(folder: Path, args: argparse.Namespace) -> None:
    """Print the images a second of two processes, over those of one."""
    options = [*SMALL, "--count", str(args.images), "--steps", "40", "--chunk", "8"]
    ratios = []
    for number in range(args.pairs):
        seconds = []
        for count in (1, 2):
            began = time.perf_counter()
            finish(start(folder / f"{number}-{count}", count, *options))
            seconds.append(time.perf_counter() - began)
        ratios.append(seconds[0] / seconds[1])
        one, two = (args.images / s for s in seconds)
        print(f"{one:.2f} images a second with one process, {two:.2f} with two", flush=True)
    print(f"two processes over one: {', '.join(f'{ratio:.2f}' for ratio in ratios)}")


def quick(folder: Path, args: argparse.Namespace) -> None:
    """Time the quick profile with two processes."""
    began = time.perf_counter()
    finish(start(folder / "quick", 2, "--profile", "quick"))
    print(f"--profile quick, two processes: {(time.perf_counter() - began) / 60:.1f} minutes")


CASES: dict[str, Callable[[Path, argparse.Namespace], None]] = {
    "kill": kill,
    "processes": processes,
    "quick": quick,
}


def main() -> None:
    """Run the cases asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("cases", nargs="*", default=[*CASES], metavar="case", help=str([*CASES]))
    parser.add_argument("--times", type=int, default=10, help="moments to kill at")
    parser.add_argument("--images", type=int, default=320, help="images of the case processes")
    parser.add_argument("--pairs", type=int, default=2, help="pairs of runs of that case")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--smoke", action="store_true", help="kill once; nothing else")
    args = parser.parse_args()
    unknown = sorted(set(args.cases) - set(CASES))
    if unknown:
        parser.error(f"expected cases from {', '.join(CASES)}, got {', '.join(unknown)}")
    if args.smoke:
        args.cases, args.times = ["kill"], 1
    for name in args.cases:
        print(f"## {name}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            CASES[name](Path(folder), args)


if __name__ == "__main__":
    main()
