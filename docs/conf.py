# SPDX-License-Identifier: MIT
"""The site: ``pip install ".[docs,test]" && sphinx-build -nW docs site``; it needs no internet."""

import re
import sys
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages
from typing import Annotated, Any, get_origin

from sphinx.util.inspect import TypeAliasForwardRef

import captum_adv2

sys.path.append(str(Path(__file__).parent))  # for figures.py

project = "captum_adv2"
author = "The captum_adv2 authors"
version = release = captum_adv2.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["site", "tutorials/GALLERY_HEADER.rst", "tutorials/*.ipynb"]
default_role = "code"
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"captum_adv2 {release}"
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_show_copyright = False

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autosummary_generate = False
napoleon_use_ivar = True

# Types with a range or a shape keep their names, which api/types.md explains.
modules = [module.name for module in walk_packages(captum_adv2.__path__, "captum_adv2.")]
autodoc_type_aliases = {
    name: name
    for module in modules
    if not module.endswith("__main__")
    for name, value in vars(import_module(module)).items()
    if get_origin(value) is Annotated
}
TypeAliasForwardRef.__repr__ = lambda self: self.name  # as Sphinx prints it inside tuple[...]

# Neither names of other projects, which would take the internet, nor internal states.
nitpick_ignore_regex = [
    ("py:.*", r"(torch|nn|Tensor|torchattacks|numpy|hypothesis|pandas|pd|collections|pathlib)\b.*"),
    ("py:.*", r"(st\.SearchStrategy|Attack|Selection|Pictures|Body|Activation)"),  # Sphinx 7
    ("py:.*", r"captum_adv2\.(attacks\.loop|interpreters\.(bilevel|first_order|rts))\.[A-Z]\w+"),
]

sphinx_gallery_conf = {
    "examples_dirs": "../examples/tutorials",
    "gallery_dirs": "tutorials",
    "filename_pattern": r"\.py",
    "within_subsection_order": "FileNameSortKey",
    "image_scrapers": ("figures.last_expression",),
    "capture_repr": (),
    "default_thumb_file": str(Path(__file__).parent / "quickstart.png"),
    "abort_on_example_error": True,
    "download_all_examples": False,
    "show_signature": False,
    "write_computation_times": False,
    "min_reported_time": 3600,
    "copyfile_regex": "",
}


def _levels(*args: Any) -> tuple[str, str] | None:
    """Write changes of a pixel in signatures as levels of 255."""
    signature, returned = args[-2:]
    if not signature:
        return None
    return re.sub(r"\b0\.0\d{9,}", lambda m: f"{float(m[0]) * 255:.3g}/255", signature), returned


def setup(app: Any) -> None:
    """Connect what is made here."""
    app.connect("autodoc-process-signature", _levels)
