# SPDX-License-Identifier: MIT
"""The work of a study: chunks of images, shared among processes, kept in shards.

A shard is the file of one case on one chunk, written whole or not at all. Its content depends on
the settings, networks and images alone, so any process can compute it, at any time; that is what
makes it possible to resume a study whose processes were killed, with more processes or fewer. Each
shard has a digest of the networks and images. Memory holds one chunk.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import torch
import torch.distributed as dist
from torch import Tensor

from captum_adv2 import storage
from captum_adv2.progress import progress_bar
from captum_adv2.spec import doubt
from captum_adv2.study.cases import (
    DISTILLED,
    NOISE,
    Case,
    Chunk,
    Plan,
    held_out,
    measure,
)
from captum_adv2.study.data import Source, open_source
from captum_adv2.study.selection import Selection, select
from captum_adv2.study.settings import Settings
from captum_adv2.study.subjects import Subject, subject

_SETTINGS = "study.json"
_SHARD, _SELECTION = "shard of a study", "selection of images"
_POOL = 100  # held-out images whose maps stand for other classes


def prepared(settings: Settings, folder: Path, world: World, resume: bool) -> list[Part]:
    """Load the classifiers and choose the images; write to the folder once all is as it should be.

    The first process has the folder locked.
    """
    if world.rank == 0:
        _expect_ours(folder, settings, resume)
    parts = loaded(settings, folder, world)
    if world.rank == 0:
        storage.clean(folder)
        with storage.whole(folder / _SETTINGS) as file:
            file.write_text(json.dumps(asdict(settings), indent=2) + "\n", encoding="utf-8")
        for part in parts:
            part.keep_selection()
    return parts


def loaded(settings: Settings, folder: Path, world: World) -> list[Part]:
    """Load the classifiers; choose the images, or read which ones were chosen."""
    source = open_source(settings)
    parts = []
    for spec in settings.models:
        one, redone = subject(spec, settings, source, world.device), list[str]()
        chosen = None if world.rank else _selection(one, source, settings, folder, redone)
        parts.append(Part(one, world.share(chosen), source, settings, folder, redone))
    return parts


def began(folder: Path) -> bool:
    """Return whether there is a study in a folder."""
    return (folder / _SETTINGS).exists()


def stored(folder: Path) -> Settings:
    """Return the settings of the study in a folder."""
    file = folder / _SETTINGS
    if not began(folder):
        raise FileNotFoundError(f"expected a study in {folder}, got none; there is no {_SETTINGS}")
    values = _read_settings(file).items()
    named: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values}
    return Settings(**named)


def _read_settings(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(f"expected the settings of a study in {file}, got {error}") from error


def _expect_ours(folder: Path, settings: Settings, resume: bool) -> None:
    """Raise unless a folder is empty, or this study's and to be continued."""
    if storage.content(folder):
        if not began(folder):
            raise FileExistsError(f"expected an empty folder, got {folder} with other things in it")
        if not resume:
            raise FileExistsError(
                f"expected an empty folder, got {folder} with a study in it; --resume continues it"
            )
        _expect_same(folder / _SETTINGS, json.loads(json.dumps(asdict(settings))))


def _expect_same(file: Path, now: dict[str, Any]) -> None:
    before = _read_settings(file)
    other = [
        name
        for name in now
        if before.get(name) != now[name]
        and not (name in Settings.GROW and _grown(before.get(name), now[name]))
    ]
    if other:
        listed = "; ".join(f"{name} was {before.get(name)}, is {now[name]}" for name in other)
        raise ValueError(f"expected the settings in {file}, got others: {listed}")


def _grown(before: Any, now: Any) -> bool:
    """Return whether a setting became more: a larger number, or a list that goes on."""
    if isinstance(now, list):
        return isinstance(before, list) and now[: len(before)] == before
    return before is None or bool(now >= before)


