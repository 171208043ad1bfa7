"""Figures and tables of the loss between and around models, from the rows of :mod:`hdrq.reproduce.landscape` alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hdrq.checkpoint.files import write_atomically
from hdrq.report.figures import COLOURS
from hdrq.reproduce.measured import (
    OUTCOME,
    PREDICTORS,
    Run,
    correlation_among_methods,
    mean_of,
    over_networks,
    rank_correlation,
    read,
)
from hdrq.reproduce.protocol import METHODS

MARKERS = "osD^vP*X"  # of bit widths
DRAWN = ("noise, first", "noise, best of 30", "systematic")
WIDTH = 7.5  # inches: a page's


def render(rows: Path, folder: Path) -> str:
    """Write ``landscape.md`` and the figures of the rows in a CSV, and return the tables.

    Raises:
        ValueError: the CSV is not one of ``hdrq reproduce landscape``.
    """
    runs = read(rows)
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for task in dict.fromkeys(run.task for run in runs):
        own = [run for run in runs if run.task == task]
        parts.append(f"## {task}\n\n{_numbers(own)}\n\n{_correlations(own)}")
        for bits in _widths(own):
            surfaces(own, bits, folder / f"{task}-surfaces-{bits}.png")
            draws(own, bits, folder / f"{task}-draws-{bits}.png")
        barriers(own, folder / f"{task}-barrier.png")
        curvature(own, folder / f"{task}-curvature.png")
        distance(own, folder / f"{task}-distance.png")
    text = "\n\n".join(parts) + "\n"
    write_atomically(folder / "landscape.md", text)
    return text


def colour(method: str) -> str:
    """A method's colour."""
    return COLOURS[list(METHODS).index(method) % len(COLOURS)]


def _plain(runs: Sequence[Run]) -> list[Run]:
    """The ways of the table among runs, network after network within a method."""
    return [run for run in runs if run.plain]


def _learned(runs: Sequence[Run]) -> list[Run]:
    """Runs of methods that learn: rounding to nearest is so much worse that it would hide what these have apart."""
    return [run for run in runs if METHODS[run.method].learned]


def _methods(runs: Sequence[Run]) -> list[str]:
    return [method for method in METHODS if any(run.method == method for run in runs)]


# --- tables


def _numbers(runs: Sequence[Run]) -> str:
    """Means of every measure, a row for each method at each bit width."""
    measures = ("loss", *PREDICTORS, "integers changed", "accuracy, nearest", OUTCOME)
    lines = [f"| bits | method | networks | {' | '.join(measures)} |", "|---" * (len(measures) + 3) + "|"]
    for bits in dict.fromkeys(run.bits for run in runs):
        for method in _methods(runs):
            own = [run for run in _plain(runs) if (run.method, run.bits) == (method, bits)]
            if own:
                cells = [over_networks(own, mean_of(measure)).text() for measure in measures]
                count = len({run.network for run in own})
                lines.append(f"| {bits} | {method} | {count} | {' | '.join(cells)} |")
    return "**Means over targets or pairs, and networks; accuracies of all targets merged**\n\n" + "\n".join(lines)


def _correlations(runs: Sequence[Run]) -> str:
    """Spearman's ρ of each measure with the accuracy of all targets merged."""
    quantized = [run for run in runs if run.bits != "float"]
    learned = _learned(quantized)
    groups = {f"all {len(quantized)} runs": quantized, f"{len(learned)} of methods that learn": learned}
    groups |= {f"these at {b}": [run for run in learned if run.bits == b] for b in _widths(learned)}
    lines = [
        f"| | {' | '.join(groups)} | among these, of one network and bit width |",
        "|---" * (len(groups) + 2) + "|",
    ]
    for measure in PREDICTORS:
        found = [over_networks(group, rank_correlation(measure)) for group in groups.values()]
        found.append(over_networks(learned, correlation_among_methods(measure)))
        lines.append(f"| {measure} | {' | '.join(each.text(2) for each in found)} |")
    return "**Spearman's ρ with the accuracy of all targets merged, systematic rounding**\n\n" + "\n".join(lines)


def _widths(runs: Sequence[Run]) -> list[str]:
    """The bit widths of quantized runs, as they come."""
    return list(dict.fromkeys(run.bits for run in runs if run.bits != "float"))


# --- figures


