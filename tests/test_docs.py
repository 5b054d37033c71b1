# SPDX-License-Identifier: MIT
"""The pages: their code runs, their links lead somewhere, the names and signatures exist."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
NAMES = ("README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))

FENCE = re.compile(r"^(```+)([^\n`]*)\n(.*?)^\1[ \t]*$", re.MULTILINE | re.DOTALL)
UNTESTED = re.compile(r"<!-- (?:no test|needs (\w+)) -->\s*\Z")
LINK = re.compile(
    r"\]\(\s*<?([^)\s>]+)|^\[[^\]]+\]:\s*(\S+)|(?:src|href)=\"([^\"]+)\"", re.MULTILINE
)
FOLDERS = "captum_adv2|docs|examples|tests|interpreters|attacks|defenses|evaluation|study"
FILE = re.compile(rf"`((?:{FOLDERS})/[\w./-]*)`")
FIGURE = re.compile(r"[\w.-]+/[\w./-]+\.(?:png|jpe?g|svg|gif|webp)")
DOTTED = re.compile(r"`(captum_adv2(?:\.\w+)+)`")


def blocks(text: str, language: str, library: str = "") -> Iterator[tuple[int, str]]:
    """Yield the line before each block of a language, and the block.

    Those marked "no test" are left out, and those marked "needs" another library than ``library``.
    """
    for match in FENCE.finditer(text):
        marked = UNTESTED.search(text[: match.start()])
        wanted = not marked or (library and marked[1] == library)
        if match[2].split(maxsplit=1)[:1] == [language] and wanted:
            yield text.count("\n", 0, match.start(3)), match[3]


def prose(text: str) -> str:
    """Return a page without its fenced blocks."""
    return FENCE.sub("", text)


def read(name: str) -> str:
    path = ROOT / name
    if not path.is_file():
        pytest.skip(f"there is no {name}")
    return path.read_text(encoding="utf-8")


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def text(name: str) -> str:
    return read(name)


@pytest.fixture
def execute(tmp_path: Path, monkeypatch: Any) -> Callable[..., None]:
    """Return a function that executes the blocks of a page, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    # A module, known by its name: dataclasses and pickle look for theirs.
    page = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", page)

    def run(name: str, library: str = "") -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            for line, source in blocks(read(name), "python", library):
                exec(compile("\n" * line + source, str(ROOT / name), "exec"), vars(page))

    return run


def test_code_runs(name: str, execute: Callable[..., None]) -> None:
    execute(name)


@pytest.mark.parametrize("library", ["quantus", "art", "foolbox", "lightning", "robustbench"])
@pytest.mark.filterwarnings("ignore", "error::captum_adv2.SoundnessWarning")
def test_examples_of_other_libraries_run(library: str, execute: Callable[..., None]) -> None:
    pytest.importorskip(library)
    assert f"<!-- needs {library} -->" in read("docs/interoperability.md")
    execute("docs/interoperability.md", library)


def test_links_lead_to_files(name: str, text: str) -> None:
    targets = [next(filter(None, found)) for found in LINK.findall(prose(text))]
    inside = [t.partition("#")[0] for t in targets if not re.match(r"[a-z]+:|#", t)]
    assert [t for t in inside if not ((ROOT / name).parent / t).exists()] == []


def test_files_and_figures_exist(name: str, text: str) -> None:
    # Pages may leave out the package's name, and name what lies beside them.
    folders = (ROOT, ROOT / "captum_adv2", (ROOT / name).parent)
    named = {*FILE.findall(text), *FIGURE.findall(re.sub(r"\w+://\S+", "", prose(text)))}
    assert sorted(n for n in named if not any((f / n).exists() for f in folders)) == []


def test_dotted_names_exist(text: str) -> None:
    for dotted in DOTTED.findall(text):
        assert resolves(dotted), f"there is no {dotted}"


def resolves(dotted: str) -> bool:
    """Return whether a dotted name leads to a module, or to something in one."""
    parts = dotted.split(".")
    for end in range(len(parts), 0, -1):
        try:
            value: Any = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            if not (hasattr(value, part) or part in getattr(value, "__annotations__", {})):
                return False
            value = getattr(value, part, None)
        return True
    return False


@pytest.mark.parametrize("name", [n for n in NAMES if n != "README.md"])
def test_lines_are_short(name: str) -> None:
    text = read(name)
    lines = enumerate(text.splitlines(), 1)
    long = [n for n, line in lines if len(line) > 120 and not line.startswith("|")]  # no tables
    assert long == []


# The tests themselves


def test_pages_have_code() -> None:
    for page in ("README.md", "docs/conventions.md", "docs/add-an-interpreter.md"):
        assert list(blocks(read(page), "python")), page


def test_the_reader_of_blocks() -> None:
    page = "a\n```python\n1\n```\n<!-- no test -->\n\n```python\n2\n```\n```text\n3\n```\n"
    assert list(blocks(page, "python")) == [(2, "1\n")]
    assert list(blocks(page, "text")) == [(10, "3\n")]
    assert "1" not in prose(page)


def test_the_reader_of_names() -> None:
    assert resolves("captum_adv2.attacks.loop.Problem.gradient")
    assert resolves("captum_adv2.attacks.terms.Candidate.progress")
    assert not resolves("captum_adv2.attacks.loop.Trouble")
    assert FIGURE.findall("see figures/a.png and b.png") == ["figures/a.png"]
    assert LINK.findall("[a](b.md#c) ![d](e/f.png)") == [("b.md#c", "", ""), ("e/f.png", "", "")]
