"""Tables of training with one domain left out, from the rows of :mod:`hdrq.reproduce.sharpness` alone."""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from hdrq.reproduce.leave_one_out import ARMS, FOLDED
from hdrq.reproduce.measures import decoded
from hdrq.reproduce.sharpness import START
from hdrq.reproduce.statistics import LEVEL, SAMPLES, Found, estimate

BASELINE = "LSQ"
Place = tuple[str, int]  # the domain that was left out, and the seed
Arms = dict[str, dict[Place, dict[str, str]]]  # by arm and place, a value for each measure
FLOAT = "float"  # the bits of arms that stay in full precision


def tables(path: Path) -> str:
    """Accuracies in and out of domain, and curvature beside that of training in float, in Markdown.

    There are tables for each task and bit width. Only seeds that all arms have with every domain left out are taken.

    Raises:
        ValueError: the CSV is none of :mod:`hdrq.reproduce.sharpness`, or nothing in it is had by all arms.
    """
    found = _read(path)
    parts = []
    for task, bits in found:
        if bits != FLOAT:
            arms = found.get((task, FLOAT), {}) | found[task, bits]
            parts.append(f"## {task}, {bits}\n\n{_tables(_shared(arms, path))}")
    return "\n".join(parts)


def _tables(arms: Arms) -> str:
    seeds = sorted({seed for _, seed in next(iter(arms.values()))})
    heads = (f"seeds: {', '.join(map(str, seeds))}", "in domain", f"less {BASELINE}", "left out", f"less {BASELINE}")
    accuracies = []
    for arm in arms:
        cells = [arm]
        for inside in (True, False):
            ours, theirs = (_ways(arms[name], inside) for name in (arm, BASELINE))
            cells += [str(estimate(ours)), "" if arm == BASELINE else str(estimate(ours, theirs))]
        accuracies.append(cells)
    measures = [name for name in next(iter(arms[BASELINE].values())) if name != "correct"]
    bases = [FOLDED if all(name in own for own in arms[FOLDED].values()) else BASELINE for name in measures]
    columns = list(zip(measures, bases, strict=True))
    curvature = [[arm, *(_ratio(arms[arm], arms[base], name) for name, base in columns)] for arm in arms]
    curvature.append(["what 1 is", *(f"{_level(arms[base], name)}, {base}" for name, base in columns)])
    first = "Accuracy (%), mean over the domains left out in turn; in domain, harmonic mean of the others"
    return (
        f"**{first}**\n\n{_table(heads, accuracies)}\n\n"
        f"**Ratios, geometric mean over domains and seeds**\n\n{_table(('', *measures), curvature)}\n"
    )


def _read(path: Path) -> dict[tuple[str, str], Arms]:
    """The rows, by task and bits."""
    found: dict[tuple[str, str], Arms] = {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                places = found.setdefault((row["task"], row["bits"]), {}).setdefault(row["arm"], {})
                places.setdefault((row["target"], int(row["seed"])), {})[row["measure"]] = row["value"]
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path} must have rows of hdrq.reproduce.sharpness, got {error}") from error
    return found


def _shared(found: Arms, path: Path) -> Arms:
    """What all arms have, in the order of the arms, after what they start from."""
    shared = set.intersection(*map(set, found.values())) if {BASELINE, FOLDED} <= found.keys() else set()
    targets = {target for target, _ in set().union(*found.values())}
    whole = [place for place in sorted(shared) if targets == {target for target, seed in shared if seed == place[1]}]
    if not whole:
        raise ValueError(f"{path} must have {BASELINE} and {FOLDED} of a seed, for every domain, got {sorted(found)}")
    return {arm: {place: found[arm][place] for place in whole} for arm in (START, *ARMS) if arm in found}


def _ways(places: Mapping[Place, Mapping[str, str]], inside: bool) -> list[dict[int, Found]]:
    """For each domain left out, by seed, what test images of that domain, or of all others, contribute."""
    ways: dict[str, dict[int, Found]] = defaultdict(dict)
    for (target, seed), own in places.items():
        found = {domain: decoded(text) for domain, text in json.loads(own["correct"]).items()}
        ways[target][seed] = {domain: values for domain, values in found.items() if (domain != target) == inside}
    return list(ways.values())


def _level(places: Mapping[Place, Mapping[str, str]], measure: str) -> str:
    return f"{np.exp(np.mean([np.log(float(own[measure])) for own in places.values()])):.3g}"


def _ratio(places: Mapping[Place, Mapping[str, str]], others: Mapping[Place, Mapping[str, str]], measure: str) -> str:
    """With its interval, by a bootstrap over seeds, all domains of a seed together; empty where one is not positive."""
    by_seed: dict[int, list[float]] = defaultdict(list)
    for place, own in places.items():
        ours, theirs = (float(each.get(measure, "nan")) for each in (own, others[place]))
        by_seed[place[1]].append(float(np.log(ours / theirs)) if ours > 0 and theirs > 0 else np.nan)
    means = np.array([np.mean(each) for each in by_seed.values()])
    if np.isnan(means).any() or places is others:
        return "1" if places is others else ""
    drawn = np.random.default_rng(0).integers(len(means), size=(SAMPLES, len(means)))
    low, high = np.exp(np.quantile(means[drawn].mean(1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2]))
    return f"{np.exp(means.mean()):.2f} [{low:.2f}, {high:.2f}]"


def _table(heads, rows) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
