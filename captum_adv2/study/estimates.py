# SPDX-License-Identifier: MIT
"""Means and rates with their 95 % intervals, and where rules find them: in a study, or the paper.

Intervals of rates are Wilson's, those of means percentile bootstraps. Functions of several means,
such as their ratio, are bootstrapped on the images that all of them have.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from captum_adv2.evaluation.metrics import interval, wilson

FEW = 5
"""Fewer values than this have no interval of their mean."""

JOINT = "joint"
"""All squeezers together: the largest score, with a threshold of its own."""

Cell: TypeAlias = tuple[str, ...]
"""A measure, an attack, the interpreter that explains, and maybe the one that the attack knew."""

Function: TypeAlias = Callable[..., Any]
"""Of numbers or arrays; monotone in each of its arguments."""


class Estimate(NamedTuple):
    """A mean or rate, its 95 % interval, and the number of values; NaN where there are none."""

    mean: float
    low: float
    high: float
    size: int
    percent: bool = False  # whether it is printed as a percentage

    @classmethod
    def of(cls, values: Any, percent: bool = False) -> Self:
        """Return the mean of some values and its interval; with ``percent``, of shares."""
        sample = np.array(values, dtype=float)
        mean, size = (float(sample.mean()) if len(sample) else math.nan), len(sample)
        if percent:
            return cls(mean, *wilson(float(sample.sum()), size), size, percent=True)
        return cls(mean, *(unknown(size) or interval(sample)), size)

    def __str__(self) -> str:
        """Return it for people.

        >>> print(Estimate(0.5, 0.25, 0.75, 9), Estimate(0.5, 0.25, 0.75, 9, percent=True))
        0.500 [0.250, 0.750] 50 % [25, 75]
        >>> print(Estimate(0.5, *unknown(2), 2))
        0.500 (2 images)
        """
        if not self.size or math.isnan(self.mean):
            return "–"
        if self.percent:
            mean, low, high = (f"{round(100 * value, 1):g}" for value in self[:3])
            return f"{mean} % [{low}, {high}]"
        if math.isinf(self.high):
            return f"{self.mean:.3f} ({self.size} image{'s'[: self.size > 1]})"
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def unknown(size: int) -> tuple[float, float] | None:
    """Return the interval of a mean of too few values."""
    return (-math.inf, math.inf) if 0 < size < FEW else None


def contrasted(
    function: Function, columns: npt.NDArray[Any], level: float = 0.95, draws: int = 2000
) -> Estimate:
    """Return a function of the means of columns ``(n, k)``, and its bootstrap interval.

    >>> contrasted(lambda a, b: a / b, np.array([[1.0, 2.0]] * 6))[:3]
    (0.5, 0.5, 0.5)
    """
    size = len(columns)
    if not size:
        return Estimate(math.nan, math.nan, math.nan, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = float(function(*columns.mean(axis=0)))
        if ends := unknown(size):
            return Estimate(mean, *ends, size)
        rows = np.random.default_rng(0).integers(size, size=(draws, size))
        found = function(*columns[rows].mean(axis=1).T)
    low, high = np.nanquantile(found, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(mean, float(low), float(high), size)


def apart(first: Estimate, second: Estimate, correlation: float = 0.0) -> Estimate:
    """Return the difference of two rates and its interval.

    >>> one, other = (Estimate.of([1.0] * k + [0.0] * (10 - k), percent=True) for k in (9, 4))
    >>> print(apart(one, other))
    50 % [8.2, 74.6]

    Reference: Newcombe, Improved Confidence Intervals for the Difference between Binomial
    Proportions Based on Paired Data, Statistics in Medicine 1998, method 10.
    """

    def reach(up: float, down: float) -> float:
        return math.sqrt(max(0.0, up**2 + down**2 - 2 * correlation * up * down))

    gap = first.mean - second.mean
    low = gap - reach(first.mean - first.low, second.high - second.mean)
    high = gap + reach(first.high - first.mean, second.mean - second.low)
    return Estimate(gap, low, high, min(first.size, second.size), percent=True)


class Evidence(ABC):
    """Numbers by classifier, attack and interpreter, which rules are applied to.

    Attributes:
        models: Names of the classifiers.
        interpreters: Names of the interpreters that are studied for themselves.
        squeezers: Names of the squeezers.
        complete: Whether a rule needs all of its numbers; the paper does not print all of them.
    """

    models: Sequence[str]
    interpreters: list[str]
    squeezers: Sequence[str]
    complete: bool = True

    @abstractmethod
    def estimate(self, title: str, model: str, *place: str) -> Estimate:
        """Return a measure after an attack, on an interpreter; see `Cell`."""

    @abstractmethod
    def contrast(
        self, function: Function, model: str, *cells: Cell, level: float = 0.95
    ) -> Estimate:
        """Return a function of the means of cells, on the images that all of them have."""

    @abstractmethod
    def detection(self, model: str, attack: str, aimed: str, squeezer: str = JOINT) -> Estimate:
        """Return the share of images that a squeezer, or all together, flags."""

    def gap(self, model: str, first: Cell, second: Cell) -> Estimate:
        """Return the difference of the rates of two cells."""
        ours, theirs = (self.estimate(title, model, *place) for title, *place in (first, second))
        return apart(ours, theirs)

    def excess(
        self, model: str, first: tuple[str, str], second: tuple[str, str], squeezer: str
    ) -> Estimate:
        """Return by how much the rates of detection of two attacks differ."""
        ours, theirs = (self.detection(model, *place, squeezer) for place in (first, second))
        return apart(ours, theirs)

    @abstractmethod
    def having(self, attack: str) -> list[str]:
        """Return the interpreters with numbers of their own after an attack."""

    @abstractmethod
    def named(self, attack: str) -> list[str]:
        """Return an attack; or all that begin so, if it ends with a colon: ``adaptive:``."""
