# SPDX-License-Identifier: MIT
"""The package as a whole: imports run one way and cost little, faces are small and documented."""

from __future__ import annotations

import ast
import doctest
import graphlib
import importlib
import importlib.util
import inspect
import json
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import captum_adv2

PACKAGE = Path(captum_adv2.__file__).parent
MODULES = (
    "captum_adv2",
    *sorted(info.name for info in pkgutil.walk_packages([str(PACKAGE)], "captum_adv2.")),
)
ROOTS = {"spec", "seeds", "optim", "storage", "progress"}
# What each wing may import, besides itself.
SEES = {
    "spec": set(),
    "seeds": set(),
    "optim": {"spec"},
    "storage": {"spec"},
    "progress": set(),
    "interpreters": ROOTS,
    "attacks": ROOTS | {"interpreters"},
    "defenses": ROOTS | {"interpreters", "attacks"},
    "evaluation": ROOTS | {"interpreters", "attacks", "defenses"},
    "study": ROOTS | {"interpreters", "attacks", "defenses", "evaluation"},
    "testing": ROOTS | {"interpreters"},
    "command": ROOTS | {"", "interpreters", "attacks", "evaluation", "study"},
    "": ROOTS | {"attacks", "evaluation", "testing"},
    "__main__": {"command"},
}
PROBE = """
import json, sys
import numpy, torch, torchattacks, tqdm.auto
before = {name.partition(".")[0] for name in sys.modules}
import captum_adv2
after = {name.partition(".")[0] for name in sys.modules}
print(json.dumps([sorted(before), sorted(after)]))
"""


def wing(module: str) -> str:
    return (module.split(".") + [""])[1]


def source(module: str) -> ast.Module:
    path = importlib.util.find_spec(module).origin
    return ast.parse(Path(path).read_text(encoding="utf-8"))


def imports(module: str) -> Iterator[str]:
    """Yield the dotted names of our modules that a module imports, anywhere in it."""
    for node in ast.walk(source(module)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module} has a relative import"
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            yield from (whole & set(MODULES)) or ({node.module} & set(MODULES))


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_one_way(module: str) -> None:
    own = wing(module)
    seen = {wing(name) for name in imports(module)} - {own}
    assert seen <= SEES[own], f"{module} imports {seen - SEES[own]}"


def test_there_is_no_circle_of_modules() -> None:
    graph = {module: set(imports(module)) - {module} for module in MODULES}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError
    assert "captum_adv2.attacks.loop" in graph["captum_adv2.attacks.dual"]


@pytest.fixture(scope="module")
def loaded() -> tuple[set[str], set[str]]:
    command = [sys.executable, "-c", PROBE]
    done = subprocess.run(
        command, cwd=PACKAGE.parent, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    before, after = json.loads(done.stdout.splitlines()[-1])
    return set(before), set(after)


def test_import_loads_nothing_beyond_its_dependencies(loaded: tuple[set[str], set[str]]) -> None:
    before, after = loaded
    assert after - before - sys.stdlib_module_names == {"captum_adv2"}
    assert not {"matplotlib", "captum", "kornia", "hypothesis", "pandas", "jinja2"} & after


def faces() -> dict[str, list[str]]:
    loaded = {name: importlib.import_module(name) for name in MODULES}
    return {
        name: list(module.__all__) for name, module in loaded.items() if "__all__" in vars(module)
    }


def test_names_are_listed_by_packages_alone() -> None:
    packages = {m for m in MODULES if importlib.util.find_spec(m).submodule_search_locations}
    assert set(faces()) <= packages


def test_faces_are_small() -> None:
    names = [
        name for module, names in faces().items() if "embedded" not in module for name in names
    ]
    assert len(set(names)) <= 62


@pytest.mark.parametrize("module", sorted(faces()))
def test_public_names_exist_and_are_documented(module: str) -> None:
    face = importlib.import_module(module)
    assert len(face.__all__) == len(set(face.__all__))
    for name in face.__all__:
        value = getattr(face, name)  # fails where it does not exist
        if inspect.isclass(value) or inspect.isroutine(value) or inspect.ismodule(value):
            doc = (value.__doc__ or "").strip()
            # A NamedTuple or dataclass without a docstring gets its signature for one.
            assert doc, f"{module}.{name} has no docstring"
            assert not doc.startswith(f"{name}("), f"{module}.{name} has no docstring"


@pytest.mark.parametrize("module", MODULES)
def test_modules_are_short_and_documented(module: str) -> None:
    tree = source(module)
    assert ast.get_docstring(tree)
    text = Path(importlib.util.find_spec(module).origin).read_text(encoding="utf-8")
    assert text.count("\n") <= 400
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0
            assert lines <= 45, f"{module}.{node.name} has {lines} lines"


def test_typed_marker_and_version() -> None:
    assert (PACKAGE / "py.typed").is_file()
    assert all(part.isdigit() for part in captum_adv2.__version__.split("."))


@pytest.mark.parametrize("module", MODULES)
def test_doctests(module: str) -> None:
    names = {"torch": torch, "nn": nn}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        failed, _ = doctest.testmod(importlib.import_module(module), extraglobs=names)
    assert not failed


def test_there_are_doctests() -> None:
    finder = doctest.DocTestFinder()
    tests = (test for module in MODULES for test in finder.find(importlib.import_module(module)))
    assert sum(bool(test.examples) for test in tests) > 10
