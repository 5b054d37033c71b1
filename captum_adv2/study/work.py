# SPDX-License-Identifier: MIT
"""A study's work: chunks of images, shared among processes, each case of each kept in a shard.

A shard is the file of one case on one chunk, written whole or not at all. What is in it hangs on
the settings alone, so processes may die at any moment, and other ones, more or fewer, go on: what
is there is not done again. Memory holds one chunk at a time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from tqdm.auto import tqdm

from captum_adv2 import storage
from captum_adv2.study.cases import NOISE, SQUEEZERS, Case, Chunk, Plan, measure, scores
from captum_adv2.study.records import MAP, SCORE, Frame, Pictures
from captum_adv2.study.selection import Selection, read, select
from captum_adv2.study.settings import Settings
from captum_adv2.study.sources import Source, open_source
from captum_adv2.study.subjects import Subject, label, subject
from captum_adv2.study.world import World

__all__ = ["Found", "work"]

_SHARD = "shard of a study"
_POOL = 100  # held-out images whose maps stand for other classes
_MEASURES = MAP[MAP.index("success") :]


class Task(NamedTuple):
    """A chunk to work on, of one of the models; held-out images are only scored."""

    model: int
    seed: int
    number: int
    images: tuple[int, ...]
    held_out: bool


class Found(NamedTuple):
    """All that a study found; see `records`.

    Attributes:
        maps, scores: Rows.
        pictures: Of the first images.
        selections: By model.
        redone: Shards that could not be read, and were made again.
        left_out: Interpreters that a model has not got, and why.
    """

    maps: Frame
    scores: Frame
    pictures: tuple[Pictures, ...]
    selections: dict[str, Selection]
    redone: tuple[str, ...]
    left_out: tuple[str, ...]


class _Study:
    """One classifier's part of a study."""

    def __init__(
        self,
        model: int,
        one: Subject,
        chosen: Selection,
        source: Source,
        settings: Settings,
        folder: Path,
    ) -> None:
        self.subject = one
        self.chosen = chosen
        self._model = model
        self._source = source
        self._settings = settings
        self._root = folder
        self._device = next(one.model.parameters()).device
        self._known = dict(
            zip(chosen.numbers, zip(chosen.names, chosen.labels, strict=True), strict=True)
        )
        self._plans: dict[int, Plan] = {}

    def tasks(self) -> Iterator[Task]:
        """Yield all the work."""
        settings, chosen = self._settings, self.chosen
        if settings.detectors:
            for number, part in enumerate(_parts(chosen.held_out, settings.chunk)):
                yield Task(self._model, settings.seeds[0], number, part, held_out=True)
        for seed in settings.seeds:
            for number, part in enumerate(_parts(chosen.numbers, settings.chunk)):
                yield Task(self._model, seed, number, part, held_out=False)

    def cases(self, task: Task) -> list[Case]:
        """Return what is done to a chunk; held-out images are only scored."""
        every = self._plan(task.seed).cases()
        return [next(every)] if task.held_out else list(every)

    def missing(self, task: Task, redone: list[str]) -> bool:
        """Return whether a chunk lacks shards; remove and note those that cannot be read."""
        files = [self._file(task, case) for case in self.cases(task)]
        for file in filter(Path.exists, files):
            try:
                storage.load(file, _SHARD)
            except ValueError:
                redone.append(str(file.relative_to(self._root)))
                file.unlink()
        return not all(map(Path.exists, files))

    def do(self, task: Task, bar: Any) -> None:
        """Do what a chunk lacks."""
        plan, chunk = self._plan(task.seed), self._chunk(task)
        benign: dict[str, Tensor] = {}
        for case in self.cases(task):
            bar.set_postfix_str(f"{self.subject.name}: {case.attack} {case.aimed}".strip())
            file = self._file(task, case)
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                found = (
                    {"scores": scores(plan, chunk.images).cpu()}
                    if task.held_out
                    else measure(case, plan, chunk, benign)
                )
                storage.save(self._kept(found, task, benign), file, _SHARD)
            benign = benign or storage.load(file, _SHARD).get("maps", {})
            bar.update()

    def shards(self, task: Task) -> Iterator[tuple[Case, dict[str, Any]]]:
        """Yield the cases of a chunk with what was found."""
        for case in self.cases(task):
            yield case, storage.load(self._file(task, case), _SHARD)

    def rows(self, task: Task, case: Case, shard: dict[str, Any]) -> list[tuple[Any, ...]]:
        """Return what the rows of a chunk's images begin with, see `IMAGE`."""
        targets = shard["target"].tolist() if "target" in shard else [-1] * len(task.images)
        return [
            (
                self.subject.name,
                task.seed,
                number,
                *self._known.get(number, ("", -1)),
                target,
                case.attack,
                case.aimed,
            )
            for number, target in zip(task.images, targets, strict=True)
        ]

    def _kept(self, found: dict[str, Any], task: Task, benign: dict[str, Tensor]) -> dict[str, Any]:
        """Return what goes into a shard: maps of the benign case, and those for pictures."""
        if not benign:
            return found
        shown = self._settings.shown if task.number == 0 else 0
        few = {
            kind: {name: maps[:shown].clone() for name, maps in found[kind].items()}
            for kind in ("maps", "aim")
        }
        return found | few

    def _file(self, task: Task, case: Case) -> Path:
        kind = "held-out" if task.held_out else f"seed-{task.seed}"
        name = re.sub(r"[^\w.]+", "-", f"{case.attack} {case.aimed}").strip("-")
        chunk = self._root / "shards" / self.subject.name / kind / f"{task.number:05d}"
        return chunk / f"{name}.pt"

    def _chunk(self, task: Task) -> Chunk:
        samples = [self._source[number] for number in task.images]
        return Chunk.of(task.images, samples, self.subject.classes, task.seed, self._device)

    def _plan(self, seed: int) -> Plan:
        """Return what is done with a seed; made once, for attacks look at the model."""
        if seed not in self._plans:
            numbers, samples = read(self._source, self.chosen.held_out[:_POOL], [])
            pool = None
            if samples:
                classes = self.subject.classes
                chunk = Chunk.of(tuple(numbers), samples, classes, seed, self._device)
                pool = chunk.images, chunk.labels
            levels = dict(zip(NOISE, self.chosen.levels, strict=False))
            self._plans[seed] = Plan(self.subject, self._settings, seed, pool, levels)
        return self._plans[seed]


