"""What a run found: its numbers, and tables and figures of them, for a terminal and for files."""

from __future__ import annotations

import csv
import json
import resource
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import nn

from hdrq.evaluate import harmonic_mean
from hdrq.parity import Report
from hdrq.readiness import FAR, TOO_FAR, Readiness


@dataclass(frozen=True)
class Row:
    """One way to merge: its accuracy on each domain, in percent."""

    method: str
    accuracies: dict[str, float]

    @property
    def harmonic_mean(self) -> float:
        return harmonic_mean(self.accuracies.values())


@dataclass(frozen=True)
class BlockReport:
    """One block: its reconstruction loss on the first calibration samples, and the seconds it took."""

    name: str
    loss_before: float  # rounded to nearest, its inputs quantized
    loss_after: float
    seconds: float


@dataclass
class RunReport:
    """How a model was quantized.

    ``errors`` are ``‖y_q − y‖² / ‖y‖²`` of each block's output y, and of the model's (``"output"``), on data held out,
    what comes before being quantized too; ``nearest`` is the same for rounding to nearest, before anything was learned.
    """

    recipe: str
    blocks: list[BlockReport] = field(default_factory=list)
    losses: list[tuple[str, int, float]] = field(default_factory=list)  # block, iteration, reconstruction loss
    errors: dict[str, float] = field(default_factory=dict)
    nearest: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    peak_memory: dict[str, int] = field(default_factory=dict)  # bytes, of the process and of the device
    attention: dict[str, list[str]] = field(default_factory=dict)  # quantized operands: q, k, v, softmax
    cache_peak: dict[str, int] = field(default_factory=dict)  # bytes of blocks' inputs and targets, for each tier


def report_of(model: nn.Module) -> RunReport:
    """The report of the run that made a model.

    Raises:
        ValueError: the model was not made by :func:`hdrq.quantize` in this process.
    """
    report = model.__dict__.get("hdrq_report")
    if report is None:
        raise ValueError("model must be the result of hdrq.quantize, got one without a report")
    return report


def set_report(model: nn.Module, report: RunReport) -> None:
    """Keep a report with the model that it is about."""
    model.__dict__["hdrq_report"] = report


def peak_memory(device: torch.device) -> dict[str, int]:
    """The most bytes that this process held so far, on the host and on a CUDA device."""
    peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if device.type == "cuda":
        peak["device"] = torch.cuda.max_memory_allocated(device)
    return peak


def table(rows: Sequence[Row], title: str):
    """The rows as a :class:`rich.table.Table`."""
    from rich.markup import escape
    from rich.table import Table

    result = Table(title=title)
    result.add_column("model")
    for domain in rows[0].accuracies:
        result.add_column(escape(domain), justify="right")
    result.add_column("harmonic mean", justify="right", style="bold")
    for row in rows:
        result.add_row(escape(row.method), *(f"{v:.1f}" for v in row.accuracies.values()), f"{row.harmonic_mean:.1f}")
    return result


def errors_table(reports: Mapping[str, RunReport], title: str):
    """The accumulated errors of runs on data held out, as a :class:`rich.table.Table`; of one run losses too."""
    from rich.markup import escape
    from rich.table import Table

    first = next(iter(reports.values()))
    columns: dict[str, dict[str, str]] = {}
    if len(reports) == 1:
        columns["loss"] = {b.name: f"{b.loss_before:.3g} → {b.loss_after:.3g}" for b in first.blocks}
    columns["nearest"] = {name: f"{error:.3g}" for name, error in first.nearest.items()}
    for name, report in reports.items():
        columns[name] = {block: f"{error:.3g}" for block, error in report.errors.items()}
    columns = {name: cells for name, cells in columns.items() if cells}
    result = Table(title=title)
    result.add_column("block")
    for name in columns:
        result.add_column(name, justify="right")
    for block in dict.fromkeys(block for cells in columns.values() for block in cells):
        result.add_row(escape(block), *(cells.get(block, "") for cells in columns.values()))
    return result


