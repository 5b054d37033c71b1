# SPDX-License-Identifier: MIT
"""The pictures of the tutorials: figures of Matplotlib that pyplot does not know of."""

from typing import Any

from matplotlib.figure import Figure
from sphinx_gallery.scrapers import figure_rst


def last_expression(block: Any, variables: dict[str, Any], config: dict[str, Any]) -> str:
    """Save the figure that a block of code ends with, as a notebook would show it.

    Returns:
        The reStructuredText that shows it, empty where the block ends with something else.
    """
    names = variables["example_globals"]
    figure, names["___"] = names.get("___"), None  # the last value, until a block has another
    if not isinstance(figure, Figure):
        return ""
    path = next(variables["image_path_iterator"])
    figure.savefig(path, dpi=130)
    return figure_rst([path], config["src_dir"])
