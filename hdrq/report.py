"""Tables and figures of a run, for a terminal and for files."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from hdrq.evaluate import harmonic_mean
from hdrq.parity import Report


@dataclass(frozen=True)
class Row:
    """One way to merge: its accuracy on each domain, in percent."""

    method: str
    accuracies: dict[str, float]

    @property
    def harmonic_mean(self) -> float:
        return harmonic_mean(self.accuracies.values())


def table(rows: Sequence[Row], title: str):
    """The rows as a :class:`rich.table.Table`."""
    from rich.table import Table

    result = Table(title=title)
    result.add_column("model")
    for domain in rows[0].accuracies:
        result.add_column(domain, justify="right")
    result.add_column("harmonic mean", justify="right", style="bold")
    for row in rows:
        result.add_row(row.method, *(f"{v:.1f}" for v in row.accuracies.values()), f"{row.harmonic_mean:.1f}")
    return result


def parity_table(report: Report):
    """What :func:`hdrq.parity.check` compared, as a :class:`rich.table.Table`."""
    from rich.table import Table

    result = Table(box=None, title=f"Against the reference, seed {report.seed}, {report.seconds:.0f} s")
    for name in ("op", "backend"):
        result.add_column(name, no_wrap=True)
    for name in ("cases", "elements", "sums", "error"):
        result.add_column(name, justify="right")
    result.add_column("")
    for t in report.tallies:
        counts = f"{t.cases:,}", f"{t.elements:,}", f"{t.sums:,}", f"{t.error:.1e}" if t.sums else ""
        result.add_row(t.op, t.backend, *counts, "[red]differs[/red]" if t.mismatch else "equal")
    return result


def write_rows(rows: Sequence[Row], folder: Path, facts: dict) -> None:
    """``table.csv``, and ``table.json`` with ``facts`` (settings, versions) beside the rows."""
    with open(folder / "table.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["method", *rows[0].accuracies, "harmonic_mean"])
        for row in rows:
            writer.writerow([row.method, *(f"{v:.2f}" for v in (*row.accuracies.values(), row.harmonic_mean))])
    records = [{**asdict(row), "harmonic_mean": row.harmonic_mean} for row in rows]
    (folder / "table.json").write_text(json.dumps({**facts, "rows": records}, indent=2) + "\n")


def write_bars(rows: Sequence[Row], path: Path, title: str) -> None:
    """A figure of the accuracies: a group of bars for each domain and one for the harmonic mean."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = [*rows[0].accuracies, "harmonic mean"]
    width = 0.8 / len(rows)
    figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
    for i, row in enumerate(rows):
        heights = [*row.accuracies.values(), row.harmonic_mean]
        bars = axes.bar([g + i * width for g in range(len(groups))], heights, width, label=row.method)
        axes.bar_label(bars, fmt="%.1f", fontsize=7)
    axes.set_xticks([g + width * (len(rows) - 1) / 2 for g in range(len(groups))], groups)
    axes.set_ylabel("accuracy (%)")
    axes.set_title(title)
    axes.legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