def write_losses(losses: Sequence[tuple[str, int, float]], path: Path) -> None:
    """A figure: each block's reconstruction loss while it was learned."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
    for block in dict.fromkeys(name for name, *_ in losses):
        points = [(iteration, loss) for name, iteration, loss in losses if name == block]
        axes.plot(*zip(*points, strict=True), marker=".", label=block)
    axes.set(xlabel="iteration", ylabel="reconstruction loss", yscale="log")
    axes.legend(fontsize=6, ncols=2)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


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


def readiness_table(readiness: Readiness):
    """How well each layer merges, as a :class:`rich.table.Table`."""
    from rich.markup import escape
    from rich.table import Table

    result = Table(box=None, title="Merge readiness")
    result.add_column("layer")
    for name in ("weights", "ambiguous", "ties", "scale ratio", "distance", "in steps", "cosine", "clipped", "error"):
        result.add_column(name, justify="right")
    for layer in (*readiness.layers, readiness.total):
        result.add_row(
            escape(layer.name),
            f"{layer.elements:,}",
            f"{layer.ambiguous:.1%}",
            f"{layer.ties:.1%}",
            f"{layer.scale_ratio:.2f}",
            f"{layer.distance:.2f}",
            f"{layer.steps_apart:.2f}",
            f"{layer.lowest_cosine:.2f}–{layer.highest_cosine:.2f}",
            f"{layer.clipped:.1%}",
            f"{layer.rounding_error:.2f}",
        )
    return result


def plot_readiness(readiness: Readiness, path: Path) -> None:
    """A figure of how well each layer merges: what is ambiguous, scales, distances and the cosines of draws."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    layers = readiness.layers
    x = range(len(layers))

    def values(field: str) -> list[float]:
        return [getattr(layer, field) for layer in layers]

    size = (max(8, 0.25 * len(layers)), 10)
    figure, (share, scale, distance, steps, cosine) = pyplot.subplots(
        5, sharex=True, figsize=size, layout="constrained"
    )
    share.bar(x, [100 * v for v in values("ambiguous")], color="C0", label="ambiguous")
    share.bar(x, [100 * v for v in values("ties")], color="C1", width=0.4, label="ties")
    share.set(ylabel="weights (%)", ylim=(0, 100))
    scale.plot(x, values("scale_ratio"), "C0o", label="worst channel")
    scale.plot(x, values("mean_scale_ratio"), "C1_", markersize=10, label="mean over channels")
    scale.set(ylabel="scale ratio", ylim=(0.9, 1.1 * max(2, *values("scale_ratio"))))
    distance.bar(x, values("distance"), color="C0")
    distance.axhline(FAR, color="C1", label="needs care")
    distance.axhline(TOO_FAR, color="C3", label="fails")
    distance.set(ylabel="distance / norm")
    steps.plot(x, values("steps_apart"), "C0o")
    steps.axhline(6**-0.5, color="C1", label="one model,\nrounded twice")  # two errors of variance 1/12
    steps.set_yscale("symlog", linthresh=1)
    steps.set(ylabel="distance / step", ylim=(0, 1.5 * max(1, *values("steps_apart"))))
    cosine.vlines(x, values("lowest_cosine"), values("highest_cosine"), color="C0", linewidth=4, label="draws")
    cosine.plot(x, values("kept_cosine"), "C1_", markersize=10, label="kept")
    cosine.set(ylabel="cosine", ylim=(min(0.5, *values("lowest_cosine")), 1.02))
    cosine.set_xticks(x, [layer.name for layer in layers], rotation=90, fontsize=7)
    for axes in (share, scale, distance, steps, cosine):
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8)
    figure.suptitle(readiness.verdict, fontsize=10, wrap=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def write_rows(rows: Sequence[Row], folder: Path, facts: dict) -> None:
    """``table.csv``, and ``table.json`` with ``facts`` (settings, versions) beside the rows."""
    with open(folder / "table.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["method", *rows[0].accuracies, "harmonic_mean"])
        for row in rows:
            writer.writerow([row.method, *(f"{v:.2f}" for v in (*row.accuracies.values(), row.harmonic_mean))])
    (folder / "table.json").write_text(json.dumps({**facts, "rows": records(rows)}, indent=2) + "\n")


def records(rows: Sequence[Row]) -> list[dict]:
    """The rows as JSON has them."""
    return [{**asdict(row), "harmonic_mean": row.harmonic_mean} for row in rows]


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
