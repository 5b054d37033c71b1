# SPDX-License-Identifier: MIT
"""The site: ``pip install ".[docs]" && sphinx-build -W docs site``."""

import captum_adv2

project = "captum_adv2"
author = "The captum_adv2 authors"
version = release = captum_adv2.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
exclude_patterns = ["site"]
html_theme = "furo"
html_title = f"captum_adv2 {release}"
myst_heading_anchors = 3
napoleon_use_ivar = True
autodoc_typehints = "description"
autodoc_member_order = "bysource"
default_role = "code"
