"""Means over seeds with intervals, and paired differences, by a bootstrap over networks and test images."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hdrq.reproduce.measures import decoded, score

SAMPLES = 2000  # of the bootstrap
LEVEL = 0.95


class Way(NamedTuple):
    """What a row is of, but for the seed of its networks."""

    task: str
    method: str
    bits: str
    iterations: str
    knobs: str
    rule: str
    domains: str


Found = dict[str, np.ndarray]  # by domain: what test images contribute
Results = dict[Way, dict[int, Found]]  # by the seed of the networks


@dataclass(frozen=True)
class Estimate:
    """A mean, or a difference of means, in points, and its interval of 95%."""

    mean: float
    low: float
    high: float
    seeds: int
    p: float = 1.0  # of a difference: two-sided, from the bootstrap

    def __str__(self) -> str:
        return f"{self.mean:.1f} [{self.low:.1f}, {self.high:.1f}]"


def read(path: Path) -> Results:
    """The rows of a CSV.

    Raises:
        ValueError: a row lacks a column, or cannot be read; rows of one seed are of other networks, and no pairs.
    """
    results: Results = {}
    networks: dict[tuple[str, str], str] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for number, row in enumerate(csv.DictReader(file), start=2):
            try:
                way = Way(*(row[name] for name in Way._fields))
                found = {domain: decoded(text) for domain, text in json.loads(row["correct"]).items()}
                results.setdefault(way, {})[int(row["network"])] = found
                own = row.get("networks") or ""  # older rows have none
                if networks.setdefault((way.task, row["network"]), own) != own:
                    raise ValueError(f"other networks of seed {row['network']} than rows before it")
            except (KeyError, ValueError, TypeError) as error:
                raise ValueError(f"line {number} of {path} must be a row of hdrq reproduce, got {error}") from error
    return results


def estimate(models: Sequence[Mapping[int, Found]], others: Sequence[Mapping[int, Found]] = ()) -> Estimate:
    """The mean over ways and seeds of the harmonic mean over domains; less that of ``others``, if there are any.

    Each sample of the bootstrap draws as many seeds as there are, with replacement, and as many test images of every
    domain, or groups of images, the same for all ways and seeds. Domains of equally many have the same ones drawn:
    those of one task may show the same digits.

    Args:
        models: rows by seed, of one way or several (such as all pairs of domains), all with the same seeds.
        others: the same of what is compared with.

    Raises:
        ValueError: no seeds, or others than those that are compared with.
    """
    ways = [*models, *others]
    seeds = sorted(ways[0])
    if not seeds or any(sorted(way) != seeds for way in ways):
        raise ValueError(f"seeds must be the same of all that is compared, got {[sorted(way) for way in ways]}")
    chosen = np.random.default_rng(0).integers(len(seeds), size=(SAMPLES, len(seeds)))
    sign = [1 / len(models)] * len(models) + [-1 / max(len(others), 1)] * len(others)
    mean, samples = 0.0, np.zeros(SAMPLES)
    for way, factor in zip(ways, sign, strict=True):
        exact, resampled = [], []
        for seed in seeds:
            found = way[seed].values()
            exact.append(_harmonic([score(values) for values in found]))
            resampled.append(_harmonic([score(values, _shares(len(values))) for values in found]))
        mean += factor * float(np.mean(exact))
        samples += factor * np.stack(resampled, 1)[np.arange(SAMPLES)[:, None], chosen].mean(1)
    low, high = np.quantile(samples, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    below = float((samples <= 0).mean())
    p = min(1.0, 2 * max(min(below, float((samples >= 0).mean())), 1 / SAMPLES)) if others else 1.0
    return Estimate(100 * mean, 100 * float(low), 100 * float(high), len(seeds), p)


def holm(values: Iterable[float]) -> list[float]:
    """P-values corrected for their number (Holm, Scandinavian Journal of Statistics, 1979)."""
    values = list(values)
    corrected, running = [0.0] * len(values), 0.0
    for rank, index in enumerate(np.argsort(values, kind="stable")):
        running = max(running, min(1.0, (len(values) - rank) * values[index]))
        corrected[index] = running
    return corrected


@cache
def _shares(count: int) -> np.ndarray:
    """The share that each of so many images has in each sample, (SAMPLES, count)."""
    drawn = np.random.default_rng(count).integers(count, size=(SAMPLES, count))
    return np.stack([np.bincount(row, minlength=count) for row in drawn]).astype(np.float32) / count


def _harmonic(scores: Sequence) -> np.ndarray:
    """The harmonic mean of scores, 0 where one is 0."""
    stacked = np.stack([np.asarray(a, np.float64) for a in scores])
    with np.errstate(divide="ignore"):
        return np.where((stacked > 0).all(0), len(stacked) / (1 / stacked).sum(0), 0.0)
