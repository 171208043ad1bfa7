"""Two tasks that differ in how their networks were trained alone: what that is worth to every method and rule."""

from __future__ import annotations

from pathlib import Path

from hdrq.checkpoint.files import write_atomically
from hdrq.reproduce.protocol import BITS, TABLE
from hdrq.reproduce.render import BASELINE, found_of, paired
from hdrq.reproduce.statistics import Estimate, Results, estimate, holm, read

PLAINEST = "RTN"
RULES = ("nearest", "systematic")
PAIRS = [(method, method) for method in TABLE] + [(PLAINEST, BASELINE)]


def render_between(rows: Path, others: Path, folder: Path) -> str:
    """Write ``between.md``, the rows of one CSV less those of another, paired by seeds and test images; the text.

    Raises:
        ValueError: a CSV is not one of ``hdrq reproduce``, or has rows of several tasks, or of other domains.
    """
    ours, theirs = read(rows), read(others)
    names = [_only_task(results, path) for results, path in ((ours, rows), (theirs, others))]
    domains = {way.domains for way in ours} & {way.domains for way in theirs}
    if not domains:
        raise ValueError(f"rows must be of the domains of {others}, got none of them in {rows}")
    parts = [f"## {names[0]}, less {names[1]}"]
    parts += [text for bits in BITS if (text := _table(ours, theirs, sorted(domains), bits))]
    text = "\n\n".join(parts) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "between.md", text)
    return text


def _only_task(results: Results, path: Path) -> str:
    tasks = {way.task for way in results}
    if len(tasks) != 1:
        raise ValueError(f"rows must be of one task to be compared, got {', '.join(sorted(tasks)) or 'none'} in {path}")
    return tasks.pop()


def _table(ours: Results, theirs: Results, domains: list[str], bits: str) -> str:
    """A row for each method: its mean, and its gain, of single models, of pairs and of all, by each rule."""
    counts = sorted({names.count("+") for names in domains})
    kinds = [(counts[0], "")] + [(count, rule) for count in sorted({1, counts[-1]}) if count for rule in RULES]
    gains: dict[tuple[str, int], tuple[Estimate, Estimate]] = {}
    labels = []
    for own, other in PAIRS:
        labels.append(label := own if own == other else f"{own}, less {other} there")
        for place, (count, rule) in enumerate(kinds):
            chosen = [names for names in domains if names.count("+") == count]
            shared = paired(found_of(ours, own, bits, chosen, rule), found_of(theirs, other, bits, chosen, rule))
            if shared is not None:
                gains[label, place] = estimate(shared[0]), estimate(*shared)
    if not any(label != "full precision" for label, _ in gains):
        return ""
    corrected = dict(zip(gains, holm(gain.p for _, gain in gains.values()), strict=True))
    named = {0: "single", 1: "pairs", counts[-1]: "all targets"}
    heads = [f"{named[count]}{f', {rule}' if rule else ''}" for count, rule in kinds]
    seeds = next(iter(gains.values()))[0].seeds
    lines = [f"| {seeds} seeds, {bits} | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for label in labels:
        cells = []
        for place in range(len(kinds)):
            one, gain = gains.get((label, place), (None, None))
            cells.append("" if one is None else f"{one.mean:.1f}: {gain}, p {corrected[label, place]:.3f}")
        if any(cells):
            lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(["**Harmonic means (%): gains in points; p corrected by Holm**", "", *lines])