def surfaces(runs: Sequence[Run], bits: str, path: Path) -> None:
    """The loss on the plane of the source and two targets, and around the first of these; a column for each method."""
    own = [run for run in _plain(runs) if run.bits in (bits, "float") and "plane" in run.grids]
    own = list({run.method: run for run in reversed(own)}.values())  # of the first network that has them
    own.sort(key=lambda run: list(METHODS).index(run.method))
    if not any(run.bits == bits for run in own):
        return
    kinds = ("plane", "around, weights")
    drawing = blank(WIDTH, 1.0 + 1.6 * WIDTH / max(len(own), 4))
    panels = drawing.subplots(2, len(own), squeeze=False)
    for axes, kind in zip(panels, kinds, strict=True):
        grids = [_grid(run, kind) for run in own]
        shared = [grid for grid, run in zip(grids, own, strict=True) if run.method != "RTN"] or grids
        every = np.log10(np.concatenate([losses.ravel() for *_, losses in shared]))
        levels = np.linspace(every.min(), np.quantile(every, 0.95), 15)
        for panel, run, (x, y, losses) in zip(axes, own, grids, strict=True):
            shown = panel.contourf(x, y, np.log10(losses), levels, cmap="viridis", extend="both")
            panel.set_aspect("equal")
            panel.tick_params(labelsize=6)
            if kind == "plane":
                panel.set_title(run.method, fontsize=8, color=colour(run.method))
                for (name, points), mark in zip(run.grids["place"].items(), "*os", strict=False):
                    panel.plot(*points[0][:2], mark, color="white", markeredgecolor="black", markersize=6, label=name)
            else:
                panel.plot(0, 0, "o", color="white", markeredgecolor="black", markersize=6)
        ticks = np.log10([1, 2, 5]) + np.arange(-3, 4)[:, None]
        inside = [t for t in ticks.ravel() if levels[0] <= t <= levels[-1]]
        bar = drawing.colorbar(shown, ax=list(axes), label="loss", ticks=inside, aspect=12)
        bar.ax.set_yticklabels([f"{10**t:g}" for t in inside], fontsize=7)
    panels[0][0].set_ylabel("plane of three\n(distance of weights)", fontsize=8)
    panels[1][0].set_ylabel("random directions\n(norm of each filter)", fontsize=8)
    drawing.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    save(drawing, path)


def _grid(run: Run, kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The coordinates of a surface, and the losses, (points of y, points of x)."""
    (points,) = run.grids[kind].values()
    x, y, losses = np.array(sorted(points, key=lambda p: (p[1], p[0]))).T
    across = np.unique(x)
    return across, np.unique(y), losses.reshape(-1, len(across))


def draws(runs: Sequence[Run], bits: str, path: Path) -> None:
    """The accuracy of merges of two targets by each rule that draws, a point for each seed; bars are means."""
    own = [run for run in _plain(_learned(runs)) if run.bits == bits and f"draw, {DRAWN[0]}" in run.grids]
    own = list({run.method: run for run in reversed(own)}.values())[::-1]  # of the first network that has them
    if not own:
        return
    drawing = blank(WIDTH, 3.2)
    panels = drawing.subplots(1, len(DRAWN), sharey=True)
    for panel, rule in zip(panels, DRAWN, strict=True):
        for place, run in enumerate(own):
            ((pair, points),) = run.grids[f"draw, {rule}"].items()
            values = np.array([value for *_, value in points])
            shift = np.random.default_rng(0).uniform(-0.25, 0.25, len(values))
            panel.plot(place + shift, values, ".", color=colour(run.method), markersize=4, alpha=0.6)
            panel.plot([place - 0.35, place + 0.35], [values.mean()] * 2, color="black", linewidth=1.5)
            nearest = run.numbers["accuracy, nearest"][pair]
            panel.plot([place - 0.35, place + 0.35], [nearest] * 2, color="black", linewidth=1, linestyle=":")
        panel.set_title(rule, fontsize=9)
        panel.set_xticks(range(len(own)), [run.method for run in own], rotation=40, ha="right", fontsize=8)
    panels[0].set_ylabel(f"harmonic mean (%), {pair}", fontsize=8)
    lines = [panels[0].plot([], [], color="black", linestyle=style)[0] for style in ("-", ":")]
    drawing.legend(lines, ["mean of the draws", "to nearest"], loc="outside lower center", ncols=2, fontsize=8)
    drawing.suptitle(f"{bits}: merges of two targets, a point for each seed of the merge", fontsize=9)
    save(drawing, path)


def barriers(runs: Sequence[Run], path: Path) -> None:
    """The rise of the loss between two models against λ, of the rounded weights and with noise in their place."""
    widths = _widths(_plain(runs))
    if not widths:
        return
    drawing = blank(WIDTH, 4.6)
    kinds = {"loss between": "rounded (Eq. 2)", "noisy loss between": "with noise (Eq. 3)"}
    panels = drawing.subplots(len(kinds), len(widths), sharex=True, sharey="row", squeeze=False)
    for row, (kind, title) in zip(panels, kinds.items(), strict=True):
        highest = 0.0  # of all but rounding to nearest, which may leave the frame
        for panel, bits in zip(row, widths, strict=True):
            for method in _methods(runs):
                own = [r for r in _plain(runs) if r.method == method and r.bits in (bits, "float") and kind in r.grids]
                curves = [run.curve(kind) for run in own]
                if curves:
                    rises = np.stack([rise for _, rise in curves])
                    highest = max(highest, 0.0 if method == "RTN" else float(rises.max()))
                    panel.plot(curves[0][0], rises.mean(0), color=colour(method), marker=".", label=method)
                    panel.fill_between(
                        curves[0][0], rises.min(0), rises.max(0), color=colour(method), alpha=0.15, linewidth=0
                    )
            panel.axhline(0, color="black", linewidth=0.5)
            panel.set_title(f"{bits}, {title}", fontsize=8)
            panel.tick_params(labelsize=7)
        row[0].set_ylabel("rise of the loss", fontsize=8)
        if highest:
            row[0].set_ylim(top=1.3 * highest)
    for panel in panels[-1]:
        panel.set_xlabel("λ", fontsize=8)
    drawing.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    drawing.suptitle("loss less the mean of both ends, mean over pairs and networks; bands: all networks", fontsize=9)
    save(drawing, path)


def curvature(runs: Sequence[Run], path: Path) -> None:
    """Six measures against the accuracy of all targets merged, a point for each run, with Spearman's ρ."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogLocator, NullFormatter

    own = _learned(runs)
    widths = _widths(own)
    if not own:
        return
    drawing = blank(WIDTH, 5.2)
    panels = drawing.subplots(2, 3, sharey=True)
    for panel, measure in zip(panels.flat, PREDICTORS, strict=False):
        for run in own:
            mark = MARKERS[widths.index(run.bits) % len(MARKERS)]
            x, y = run.mean(measure), run.mean(OUTCOME)
            panel.plot(x, y, mark, color=colour(run.method), markersize=5, alpha=0.8, markeredgewidth=0)
        every, among = (over_networks(own, f(measure)).text(2) for f in (rank_correlation, correlation_among_methods))
        numbers = [run.mean(measure) for run in own]
        if 0 < 3 * min(numbers) < max(numbers):
            panel.set_xscale("log")
            panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.xaxis.set_major_formatter("{x:g}")
            panel.xaxis.set_minor_formatter(NullFormatter())
        panel.set_title(f"ρ {every}\namong methods {among}", fontsize=8)
        panel.set_xlabel(measure, fontsize=8)
        panel.tick_params(labelsize=7, which="both")
    for row in panels:
        row[0].set_ylabel("all targets merged (%)", fontsize=8)
    handles = [Line2D([], [], marker="o", linestyle="", color=colour(m), label=m) for m in _methods(own)]
    handles += [
        Line2D([], [], marker=mark, linestyle="", color="black", fillstyle="none", label=bits)
        for mark, bits in zip(MARKERS, widths, strict=False)
    ]
    drawing.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8)
    save(drawing, path)