def work(settings: Settings, folder: Path, world: World, verbose: bool = True) -> Found | None:
    """Do what is not yet done; return what was found, in the first process only.

    Args:
        settings: What to do.
        folder: Where the shards are.
        world: Who works.
        verbose: Show a progress bar for each process, with the time left.

    Raises:
        ValueError: Models, images or interpreters that do not exist or do not fit each other, or
            two of one name.
    """
    for kind, specs in (("models", settings.models), ("interpreters", settings.interpreters)):
        names = [label(spec) for spec in specs]
        if len(set(names)) < len(names):  # files and rows go by them
            raise ValueError(f"expected {kind} of different names, got {', '.join(names)}")
    source = open_source(
        settings.images,
        size=settings.size,
        resize=settings.resize or None,
        boxes=settings.boxes or None,
        classes=settings.classes or None,
    )
    studies = []
    for number, spec in enumerate(settings.models):
        one = subject(spec, settings, source, world.device)
        chosen = world.share(_selection(one, source, settings, folder) if not world.rank else None)
        studies.append(_Study(number, one, chosen, source, settings, folder))
    tasks = [task for study in studies for task in study.tasks()]
    redone: list[str] = []
    todo = [] if world.rank else [t for t in tasks if studies[t.model].missing(t, redone)]
    mine = world.share(todo)[world.rank :: world.size]
    total = sum(len(studies[task.model].cases(task)) for task in mine)
    with tqdm(
        total=total, desc=f"process {world.rank}", position=world.rank, disable=not verbose
    ) as bar:
        for task in mine:
            studies[task.model].do(task, bar)
    world.share(None)  # nobody is still at work
    return None if world.rank else _collected(studies, tasks, tuple(redone), settings)


def _parts(numbers: list[int], length: int) -> Iterator[tuple[int, ...]]:
    for start in range(0, len(numbers), length):
        yield tuple(numbers[start : start + length])


def _selection(one: Subject, source: Source, settings: Settings, folder: Path) -> Selection:
    """Choose a classifier's images, or read what was chosen."""
    file = folder / "selection" / f"{one.name}.pt"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        noise = {"RTS", "RTS-A"} <= set(one.interpreters)
        chosen = select(one.model, source, settings, one.classes, noise)
        storage.save(chosen._asdict(), file, "selection of images")
    record = storage.load(file, "selection of images")
    return Selection(*(record[name] for name in Selection._fields))


def _collected(
    studies: Sequence[_Study], tasks: Sequence[Task], redone: tuple[str, ...], settings: Settings
) -> Found:
    """Return all rows and pictures."""
    maps: list[tuple[Any, ...]] = []
    squeezed: list[tuple[Any, ...]] = []
    pictures = []
    for task in tasks:
        study = studies[task.model]
        for case, shard in study.shards(task):
            begin = study.rows(task, case, shard)
            for name, measures in shard.get("measures", {}).items():
                values = zip(*(measures[kind].tolist() for kind in _MEASURES), strict=True)
                maps += [(*row, name, *v) for row, v in zip(begin, values, strict=True)]
            for row, values in zip(begin, shard["scores"].tolist(), strict=True):
                squeezed += [(*row, *pair) for pair in zip(SQUEEZERS, values, strict=False)]
            if task.number == 0 and task.seed == settings.seeds[0] and not task.held_out:
                pictures.append(_picture(study.subject.name, case, shard, settings.shown))
    return Found(
        Frame.of(maps, MAP),
        Frame.of(squeezed, SCORE),
        tuple(pictures),
        {study.subject.name: study.chosen for study in studies},
        redone,
        tuple(reason for study in studies for reason in study.subject.left_out),
    )


def _picture(model: str, case: Case, shard: dict[str, Any], shown: int) -> Pictures:
    images = shard["images"][:shown].float() / 255
    maps, aims = ({name: m[:shown] for name, m in shard[k].items()} for k in ("maps", "aim"))
    return Pictures(model, case.attack, case.aimed, images, maps, aims.get(case.aimed))
