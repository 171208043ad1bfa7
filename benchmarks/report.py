"""What a run says: tables, where we lose, files, plots."""

from __future__ import annotations

import csv
import json
import platform
import re
from collections.abc import Iterator
from dataclasses import asdict
from datetime import datetime, timezone
from itertools import groupby
from pathlib import Path

import torch

from hdrq.backends.info import facts
from hdrq.benchmarks.harness import CLONE, COPY, Figure, Result

HEADER = f"{'':38}{'ns/element p20 / p50 / p80':>30}{'GB/s':>8}{'floor':>9}{'reached':>9}{'x copy':>8}{'speed-up':>10}"


def record(result: Result, device: str) -> dict:
    """Everything, as JSON can hold it: machine, versions, date, figures, losses, failures."""
    return {
        "taken": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": hardware(device),
        "machine": platform.machine(),
        **facts(),
        "failures": result.failures,
        "left out": result.left_out,
        "losses": losses(result.figures),
        "figures": [asdict(f) for f in result.figures],
    }


def hardware(device: str) -> str:
    """The name of what ran it."""
    return torch.cuda.get_device_name() if device == "cuda" else facts()["processor"]


def tables(figures: list[Figure]) -> Iterator[list[Figure]]:
    """The figures that were taken together."""
    for _, table in groupby(figures, lambda f: (f.operation, f.case, f.dtype, f.threads)):
        yield list(table)


def title(f: Figure) -> str:
    """What a table is about."""
    case = f"{f.elements:,} elements" if f.case.isdigit() else f"{f.case}, {f.elements:,} elements"
    return f"{f.operation}, {case}, {f.dtype}, {f.threads} thread{'s' * (f.threads > 1)}"


def losses(figures: list[Figure]) -> list[str]:
    """Where a provider that is not ours is faster than our op, called as a user calls it."""
    lost = []
    for table in tables(figures):
        ours = next(f for f in table if f.provider.startswith("hdrq"))
        for f in table:
            if not f.provider.startswith(("hdrq", COPY, CLONE)) and f.p50 < ours.p50:
                lost.append(f"{title(f)}: {f.provider} takes {f.p50 / ours.p50:.2f} of our time")
    return lost


def text(result: Result, device: str) -> str:
    """The tables, and under them where we lose, what failed and what is missing."""
    lines = [f"{hardware(device)}, torch {torch.__version__}, hdrq {facts()['hdrq']}"]
    for table in tables(result.figures):
        lines += ["", title(table[0]), HEADER]
        for f in table:
            quantiles = " / ".join(map(_digits, (f.p20, f.p50, f.p80)))
            rates = (
                f"{_digits(f.gigabytes_per_second):>8}{_digits(f.floor):>9}{f.reached:>9.0%}{_digits(f.over_copy):>8}"
            )
            faster = "" if f.speedup is None else _digits(f.speedup)
            lines.append(f"{f.provider:38}{quantiles:>30}{rates}{faster:>10}")
    lost = losses(result.figures)
    lines += ["", "Where we lose", *(lost or ["nowhere, in these tables"] * bool(result.figures))]
    lines += ["", "Verification failed, not timed", *result.failures] * bool(result.failures)
    lines += ["", "Left out", *result.left_out] * bool(result.left_out)
    return "\n".join(lines)


def _digits(value: float) -> str:
    """Four of them, whatever the size."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:#.4g}"


def write(result: Result, device: str, folder: Path) -> None:
    """``FAMILY-DEVICE.csv``, ``.json`` and, where matplotlib is installed, ``.png``."""
    folder.mkdir(parents=True, exist_ok=True)
    everything = record(result, device)
    where = re.sub(r"[^a-z0-9]+", "-", hardware(device).lower()).strip("-") if device == "cuda" else "cpu"
    for family, group in groupby(result.figures, lambda f: f.family):
        figures = list(group)
        path = folder / f"{family}-{where}"
        rows = [_rounded(asdict(f)) for f in figures]
        with open(path.with_suffix(".csv"), "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        own = {**everything, "losses": losses(figures), "figures": rows}
        path.with_suffix(".json").write_text(json.dumps(own, indent=1) + "\n")
        try:
            plot(figures, hardware(device), path.with_suffix(".png"))
        except ImportError as error:
            result.left_out.append(f"{path.with_suffix('.png')}: needs {error.name}")


def _rounded(row: dict) -> dict:
    """More digits than these no clock has."""
    return {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in row.items()}


def plot(figures: list[Figure], machine: str, path: Path) -> None:
    """Throughput over size: a column per operation, a row per type and number of threads; the copy is the roof."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    key = lambda f: (f.operation, f.dtype, f.threads)  # noqa: E731
    panels = list(dict.fromkeys(map(key, figures)))
    providers = dict.fromkeys(f.provider for f in figures if f.provider != COPY)
    styles = {name: {"color": f"C{i}", "marker": "o", "markersize": 3} for i, name in enumerate(providers)}
    styles[COPY] = {"color": "black", "linestyle": "--", "label": "roof: copy"}
    columns = len({f.operation for f in figures})
    rows = -(-len(panels) // columns)
    figure, grid = pyplot.subplots(rows, columns, figsize=(8 * columns, 4 * rows), squeeze=False, layout="constrained")
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    for axes, panel in zip(grid.flat, panels, strict=False):
        here = [f for f in figures if key(f) == panel]
        for provider in dict.fromkeys(f.provider for f in here):
            points = sorted((f.elements, f.gigabytes_per_second) for f in here if f.provider == provider)
            axes.plot(*zip(*points, strict=True), **{"label": provider, **styles[provider]})
        axes.set(xscale="log", yscale="log", xlabel="elements", ylabel="GB/s by the byte model")
        axes.set_title(f"{panel[0]}, {panel[1]}, {panel[2]} thread{'s' * (panel[2] > 1)}", fontsize=10)
        axes.legend(fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(machine)
    figure.savefig(path, dpi=80)
    pyplot.close(figure)