class World(NamedTuple):
    """The processes that share the work, as PyTorch's launcher started them, or this one alone."""

    rank: int = 0
    size: int = 1

    @classmethod
    @contextmanager
    def joined(cls) -> Iterator[World]:
        """Join the others, if any; leave them at the end."""
        if not dist.is_torchelastic_launched():
            yield cls()
            return
        # NCCL wants a GPU for each process, and to know which.
        gpus = torch.cuda.device_count()
        backend = "nccl" if int(os.environ["LOCAL_WORLD_SIZE"]) <= gpus else "gloo"
        if gpus:
            torch.cuda.set_device(cls().device)
        dist.init_process_group(backend, timeout=timedelta(days=30))  # the slowest may take long
        try:
            yield cls(dist.get_rank(), dist.get_world_size())
        finally:
            dist.destroy_process_group()

    @property
    def device(self) -> torch.device:
        """A GPU of its own for each process of a machine, or the CPU."""
        if not torch.cuda.is_available():
            return torch.device("cpu")
        local = int(os.environ.get("LOCAL_RANK", "0"))
        return torch.device("cuda", local % torch.cuda.device_count())

    def share(self, value: Any) -> Any:
        """Return the first process's value in all of them; they wait for each other."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]


class Task(NamedTuple):
    """A chunk of images to work on; held-out ones are only scored by the squeezers."""

    seed: int
    number: int
    images: tuple[int, ...]
    held_out: bool


class Part:
    """One classifier's part of a study.

    Args:
        one: The classifier.
        chosen: Its images.
        source: Their source.
        settings: The study's.
        root: Folder of the study.
        redone: Files of the folder that could not be read, and are made again; others are added.
    """

    def __init__(
        self,
        one: Subject,
        chosen: Selection,
        source: Source,
        settings: Settings,
        root: Path,
        redone: list[str],
    ) -> None:
        self.subject, self.chosen, self.redone = one, chosen, redone
        self._source, self._settings, self._root = source, settings, root
        self._device = next(one.model.parameters()).device
        own = zip(chosen.names, chosen.labels, strict=True)
        self._known = dict(zip(chosen.numbers, own, strict=True))
        self._plans: dict[int, Plan] = {}
        self._damaged: set[Path] = set()
        self._digests = dict(zip([*chosen.numbers, *chosen.held_out], chosen.digests, strict=True))
        if chosen.weights != one.weights:
            raise ValueError(
                f"expected {one.name} and its interpreters as they were when the study in {root} "
                "began, got other weights or settings; choose another folder"
            )

    def keep_selection(self) -> None:
        """Write which images were chosen, unless the file has them."""
        file = _selection_file(self._root, self.subject)
        if not file.exists() or storage.load(file, _SELECTION)["asked"] != self.chosen.asked:
            file.parent.mkdir(exist_ok=True)
            storage.save(self.chosen._asdict(), file, _SELECTION)

    def tasks(self) -> Iterator[Task]:
        """Yield all the work."""
        settings, chosen = self._settings, self.chosen
        held = chosen.held_out if settings.detectors else chosen.held_out[: settings.tuned]
        for number, part in enumerate(_chunks(held, settings.chunk)):
            yield Task(settings.seeds[0], number, part, held_out=True)
        for seed in settings.seeds:
            for number, part in enumerate(_chunks(chosen.numbers, settings.chunk)):
                yield Task(seed, number, part, held_out=False)

    def cases(self, task: Task) -> list[Case]:
        """Return the cases of a chunk; of held-out images, the benign one."""
        every = self._plan(task.seed).cases()
        return [next(every)] if task.held_out else list(every)

    def missing(self, task: Task) -> bool:
        """Return whether a chunk lacks shards; remove and note those that cannot be read."""
        files = [self._file(task, case) for case in self.cases(task)]
        for file in files:
            found = _kept(file, _SHARD, {"inputs": str, "scores": Tensor}, self._root, self.redone)
            if found and found["inputs"] != self._inputs(task):
                raise ValueError(f"expected the results of these networks and images in {file}")
        return not all(map(Path.exists, files))

    def do(self, task: Task, bar: Any) -> None:
        """Compute the shards that a chunk lacks."""
        plan, chunk = self._plan(task.seed), self._chunk(task.images, task.seed)
        benign: dict[str, Tensor] = {}
        for case in self.cases(task):
            bar.set_postfix_str(f"{self.subject.name}: {case.attack} {case.aimed}".strip())
            file = self._file(task, case)
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                if task.held_out:
                    tune = max(0, self._settings.tuned - task.number * self._settings.chunk)
                    found: dict[str, Any] = held_out(plan, chunk, tune)
                else:
                    found = measure(case, plan, chunk, benign)
                if benign:  # whose maps are needed whole, other ones for pictures
                    shown = self._settings.shown if task.number == 0 else 0
                    for kind in ("maps", "aim"):
                        found[kind] = {k: maps[:shown].clone() for k, maps in found[kind].items()}
                storage.save(found | {"inputs": self._inputs(task)}, file, _SHARD)
            benign = benign or storage.load(file, _SHARD).get("maps", {})
            bar.update()

    def shards(self) -> Iterator[tuple[Task, Case, dict[str, Any]]]:
        """Yield the results that are there, see `measure`; warn of those that cannot be read."""
        for task in self.tasks():
            for case in self.cases(task):
                file = self._file(task, case)
                if not file.exists():
                    continue
                try:
                    found = storage.load(file, _SHARD)
                except ValueError as error:
                    self._damaged.add(file)
                    doubt(f"{error}; the page leaves it out, and --resume computes it again")
                else:
                    yield task, case, found

    def absent(self) -> int:
        """Return the number of results that are not there yet, or could not be read."""
        files = (self._file(task, case) for task in self.tasks() for case in self.cases(task))
        return sum(not file.exists() or file in self._damaged for file in files)

    def class_name(self, number: int) -> str:
        """Return a class's name, or its number."""
        names = self._source.classes
        return _printable(names[number]) if names else f"class {number}"

    def known(self, number: int) -> tuple[str, int]:
        """Return an image's name and class; neither is kept of held-out ones."""
        name, label = self._known.get(number, ("", -1))
        return _printable(name), label

    def _inputs(self, task: Task) -> str:
        """Return a digest of the networks and images that a chunk's results come from."""
        return storage.digest(self.chosen.weights, [self._digests[n] for n in task.images])

    def _file(self, task: Task, case: Case) -> Path:
        kind = "held-out" if task.held_out else f"seed-{task.seed}"
        name = re.sub(r"[^\w.]+", "-", f"{case.attack} {case.aimed}").strip("-")
        # A chunk that is not full has another folder than the full one of a wider study.
        short = len(task.images) < self._settings.chunk
        chunk = f"{task.number:05d}" + f"-of-{len(task.images)}" * short
        return self._root / "shards" / self.subject.name / kind / chunk / f"{name}.pt"

    def _chunk(self, images: Sequence[int], seed: int) -> Chunk:
        return Chunk.of(self._source, images, self.subject.classes, seed, self._device)

    def _plan(self, seed: int) -> Plan:
        """Return the plan of a seed; made once, since attacks inspect the model."""
        if seed not in self._plans:
            pool = None
            if self.chosen.held_out:
                chunk = self._chunk(self.chosen.held_out[:_POOL], seed)
                pool = chunk.images, chunk.labels
            levels = dict(zip(NOISE, self.chosen.levels, strict=False))
            self._plans[seed] = Plan(self.subject, self._settings, seed, pool, levels)
        return self._plans[seed]


