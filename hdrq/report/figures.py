"""Figures, as PNG files."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot

from hdrq.checkpoint.files import write_atomically
from hdrq.checks import plain
from hdrq.merging.assessment import FAR, TOO_FAR, Readiness
from hdrq.report.tables import Row

# Okabe's and Ito's, which those who see few colours tell apart; one method has one in every figure.
COLOURS = ("black", "#999999", "#e69f00", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#b8a800")
names_as_they_are = matplotlib.rc_context({"text.parse_math": False})  # a layer may be called "$x$"


@names_as_they_are
def write_losses(losses: Sequence[tuple[str, int, float]], path: Path) -> None:
    """A figure: each block's reconstruction loss while it was learned."""

    matplotlib.use("Agg")
    figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
    for block in dict.fromkeys(name for name, *_ in losses):
        points = [(iteration, loss) for name, iteration, loss in losses if name == block]
        axes.plot(*zip(*points, strict=True), marker=".", label=_label(block))
    axes.set(xlabel="iteration", ylabel="reconstruction loss", yscale="log")
    axes.legend(fontsize=6, ncols=2)
    _save(figure, path)


@names_as_they_are
def write_disorder(history: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A figure of what a :class:`hdrq.qat.DisorderFreezer` saw: the disorder by layer and step, dots where it froze.

    Args:
        history: the freezer's, at least one decision.
    """

    matplotlib.use("Agg")
    names = list(history[0]["disorder"])
    values = [[math.nan if (d := one["disorder"][name]) is None else d for one in history] for name in names]
    size = (max(6, min(24, 0.12 * len(history))), max(3, 0.2 * len(names)))
    figure, axes = pyplot.subplots(figsize=size, layout="constrained")
    picture = axes.imshow(values, vmin=0, vmax=1, aspect="auto", interpolation="nearest", cmap="viridis")
    dots = [(x, names.index(name)) for x, one in enumerate(history) for name in one["frozen"]]
    if dots:
        places_x, places_y = zip(*dots, strict=True)
        axes.scatter(places_x, places_y, s=8, color="white", edgecolor="black", linewidth=0.5)
    axes.set_yticks(range(len(names)), [plain(name) for name in names], fontsize=6)
    places = range(0, len(history), max(1, len(history) // 8))
    axes.set_xticks(places, [str(history[k]["step"]) for k in places])
    axes.set(xlabel="step; a dot: frozen for the steps that follow")
    figure.colorbar(picture, label="disorder")
    _save(figure, path)


def _label(name: str) -> str:
    """A name for a legend, which leaves out what begins with an underscore."""
    return f" {plain(name)}" if name.startswith("_") else plain(name)


def _save(figure, path: Path) -> None:
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    pyplot.close(figure)
    write_atomically(path, picture.getvalue())


@names_as_they_are
def plot_readiness(readiness: Readiness, path: Path) -> None:
    """A figure of how well each layer merges: what is ambiguous, scales, distances and the cosines of draws."""

    matplotlib.use("Agg")
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
    cosine.set_xticks(x, [plain(layer.name) for layer in layers], rotation=90, fontsize=7)
    for axes in (share, scale, distance, steps, cosine):
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8)
    figure.suptitle(plain(readiness.verdict), fontsize=10, wrap=True)
    _save(figure, path)


@names_as_they_are
def write_bars(panels: Mapping[str, Sequence[Row]], path: Path) -> None:
    """A figure of accuracies: a panel for each title, in it a group of bars for each domain and one for the harmonic
    mean; a method has one colour in all of them."""

    matplotlib.use("Agg")
    methods = list(dict.fromkeys(row.method for rows in panels.values() for row in rows))
    figure, all_axes = pyplot.subplots(len(panels), figsize=(8, 3 * len(panels)), layout="constrained", squeeze=False)
    for axes, (title, rows) in zip(all_axes[:, 0], panels.items(), strict=True):
        groups = [*rows[0].accuracies, "harmonic mean"]
        width = 0.84 / len(rows)
        for i, row in enumerate(rows):
            heights = [*row.accuracies.values(), row.harmonic_mean]
            colour = COLOURS[methods.index(row.method) % len(COLOURS)]
            bars = axes.bar([g + i * width for g in range(len(groups))], heights, width, label=row.method, color=colour)
            axes.bar_label(bars, fmt="%.1f", fontsize=6.5)
        axes.set_xticks([g + width * (len(rows) - 1) / 2 for g in range(len(groups))], groups)
        axes.set(ylabel="accuracy (%)", title=title)
    figure.legend(*all_axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    _save(figure, path)
