# SPDX-License-Identifier: MIT
"""The package as a whole: imports run one way and cost little, names are documented."""

from __future__ import annotations

import ast
import doctest
import importlib
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
# Each wing stands only on those before it; testing knows interpreters only.
WINGS = (
    "types",
    "checks",
    "optim",
    "storage",
    "interpreters",
    "attacks",
    "defenses",
    "evaluation",
    "",
)
SEES = {
    "types": {"types"},
    "checks": {"checks", "types"},
    "optim": {"optim", "types", "checks"},
    "storage": {"storage"},
    "interpreters": {"interpreters", "storage", "optim", "types", "checks"},
    "attacks": {"attacks", "interpreters", "storage", "optim", "types", "checks"},
    "defenses": {"defenses", "attacks", "interpreters", "storage", "optim", "types", "checks"},
    "evaluation": set(WINGS) - {""},
    "__main__": {"__main__", "evaluation"},
    "testing": {"testing", "interpreters", "optim", "types", "checks"},
    "": {*WINGS, "testing"},
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


def statements(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield every node but those under ``if TYPE_CHECKING``."""
    if isinstance(tree, ast.If) and "TYPE_CHECKING" in ast.unparse(tree.test):
        return
    yield tree
    for child in ast.iter_child_nodes(tree):
        yield from statements(child)


def imports(module: str) -> Iterator[str]:
    """Yield the dotted names of what a module imports, wherever it does."""
    source = Path(importlib.import_module(module).__spec__.origin).read_text(encoding="utf-8")
    for node in statements(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module} has a relative import"
            # `from captum_adv2 import checks` imports captum_adv2.checks.
            whole = node.module == "captum_adv2"
            yield from (f"captum_adv2.{a.name}" if whole else node.module for a in node.names)


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_one_way(module: str) -> None:
    ours = {wing(name) for name in imports(module) if name.startswith("captum_adv2")}
    assert ours <= SEES[wing(module)], f"{module} imports {ours - SEES[wing(module)]}"


def test_the_import_probe_sees_imports() -> None:
    assert "captum_adv2.interpreters.base" in set(imports("captum_adv2.evaluation.evaluate"))
    assert "matplotlib" in set(imports("captum_adv2.evaluation.visualize"))
    assert not any("interpreters" in name for name in imports("captum_adv2.types"))


@pytest.fixture(scope="module")
def loaded() -> tuple[set[str], set[str]]:
    command = [sys.executable, "-c", PROBE]
    done = subprocess.run(
        command, cwd=PACKAGE.parent, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    before, after = json.loads(done.stdout.splitlines()[-1])
    return set(before), set(after)


@pytest.mark.parametrize("name", ["matplotlib", "captum", "kornia", "hypothesis"])
def test_import_leaves_heavy_libraries_out(loaded: tuple[set[str], set[str]], name: str) -> None:
    assert name not in loaded[1]


def test_import_costs_nothing_beyond_its_dependencies(loaded: tuple[set[str], set[str]]) -> None:
    before, after = loaded
    assert "captum_adv2" in after - before
    assert after - before - sys.stdlib_module_names == {"captum_adv2"}


def test_typed_marker() -> None:
    assert (PACKAGE / "py.typed").is_file()


@pytest.mark.parametrize("module", MODULES)
def test_public_names_exist_and_are_documented(module: str) -> None:
    loaded = importlib.import_module(module)
    assert (loaded.__doc__ or "").strip()
    assert len(loaded.__all__) == len(set(loaded.__all__))
    for name in loaded.__all__:
        value = getattr(loaded, name)  # fails where it does not exist
        if inspect.isclass(value) or inspect.isroutine(value) or inspect.ismodule(value):
            doc = value.__doc__ or ""
            # A NamedTuple without a docstring gets its signature for one.
            assert doc.strip(), f"{module}.{name} has no docstring"
            assert not doc.startswith(f"{name}("), f"{module}.{name} has no docstring"


@pytest.mark.parametrize("name", captum_adv2.__all__)
def test_root_names_are_those_of_their_wings(name: str) -> None:
    assert getattr(captum_adv2, name).__module__.startswith("captum_adv2.")


def test_version_is_a_release() -> None:
    assert all(part.isdigit() for part in captum_adv2.__version__.split("."))


@pytest.mark.parametrize("module", MODULES)
def test_doctests(module: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        failed, _ = doctest.testmod(
            sys.modules[importlib.import_module(module).__name__],
            extraglobs={"torch": torch, "nn": nn},
        )
    assert not failed


def test_there_are_doctests() -> None:
    finder = doctest.DocTestFinder()
    examples = [
        test
        for module in MODULES
        for test in finder.find(importlib.import_module(module))
        if test.examples
    ]
    assert len(examples) > 10
