"""What was measured by :mod:`hdrq.reproduce.landscape`, run by run, and what goes with the accuracy of merges."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hdrq.reproduce.protocol import ITERATIONS, METHODS

SAMPLES = 1000  # of the bootstrap over networks
MIDWAY = {"rise midway": "loss between", "noisy rise midway": "noisy loss between"}
PREDICTORS = ("top eigenvalue", "trace", "rise by noise", *MIDWAY, "distance", "barrier", "noisy barrier")
OUTCOME = "accuracy, systematic"


@dataclass
class Run:
    """What was measured of one job.

    ``numbers`` are those with no place, ``grids`` those with one: by measure, and by domains.
    """

    task: str
    network: int
    method: str
    bits: str
    iterations: int
    knobs: dict[str, Any]
    numbers: dict[str, dict[str, float]] = field(default_factory=dict)
    grids: dict[str, dict[str, list[tuple[float, float, float]]]] = field(default_factory=dict)

    def mean(self, measure: str) -> float:
        """The mean of a measure over targets, pairs, or, of accuracy, all targets together; NaN if there is none."""
        if measure == "rise by noise":
            return self._rise()
        if measure in MIDWAY:
            places, rises = self.curve(MIDWAY[measure])
            return float(np.interp(0.5, places, rises)) if len(places) else float("nan")
        if measure == OUTCOME and self.bits == "float":
            measure = "accuracy, average"  # what a merge in full precision is
        found = self.numbers.get(measure, {})
        most = max((name.count("+") for name in found), default=0)
        chosen = [v for name, v in found.items() if not measure.startswith("accuracy") or name.count("+") == most]
        return float(np.mean(chosen)) if chosen else float("nan")

    def curve(self, measure: str) -> np.ndarray:
        """The loss between two models less the mean of both ends, mean over pairs: λ and rise, (2, points)."""
        pairs = [np.array(sorted(points))[:, [0, 2]].T for points in self.grids.get(measure, {}).values()]
        rises = [losses - (losses[0] + losses[-1]) / 2 for _, losses in pairs]
        return np.stack([pairs[0][0], np.mean(rises, 0)]) if pairs else np.empty((2, 0))

    def _rise(self) -> float:
        """How much the noise of quantization raises the loss of the models themselves: ``L(θ + ε) − L(θ)``."""
        ends = []
        for pair, points in self.grids.get("noisy loss between", {}).items():
            still = sorted(self.grids["loss between"][pair])
            ends += [sorted(points)[k][2] - still[k][2] for k in (0, -1)]
        return float(np.mean(ends)) if ends else float("nan")

    @property
    def plain(self) -> bool:
        """Whether it is a way of the table."""
        return not self.knobs and self.iterations == ITERATIONS


def read(path: Path) -> list[Run]:
    """The runs of a CSV.

    Raises:
        ValueError: a row lacks a column, or cannot be read.
    """
    runs: dict[tuple, Run] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for number, row in enumerate(csv.DictReader(file), start=2):
            try:
                key = (
                    row["task"],
                    int(row["network"]),
                    row["method"],
                    row["bits"],
                    int(row["iterations"]),
                    row["knobs"],
                )
                run = runs.setdefault(key, Run(*key[:5], json.loads(row["knobs"])))
                value, measure, domains = float(row["value"]), row["measure"], row["domains"]
                if row["x"] == "":
                    run.numbers.setdefault(measure, {})[domains] = value
                else:
                    place = (float(row["x"]), float(row["y"] or 0), value)
                    run.grids.setdefault(measure, {}).setdefault(domains, []).append(place)
            except (KeyError, ValueError, TypeError) as error:
                raise ValueError(
                    f"line {number} of {path} must be a row of hdrq reproduce landscape, got {error}"
                ) from error
    found = sorted(runs.values(), key=lambda run: (list(METHODS).index(run.method), run.network))
    return sorted(found, key=lambda run: run.bits, reverse=True)  # full precision first, then the widest


# --- means and rank correlations, with intervals of 95% over networks


class Interval(NamedTuple):
    """A number and where the bootstrap over networks has it; NaN where there is one network."""

    value: float
    low: float
    high: float

    def text(self, digits: int = 3) -> str:
        """The value, and the interval if there is one."""
        if np.isnan(self.value):
            return ""
        value, *bounds = (f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.{digits}g}" for x in self)
        return value if np.isnan(self.low) else f"{value} [{', '.join(bounds)}]"


def over_networks(runs: Sequence[Run], number: Callable[[Sequence[Run]], float]) -> Interval:
    """A number of runs, and its interval from samples of networks, with replacement, each with all of its runs."""
    networks = sorted({run.network for run in runs})
    value = number(runs)
    if len(networks) < 2 or np.isnan(value):
        return Interval(value, float("nan"), float("nan"))
    own = {network: [run for run in runs if run.network == network] for network in networks}
    drawn = np.random.default_rng(0).choice(networks, (SAMPLES, len(networks)))
    kinds, which = np.unique(np.sort(drawn, 1), axis=0, return_inverse=True)  # of few networks, many are alike
    samples = np.array([number([run for network in each for run in own[network]]) for each in kinds.tolist()])
    return Interval(value, *(float(v) for v in np.nanquantile(samples[which.ravel()], (0.025, 0.975))))


def mean_of(measure: str) -> Callable[[Sequence[Run]], float]:
    """The mean over runs of a measure, for :func:`over_networks`."""
    return lambda runs: float(np.mean([run.mean(measure) for run in runs]))


def rank_correlation(measure: str) -> Callable[[Sequence[Run]], float]:
    """Spearman's rank correlation over runs of a measure with the accuracy of the merge of all targets."""
    return lambda runs: _spearman([run.mean(measure) for run in runs], [run.mean(OUTCOME) for run in runs])


def correlation_among_methods(measure: str) -> Callable[[Sequence[Run]], float]:
    """:func:`rank_correlation` among the methods of one network at one bit width, mean over both.

    What networks and bit widths do to both sides alike has no part in it.
    """

    def number(runs: Sequence[Run]) -> float:
        groups: dict[tuple, list[Run]] = {}
        for run in runs:
            groups.setdefault((run.network, run.bits), []).append(run)
        found = [rank_correlation(measure)(group) for group in groups.values()]
        return float(np.nanmean(found)) if not np.isnan(found).all() else float("nan")

    return number


def _spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """NaN of fewer than three pairs, or where one side is all alike."""
    from scipy.stats import spearmanr

    known = ~np.isnan(x) & ~np.isnan(y)
    a, b = np.asarray(x)[known], np.asarray(y)[known]
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(spearmanr(a, b).statistic)
