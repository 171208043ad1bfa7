"""Tables for a terminal and for files."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from hdrq.calibrate.report import RunReport
from hdrq.checkpoint.files import write_atomically
from hdrq.checkpoint.inspection import Contents
from hdrq.checks import plain
from hdrq.evaluate.metrics import IoURow, Row
from hdrq.merging.adding import AddReport
from hdrq.merging.assessment import Readiness
from hdrq.methods.job import Run
from hdrq.methods.sensitivity import Sensitivity


def shown(text: object) -> str:
    """A text of others in what rich prints: no markup, and no control characters."""
    return escape(plain(str(text)))


class Folding(Table):
    """A table that a narrow terminal gets in more lines, where rich would cut numbers and names short."""

    def add_column(self, *parts: Any, **options: Any) -> None:
        super().add_column(*parts, **{"overflow": "fold", **options})


def table(rows: Sequence[Row], title: str):
    """The rows as a :class:`rich.table.Table`."""

    result = Folding(title=shown(title))
    result.add_column("model")
    for domain in rows[0].accuracies:
        result.add_column(shown(domain), justify="right")
    result.add_column("harmonic mean", justify="right", style="bold")
    for row in rows:
        result.add_row(shown(row.method), *(f"{v:.1f}" for v in row.accuracies.values()), f"{row.harmonic_mean:.1f}")
    return result


def sensitivity_table(found: Sensitivity, widths: Mapping[str, int], title: str):
    """The output's signal-to-noise ratio at each layer's bits, and those it is given: :class:`rich.table.Table`."""
    result = Folding(title=shown(title))
    result.add_column("layer")
    for head in ("weights", "MACs", *(f"W{width}" for width in found.layers[0].errors), "bits"):
        result.add_column(head, justify="right")
    for layer in found.layers:
        counts = (_short(layer.weights), _short(layer.macs))
        ratios = map(decibels, layer.errors.values())
        result.add_row(shown(", ".join(layer.layers)), *counts, *ratios, str(widths[layer.layers[0]]))
    return result


def decibels(error: float) -> str:
    """A relative squared error as a signal-to-noise ratio, ``−10·log10(error)``."""
    return f"{-10 * math.log10(error):.1f}" if error > 0 else "∞"


def _short(count: int) -> str:
    """``"82.9k"``."""
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.1f}{unit}"
    return str(count)


def classes_table(rows: Sequence[IoURow], title: str):
    """Each class's IoU, a column for each model and domain, as a :class:`rich.table.Table`."""
    result = Folding(title=shown(title))
    result.add_column("class")
    columns = {}
    for row in rows:
        for domain, classes in row.classes.items():
            columns[f"{row.method}, {domain}" if len(rows) > 1 else domain] = classes
    for name in columns:
        result.add_column(shown(name), justify="right")
    for name in dict.fromkeys(name for classes in columns.values() for name in classes):
        cells = (f"{classes[name]:.1f}" if name in classes else "" for classes in columns.values())
        result.add_row(shown(name), *cells)
    return result


def qat_table(rows: Sequence[Mapping[str, Any]], title: str):
    """Accuracies with each domain left out (:func:`hdrq.qat.job.results_of`), as a :class:`rich.table.Table`."""

    rules = list(dict.fromkeys(row["selection"] for row in rows))
    by_target: dict[str, dict[str, Any]] = {row["target"]: {} for row in rows}
    for row in rows:
        by_target[row["target"]][row["selection"]] = row
    saved = next(row["selection"] for row in rows if row["saved"])
    result = Folding(title=shown(title), caption="accuracies in percent; * the rule that chose the model that is saved")
    result.add_column("left out")
    result.add_column("in domain", justify="right")
    for rule in rules:
        result.add_column(f"out of domain, {rule}{'*' if rule == saved else ''}", justify="right")
    numbers = [[found[saved]["in_domain"], *(found[r]["out_of_domain"] for r in rules)] for found in by_target.values()]
    for target, values in zip(by_target, numbers, strict=True):
        result.add_row(shown(target), *(f"{value:.1f}" for value in values))
    if len(numbers) > 1:
        means = [sum(column) / len(column) for column in zip(*numbers, strict=True)]
        result.add_row("mean", *(f"{value:.1f}" for value in means), style="bold")
    return result


def errors_table(reports: Mapping[str, RunReport], title: str):
    """The accumulated errors of runs on data held out, as a :class:`rich.table.Table`.

    Of one run it has losses too, and whether the block or its layers quantize what a block reads.
    """

    first = next(iter(reports.values()))
    columns: dict[str, dict[str, str]] = {}
    if len(reports) == 1:
        columns["input quantized at"] = dict(first.placement)
        columns["loss"] = {b.name: f"{b.loss_before:.3g} → {b.loss_after:.3g}" for b in first.blocks}
    columns["nearest"] = {name: f"{error:.3g}" for name, error in first.nearest.items()}
    for name, report in reports.items():
        columns[name] = {block: f"{error:.3g}" for block, error in report.errors.items()}
    columns = {name: cells for name, cells in columns.items() if cells}
    result = Folding(title=shown(title))
    result.add_column("block")
    for name in columns:
        result.add_column(name, justify="right")
    for block in dict.fromkeys(block for cells in columns.values() for block in cells):
        result.add_row(shown(block), *(cells.get(block, "") for cells in columns.values()))
    return result


