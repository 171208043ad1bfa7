"""Tables in Markdown and figures, from the rows of runs alone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from hdrq.checkpoint.files import write_atomically
from hdrq.reproduce import figures
from hdrq.reproduce.measures import measures_of
from hdrq.reproduce.protocol import BITS, ITERATIONS, METHODS, RULE_SETS, RULES, STUDIES, TABLE, Study
from hdrq.reproduce.statistics import Estimate, Results, Way, estimate, holm, read

BASELINE = "QDrop"
SHOWN = ("nearest", "noise, best of 30", "systematic")  # rules of the merge, in the tables of studies


def render(rows: Path, folder: Path) -> str:
    """Write ``tables.md`` and figures of the rows in a CSV, and return the tables.

    Raises:
        ValueError: the CSV is not one of ``hdrq reproduce``.
    """
    results = read(rows)
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for task in dict.fromkeys(way.task for way in results):
        own = {way: found for way, found in results.items() if way.task == task}
        parts.append(f"## {task}\n\n" + "\n\n".join(_tables(own)))
        figure(own, folder / f"{task}-bits.png", task)
    text = "\n\n".join(parts) + "\n"
    write_atomically(folder / "tables.md", text)
    return text


def _tables(results: Results) -> list[str]:
    """The tables of one task, of those ways that have rows."""
    domains = sorted({way.domains for way in results}, key=lambda names: names.count("+"))
    counts = sorted({names.count("+") for names in domains})
    kinds = {count: [names for names in domains if names.count("+") == count] for count in counts}
    named = {0: "single models, mean over targets", 1: "pairs, mean over pairs", max(counts): "all targets"}
    tables, of = [], _measured(results)
    for count in counts:
        for rule in [""] if count == 0 else RULES:
            lines = _by_bits(results, TABLE, kinds[count], rule)
            if lines:
                title = f"{named.get(count, f'{count + 1} targets')}{f', merged: {rule}' if rule else ''}"
                tables.append(_titled(f"Harmonic mean of {of} (%), {title}", lines))
        if lines := _differences(results, kinds[count], "systematic" if count else ""):
            tables.append(_titled(f"Less {BASELINE}, in points; p corrected by Holm; {named.get(count, '')}", lines))
    learned = [(method, bits) for method in TABLE if METHODS[method].learned for bits in BITS]
    compared = [("Rules of the merge, less nearest", "methods that learn", learned, RULES, "nearest")]
    for study in STUDIES.values():
        if study.rules != "table":
            ways = [(method, bits) for method in study.methods for bits in study.bits]
            over = f"{' and '.join(study.methods)} at {', '.join(study.bits)}"
            compared.append(
                (f"{study.question}, less systematic, tau 0.1", over, ways, RULE_SETS[study.rules], "systematic")
            )
    for what, over, ways, rules, first in compared:
        for count in counts[1:]:
            if lines := _rules(results, kinds[count], ways, rules, first):
                tables.append(_titled(f"{what}, {named.get(count, f'{count + 1} targets')}, mean over {over}", lines))
    for study in STUDIES.values():
        for bits in study.bits if study.beside else ():
            if lines := _study(results, study, bits, kinds):
                tables.append(_titled(f"{study.question}: {bits}", lines))
    return tables


def _measured(results: Results) -> str:
    """What the means of one task are of."""
    values = next(iter(next(iter(next(iter(results.values())).values())).values()))
    return measures_of(values)


def _titled(title: str, lines: Sequence[str]) -> str:
    return f"**{title}**\n\n" + "\n".join(lines)


def found_of(
    results: Results,
    method: str,
    bits: str,
    domains: Iterable[str],
    rule: str,
    iterations: int = ITERATIONS,
    knobs: str = "{}",
) -> list[dict]:
    """The rows of a method for each set of domains; empty if one has none."""
    found = []
    for names in domains:
        full = method == "full precision"
        own = "" if "+" not in names else "average" if full else rule
        task = next(iter(results)).task
        way = Way(task, method, "float" if full else bits, str(iterations), knobs, own, names)
        if way not in results:
            return []
        found.append(results[way])
    return found


def _by_bits(results: Results, methods: Sequence[str], domains: Sequence[str], rule: str) -> list[str]:
    """A row for each method, a column for each bit width: mean and interval."""
    body = []
    seeds: set[int] = set()
    for method in methods:
        cells = []
        for bits in BITS:
            found = found_of(results, method, bits, domains, rule)
            cells.append(str(one := estimate(found)) if found else "")
            seeds |= {one.seeds} if found else set()
        if any(cells):
            body.append(f"| {method} | {' | '.join(cells)} |")
    if not body:
        return []
    return [
        f"| seeds: {', '.join(map(str, sorted(seeds)))} | {' | '.join(BITS)} |",
        "|---" * (len(BITS) + 1) + "|",
        *body,
    ]


def _differences(results: Results, domains: Sequence[str], rule: str) -> list[str]:
    """Each method less the baseline, at every bit width, paired by seeds and images."""
    found: dict[tuple[str, str], Estimate] = {}
    for method in (m for m in TABLE if m not in ("full precision", BASELINE)):
        for bits in BITS:
            ours, theirs = (found_of(results, name, bits, domains, rule) for name in (method, BASELINE))
            shared = paired(ours, theirs)
            if shared:
                found[method, bits] = estimate(*shared)
    if not found:
        return []
    corrected = dict(zip(found, holm(one.p for one in found.values()), strict=True))
    lines = [f"| | {' | '.join(BITS)} |", "|---" * (len(BITS) + 1) + "|"]
    for method in dict.fromkeys(method for method, _ in found):
        cells = [
            f"{found[method, bits]}, p {corrected[method, bits]:.3f}" if (method, bits) in found else ""
            for bits in BITS
        ]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return lines


def _study(results: Results, study: Study, bits: str, kinds: dict[int, list[str]]) -> list[str]:
    """A row for each way of a study: harmonic means of single models and of merges, and what it gains over the first.

    All have the seeds alone that every row has.
    """
    beside = [(method, method, ITERATIONS, "{}") for method in study.beside]
    own = [
        (_label(method, knobs, study), method, study.iterations, json.dumps(knobs, sort_keys=True))
        for method in study.methods
        for knobs in study.knobs
    ]
    columns = [(0, "")] + [(count, rule) for count in sorted({1, max(kinds)}) if count for rule in SHOWN]
    found: dict[str, list[list[dict]]] = {}
    for label, method, iterations, knobs in (*beside, *own):
        each = [found_of(results, method, bits, kinds[count], rule, iterations, knobs) for count, rule in columns]
        if all(each):
            found[label] = each
    if len(found) < 2 or beside[0][0] not in found or set(found) <= {label for label, *_ in beside}:
        return []
    seeds = set.intersection(*(set(one) for each in found.values() for ways in each for one in ways))
    if not seeds:
        return []
    cut = {
        label: [[{seed: one[seed] for seed in seeds} for one in ways] for ways in each] for label, each in found.items()
    }
    first = next(iter(cut.values()))
    named = {0: "single", 1: "pairs", max(kinds): "all"}
    heads = [f"{named[count]}{f', {rule}' if rule else ''}" for count, rule in columns]
    compared = [k for k, (count, rule) in enumerate(columns) if count and rule == SHOWN[-1]]
    heads += [f"{named[columns[k][0]]}, {SHOWN[-1]}, less the first" for k in compared]
    lines = [f"| seeds: {', '.join(map(str, sorted(seeds)))} | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for label, each in cut.items():
        cells = [f"{estimate(ways).mean:.1f}" for ways in each]
        cells += ["" if each is first else str(estimate(each[k], first[k])) for k in compared]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return lines


def _label(method: str, knobs: dict, study: Study) -> str:
    parts = [f"{name}={value}" for name, value in knobs.items()]
    parts += [f"{study.iterations} iterations"] if study.iterations != ITERATIONS else []
    return ", ".join([method, *parts])


def _rules(
    results: Results, domains: Sequence[str], ways: Sequence[tuple[str, str]], rules: Iterable[str], first: str
) -> list[str]:
    """Each rule less the first, over all ways, of a method and a bit width each, together."""
    lines = []
    for rule in rules:
        ours, theirs = [], []
        for method, bits in ways:
            ours += found_of(results, method, bits, domains, rule)
            theirs += found_of(results, method, bits, domains, first)
        shared = paired(ours, theirs)
        if rule != first and shared:
            lines.append(f"| {rule} | {estimate(*shared)} |")
    return ["| rule | |", "|---|---|", *lines] if lines else []


def paired(ours: Sequence[dict], theirs: Sequence[dict]) -> tuple[list[dict], list[dict]] | None:
    """Both with the seeds alone that all have."""
    if not ours or not theirs:
        return None
    seeds = set.intersection(*(set(each) for each in (*ours, *theirs)))
    if not seeds:
        return None
    ours, theirs = ([{seed: found[seed] for seed in seeds} for found in side] for side in (ours, theirs))
    return ours, theirs


def figure(results: Results, path: Path, task: str) -> None:
    """Merged accuracy against bits, a line for each method, with intervals; PNG, and SVG beside it."""
    drawing = figures.blank(6, 4)
    axes = drawing.subplots()
    most = max((way.domains for way in results), key=lambda names: names.count("+"))
    for k, method in enumerate(m for m in TABLE if m != "full precision"):
        points = [
            (i, estimate(found))
            for i, b in enumerate(BITS)
            if (found := found_of(results, method, b, [most], "systematic"))
        ]
        if points:
            x = [i + 0.06 * (k - 2) for i, _ in points]
            y = [one.mean for _, one in points]
            bars = [[one.mean - one.low for _, one in points], [one.high - one.mean for _, one in points]]
            axes.errorbar(x, y, bars, marker="o", capsize=2, label=method, color=figures.colour(method))
    if found := found_of(results, "full precision", "", [most], ""):
        axes.axhline(estimate(found).mean, color="black", linestyle=":", label="full precision, average")
    axes.set(
        xticks=range(len(BITS)),
        xticklabels=BITS,
        ylabel=f"harmonic mean of {_measured(results)} (%)",
        title=f"{task}: all targets merged",
    )
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figures.save(drawing, path)
