# SPDX-License-Identifier: MIT
"""Plots of a study's numbers: bars with intervals, curves of trust, ROC curves.

Their colours are told apart by colour-blind people, hatches and dashes in print.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from captum_adv2.defenses.detection import roc
from captum_adv2.evaluation.robustness import Robustness

_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000", "#F0E442")
_HATCHES = ("", "//", "..", "xx", "\\\\", "++", "oo", "--")
_LINES = ("-", "--", "-.", ":")


def barred(
    panels: Mapping[str, Mapping[str, list[Any]]],
    names: Sequence[str],
    label: str,
    marks: Mapping[str, Mapping[str, list[float]]],
) -> Figure:
    """Draw a group of bars an interpreter, a bar a series; a panel a model."""
    keys = [*dict.fromkeys(key for found in panels.values() for key in found)]
    series, handles = len(keys), dict[str, Any]()
    each = max(2.5, 0.5 + 0.28 * len(names) * (1 + series))
    figure = Figure(figsize=(min(each * len(panels), 11) + 0.5, 3), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    width = 0.8 / series
    for axis, (model, found) in zip(axes, panels.items(), strict=True):
        for key, row in found.items():
            i = keys.index(key)
            ends = np.array([[e.mean - e.low for e in row], [e.high - e.mean for e in row]])
            ends[~np.isfinite(ends)] = 0  # of too few images there is no interval
            places = np.arange(len(names)) + (i - (series - 1) / 2) * width
            axis.scatter(places, marks[model][key], 14, "black", marker="D", zorder=3, linewidths=0)
            handles[key] = axis.bar(
                places,
                [entry.mean for entry in row],
                width,
                yerr=np.abs(ends),  # an end may pass the mean by rounding
                label=key,
                color=_COLOURS[i % len(_COLOURS)],
                hatch=_HATCHES[i % len(_HATCHES)],
                edgecolor="white",
                error_kw={"capsize": 2, "linewidth": 1},
            )
        axis.set_xticks(range(len(names)), names)
        sizes = {entry.size for row in found.values() for entry in row if entry.size}
        count = f"{min(sizes)} to {max(sizes)}" if len(sizes) > 1 else f"{max(sizes)}"
        axis.set_title(f"{model}, {count} images", fontsize=9)
    axes[0].set_ylim(bottom=0)  # shared, and fixed from now on: after all bars
    axes[0].set_ylabel(f"{label}, in [0, 1]")
    columns = min(4, int(figure.get_figwidth() // 1.4))  # as many as are not cut off
    figure.legend([handles[key] for key in keys], keys, loc="outside lower center", ncols=columns)
    return figure


def trusted(panels: Mapping[str, Mapping[str, Robustness]]) -> Figure:
    """Draw the curves of trust, a panel a model, three in a row."""
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.4 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (model, curves) in zip(axes.flat, panels.items(), strict=False):
        for i, (name, found) in enumerate(curves.items()):
            levels = [255 * level for level in found.levels]
            low, high = zip(*found.intervals(), strict=True)
            colour = _COLOURS[i % len(_COLOURS)]
            axis.plot(
                levels,
                found.shares(),
                color=colour,
                linestyle=_LINES[i % len(_LINES)],
                drawstyle="steps-post",
                label=f"{name}, area {found.area:.2f}",
            )
            axis.fill_between(levels, low, high, step="post", alpha=0.08, color=colour)
        axis.set_xscale("log", base=2)
        ticks = [0.25, 0.5, 1, 2, 4, 8, 16]
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        count = len(next(iter(curves.values())).least)
        axis.set(xlabel="eps × 255", ylim=(0, 1.02))
        axis.set_title(f"{model}, {count} images", fontsize=9)
        axis.legend(fontsize=7, loc="lower right")
    for axis in axes[:, 0]:
        axis.set_ylabel("images fooled, class and map")
    return figure


def curves(panels: Mapping[str, Mapping[str, tuple[Any, Any]]]) -> Figure:
    """Draw ROC curves of benign and attacked scores, a panel a model."""
    figure = Figure(figsize=(3.6 * len(panels), 3.8), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (model, curves) in zip(axes, panels.items(), strict=True):
        for i, (name, pair) in enumerate(curves.items()):
            curve = roc(*(torch.tensor(scores.to_numpy()) for scores in pair))
            axis.plot(
                curve.fpr,
                curve.tpr,
                color=_COLOURS[i % len(_COLOURS)],
                linestyle=_LINES[i % len(_LINES)],
                label=f"{name}, area {curve.auc:.3f}",
            )
        axis.set(xlabel="benign images flagged", ylabel="attacked images flagged")
        axis.set_title(model, fontsize=10)
        axis.legend(fontsize=8, loc="lower right")
    return figure