def distance(runs: Sequence[Run], path: Path) -> None:
    """Barriers and the accuracy of merges against the weight of the distance to the source, where it was varied."""
    from hdrq.recipes import recipe

    varied = [run for run in runs if set(run.knobs) == {"distance"}]
    if not varied:
        return
    drawing = blank(WIDTH, 3.0)
    panels = drawing.subplots(1, 3)
    for panel, measure in zip(panels, ("barrier", "noisy barrier", OUTCOME), strict=True):
        for method in _methods(varied):
            for bits in dict.fromkeys(run.bits for run in varied if run.method == method):
                way = METHODS[method]
                usual = recipe(way.recipe, way.preset, **way.knobs).distance
                networks = {run.network for run in varied if (run.method, run.bits) == (method, bits)}
                places: dict[float, list[Run]] = {}
                for run in runs:
                    if (
                        (run.method, run.bits) == (method, bits)
                        and run.network in networks
                        and (run.plain or run in varied)
                    ):
                        places.setdefault(run.knobs.get("distance", usual), []).append(run)
                shown = [over_networks(places[place], mean_of(measure)) for place in sorted(places)]
                y = np.array([each.value for each in shown])
                bars = [y - [each.low for each in shown], [each.high for each in shown] - y]
                panel.errorbar(
                    range(len(y)),
                    y,
                    np.nan_to_num(bars),
                    marker="o",
                    capsize=2,
                    color=colour(method),
                    label=f"{method}, {bits}",
                )
                panel.set_xticks(range(len(y)), [f"{place:g}" for place in sorted(places)], fontsize=7)
        panel.set_title(measure, fontsize=9)
        panel.set_xlabel("weight of the distance to the source", fontsize=8)
        panel.tick_params(labelsize=7)
    drawing.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    save(drawing, path)


def blank(width: float, height: float) -> Any:
    """A figure of so many inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save(drawing: Any, path: Path) -> None:
    """PNG, and SVG beside it."""
    for suffix in (".png", ".svg"):
        drawing.savefig(path.with_suffix(suffix), dpi=150)