def _printable(name: str) -> str:
    """Return a name with bytes that are no text escaped: pandas with pyarrow refuses them."""
    return name.encode("utf-8", "backslashreplace").decode()


def _chunks(numbers: Sequence[int], length: int) -> Iterator[tuple[int, ...]]:
    for start in range(0, len(numbers), length):
        yield tuple(numbers[start : start + length])


def _selection(
    one: Subject, source: Source, settings: Settings, folder: Path, redone: list[str]
) -> Selection:
    """Choose a classifier's images, or read the choice."""
    file = _selection_file(folder, one)
    record = _kept(file, _SELECTION, get_type_hints(Selection), folder, redone)
    if record is None:
        return select(one, source, settings, noise={"RTS", DISTILLED} <= set(one.interpreters))
    chosen = Selection(*(record[name] for name in Selection._fields))
    chosen.expect_same(source)
    if chosen.asked >= settings.count:
        return chosen
    wider = select(one, source, settings, noise=bool(chosen.levels))
    if not chosen.widened(wider):
        raise ValueError(f"expected {file} to be of the same images and networks; begin anew")
    return wider


def _selection_file(folder: Path, one: Subject) -> Path:
    return folder / "selection" / f"{one.name}.pt"


def _kept(
    file: Path, kind: str, hints: Mapping[str, Any], root: Path, redone: list[str]
) -> dict[str, Any] | None:
    """Return the record of a file; ``None`` without it, or if it is damaged: it is removed then."""
    if not file.exists():
        return None
    try:
        return storage.load(file, kind, hints)
    except (TypeError, ValueError):
        redone.append(str(file.relative_to(root)))
        file.unlink()
        return None


def work(parts: Sequence[Part], world: World, verbose: bool) -> None:
    """Compute this process's share of the missing shards."""
    todo = [
        (number, task)
        for number, part in enumerate(parts if world.rank == 0 else ())
        for task in part.tasks()
        if part.missing(task)
    ]
    mine = world.share(todo)[world.rank :: world.size]
    total = sum(len(parts[number].cases(task)) for number, task in mine)
    with progress_bar(
        total=total, desc=f"process {world.rank}", position=world.rank, shown=verbose
    ) as bar:
        for number, task in mine:
            parts[number].do(task, bar)
    world.share(None)  # all processes are done
