# SPDX-License-Identifier: MIT
"""The tutorials run, and the site is built from them without a warning or a broken link."""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import captum_adv2
from captum_adv2 import attacks, defenses, interpreters, study, testing

ROOT = Path(__file__).parents[1]
TUTORIALS = sorted((ROOT / "examples" / "tutorials").glob("*.py"))


def test_every_page_is_in_the_menu() -> None:
    listed = set((ROOT / "docs" / "index.md").read_text(encoding="utf-8").splitlines())
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"}
    assert pages <= listed
    api = (ROOT / "docs" / "api.md").read_text(encoding="utf-8").splitlines()
    assert {f"api/{path.stem}" for path in (ROOT / "docs" / "api").glob("*.md")} <= set(api)


@pytest.mark.slow
@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_tutorials_run_as_scripts(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with contextlib.redirect_stdout(io.StringIO()):
        runpy.run_path(str(path), run_name="__main__")
    assert not list(tmp_path.iterdir())


class Page(HTMLParser):
    """The places and links of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.places: set[str] = set()
        self.links: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.places.add(found.get("id") or "")
        # Links of the head, to style sheets, say, carry a digest.
        self.links += [found.get("src") or found.get("href") or ""] if tag in ("a", "img") else []


def broken(site: Path) -> list[str]:
    """Return the links inside a site that lead nowhere."""
    pages = {path: Page(path) for path in site.rglob("*.html")}
    found = []
    for path, page in pages.items():
        for link in page.links:
            scheme, host, file, _, place = urlsplit(link)
            if scheme or host:
                continue
            target = (path.parent / unquote(file)).resolve() if file else path
            known = pages[target].places | {""} if target in pages else {""}
            if not target.is_file() or unquote(place) not in known:
                found.append(f"{path.relative_to(site)}: {link}")
    return found


def test_broken_links_are_found(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text('<a href="b.html#c"></a><a href="https://x.y"></a>')
    assert broken(tmp_path) == ["a.html: b.html#c"]
    (tmp_path / "b.html").write_text('<p id="b"></p><img src="d.png">')
    assert sorted(broken(tmp_path)) == ["a.html: b.html#c", "b.html: d.png"]
    (tmp_path / "b.html").write_text('<p id="c"></p><a href="#c"></a>')
    assert broken(tmp_path) == []


@pytest.mark.slow
def test_the_site_is_built(tmp_path: Path) -> None:
    for package in ("sphinx", "myst_parser", "furo", "sphinx_gallery"):
        pytest.importorskip(package)
    source, site = tmp_path / "source", tmp_path / "site"
    for folder in ("docs", "examples/tutorials"):  # a copy, as pages are written beside the sources
        ignored = shutil.ignore_patterns("tutorials", "__pycache__")
        shutil.copytree(ROOT / folder, source / folder, ignore=ignored)
    for file in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md"):
        shutil.copy(ROOT / file, source)
    command = [sys.executable, "-m", "sphinx", "-q", "-n", "-W", "--keep-going"]
    done = subprocess.run(
        [*command, "-d", str(tmp_path / "cache"), str(source / "docs"), str(site)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert broken(site) == []
    names = {
        place.rpartition(".")[2] for path in site.rglob("*.html") for place in Page(path).places
    }
    for face in (captum_adv2, attacks, defenses, interpreters, study, testing):
        assert {*face.__all__} - {"presets", "CHECKS", "PROFILES"} <= names
    for path in TUTORIALS:
        page = (site / "tutorials" / f"{path.stem}.html").read_text(encoding="utf-8")
        assert "sphx-glr-script-out" in page or "sphx_glr" in page  # it printed or drew something