def run_record(name: str, run: Run, report: RunReport | None = None, error: str | None = None) -> dict[str, Any]:
    """A run of ``hdrq quantize`` as JSON has it: its report, or the error that it ended with."""
    settings = {key: getattr(run, key) for key in ("out", "recipe", "bits", "seed")}
    found: dict[str, Any] = {}
    if report is not None:
        found = {key: getattr(report, key) for key in ("nearest", "errors", "seconds", "peak_memory")}
        found["coverage"] = None if report.coverage is None else report.coverage.as_dict()
        found["blocks"] = [
            {key: getattr(block, key) for key in ("name", "loss_before", "loss_after", "seconds")}
            for block in report.blocks
        ]
    return {"name": name, "error": error, **settings, **found}


def runs_table(records: Sequence[Mapping[str, Any]]):
    """What became of several runs (:func:`run_record`), as a :class:`rich.table.Table`."""
    result = Folding(title="Quantized", caption="error: ‖y_q − y‖² / ‖y‖² of the output on data held out")
    result.add_column("model")
    for name in ("bits", "nearest", "error", "seconds", "peak MiB"):
        result.add_column(name, justify="right")
    result.add_column("file, or what went wrong")
    for record in records:
        bits = record["bits"] if isinstance(record["bits"], str) else "patterns"
        if record["error"] is not None:
            result.add_row(shown(record["name"]), shown(bits), "", "", "", "", shown(record["error"]), style="red")
            continue
        errors = (f"{record[key]['output']:.3g}" if record[key] else "" for key in ("nearest", "errors"))
        memory = ", ".join(f"{size / 2**20:,.0f}" for size in record["peak_memory"].values())
        cells = (shown(bits), *errors, f"{record['seconds']:.0f}", memory, shown(record["out"]))
        result.add_row(shown(record["name"]), *cells)
    return result


def readiness_table(readiness: Readiness):
    """How well each layer merges, as a :class:`rich.table.Table`."""

    result = Folding(box=None, title="Merge readiness")
    result.add_column("layer")
    for name in ("weights", "ambiguous", "ties", "scale ratio", "distance", "in steps", "cosine", "clipped", "error"):
        result.add_column(name, justify="right")
    for layer in (*readiness.layers, readiness.total):
        result.add_row(
            shown(layer.name),
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


def added_table(report: AddReport):
    """What became of a change, tensor by tensor, as a :class:`rich.table.Table`."""

    columns = ["elements", "rule", "in steps", "kept", "error", "clipped"]
    if any(tensor.input_error is not None for tensor in report.tensors):
        columns.insert(5, "on inputs")
    if any(tensor.dead for tensor in report.tensors):
        columns.append("dead inputs")
    result = Folding(box=None, title="Added", show_footer=True)
    result.add_column("tensor", "total")
    footers = {"kept": f"{report.kept:.1%}", "error": f"{report.error:.2f}", "clipped": f"{report.clipped:.1%}"}
    for name in columns:
        result.add_column(name, footers.get(name, ""), justify="right")
    for tensor in report.tensors:
        cells = {
            "elements": f"{tensor.elements:,}",
            "rule": tensor.rule,
            "in steps": "" if tensor.steps is None else f"{tensor.steps:.3f}",
            "kept": f"{tensor.kept:.1%}",
            "error": f"{tensor.error:.2f}",
            "on inputs": "" if tensor.input_error is None else f"{tensor.input_error:.2f}",
            "clipped": f"{tensor.clipped:.1%}",
            "dead inputs": f"{tensor.dead:,}",
        }
        result.add_row(shown(tensor.name), *(cells[name] for name in columns))
    return result


def layers_table(report: RunReport):
    """The layers of a run in closed form as a :class:`rich.table.Table`: what their objective came to."""
    result = Folding(title=f"{report.recipe}: the objective, layer by layer", box=None)
    result.add_column("layer")
    for name in ("to nearest", "before rounding", "result", "unexcited"):
        result.add_column(name, justify="right")
    result.add_column("note")
    for layer in (layer for block in report.blocks for layer in block.layers):
        errors = (f"{value:.4g}" for value in (layer.nearest, layer.best, layer.error))
        result.add_row(shown(layer.name), *errors, f"{layer.unexcited:,}", shown(layer.note))
    return result


def write_rows(rows: Sequence[Row], folder: Path, facts: dict, name: str = "table") -> None:
    """``table.csv``, and ``table.json`` with ``facts`` (settings, versions) beside the rows."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["method", *rows[0].accuracies, "harmonic_mean"])
    for row in rows:
        writer.writerow([row.method, *(f"{v:.2f}" for v in (*row.accuracies.values(), row.harmonic_mean))])
    write_atomically(folder / f"{name}.csv", text.getvalue())
    write_atomically(folder / f"{name}.json", json.dumps({**facts, "rows": records(rows)}, indent=2) + "\n")


def records(rows: Sequence[Row]) -> list[dict]:
    """The rows as JSON has them."""
    return [{**asdict(row), "harmonic_mean": row.harmonic_mean} for row in rows]


def contents_table(found: Contents):
    """The layers as a :class:`rich.table.Table`, with totals."""

    stored, full = (sum(getattr(layer, kind) for layer in found.layers) for kind in ("stored", "full"))
    result = Folding(box=None, show_footer=True)
    result.add_column("layer", "total")
    footers = {"shape": "", "bits": "", "scales": "", "bytes": f"{stored:,}", "of float32": _share(stored, full)}
    for name, footer in footers.items():
        result.add_column(name, footer, justify="right")
    for layer in found.layers:
        bits = f"W{layer.bits}" + ("" if layer.input_bits is None else f"A{layer.input_bits}")
        shape = "×".join(map(str, layer.shape))
        share = _share(layer.stored, layer.full)
        result.add_row(shown(layer.name), shape, bits, f"{layer.scales:,}", f"{layer.stored:,}", share)
    return result


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else ""
