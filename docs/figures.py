"""The figures of docs/merging.md: ``python docs/figures.py`` writes them to docs/images."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import torch
from matplotlib import pyplot
from matplotlib.ticker import PercentFormatter

import hdrq

IMAGES = Path(__file__).parent / "images"
QMIN, QMAX = -8, 7
COLOURS = {"half-even": "#999999", "noise": "#e69f00", "systematic": "#0072b2"}  # as in hdrq.report.figures
LABELS = {"half-even": "to nearest", "noise": "noise (the paper's), one draw", "systematic": "systematic"}
STYLE = {"font.size": 12, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}


def models(count: int = 2**16) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Codes and steps of two models that were adapted from one source and quantized to 4 bits."""
    generator = torch.Generator().manual_seed(0)
    source = torch.randn(count, generator=generator)
    weights = [source + 0.3 * torch.randn(count, generator=generator) for _ in range(2)]
    scales = [hdrq.ops.search_scale(w, QMIN, QMAX) for w in weights]
    scales[1] = scales[1] * 1.05  # scales that are learned come out a little apart
    codes = [hdrq.ops.quantize(w, s, QMIN, QMAX) for w, s in zip(weights, scales, strict=True)]
    return codes, scales


def position(codes: list[torch.Tensor], scales: list[torch.Tensor]) -> torch.Tensor:
    """Where the mean of the models lies on the merged grid, in steps."""
    values = [hdrq.ops.dequantize(c, s) for c, s in zip(codes, scales, strict=True)]
    return (values[0] + values[1]) / (scales[0] + scales[1])


def one_weight(axes) -> None:
    """A weight that is 3 steps in one model and 4 in the other: its mean is half-way between two merged integers."""
    steps = {"merged": 1.025, "model b": 1.05, "model a": 1.0}
    places = {"model a": 3 * 1.0, "model b": 4 * 1.05}
    places["merged"] = (places["model a"] + places["model b"]) / 2
    for height, (name, step) in enumerate(steps.items()):
        axes.hlines(height, 1.7, 5.5, color="#cccccc", linewidth=1)
        for k in range(2, 6):
            axes.vlines(k * step, height - 0.12, height + 0.12, color="black", linewidth=1)
            axes.text(k * step, height - 0.4, str(k), ha="center")
        axes.plot(places[name], height, "o", markersize=9, color="#d55e00" if name == "merged" else "#0072b2")
    for name in ("model a", "model b"):
        heights = [list(steps).index(name), 0]
        axes.plot([places[name], places["merged"]], heights, ":", color="#0072b2", linewidth=1)
    axes.set(yticks=range(3), yticklabels=list(steps), ylim=(-0.7, 2.4), xlabel="value of the weight", xticks=[])
    axes.spines["left"].set_visible(False)
    axes.tick_params(left=False)


def near_ties(axes, codes, scales) -> None:
    v = position(codes, scales)
    y = v - v.floor()
    axes.hist(y.numpy(), bins=50, range=(0, 1), weights=[1 / y.numel()] * y.numel(), color="#999999")
    axes.axvspan(0.4, 0.6, color=COLOURS["systematic"], alpha=0.2, linewidth=0)
    axes.set(xlabel="place between two merged integers", ylabel="share of the weights", xlim=(0, 1))
    axes.yaxis.set_major_formatter(PercentFormatter(1, 0))


def running_sums(axes, codes, scales, towards_b: bool) -> None:
    """What rounding adds up to along neighbours; with ``towards_b`` counted positive where it goes towards model b."""
    v = position(codes, scales)
    sign = (codes[1].double() * scales[1] - codes[0].double() * scales[0]).sign() if towards_b else 1.0
    for rule, colour in COLOURS.items():
        options = {"draws": 1} if rule == "noise" else {}
        merged = hdrq.ops.merge(codes, scales, QMIN, QMAX, hdrq.rng_state(1), rule=rule, **options)
        sums = ((merged.codes.double() - v.double()) * sign)[:1024].cumsum(0)
        axes.plot(sums.numpy(), color=colour, label=LABELS[rule], linewidth=1.5)
    axes.axhline(0, color="black", linewidth=0.5)
    axes.set(xlabel="neighbouring weights", xlim=(0, 1024), xticks=range(0, 1025, 256))
    axes.set(ylabel="towards model b, steps" if towards_b else "sum of the rounding errors, steps")
    axes.legend()


def main() -> None:
    matplotlib.use("Agg")
    IMAGES.mkdir(exist_ok=True)
    codes, scales = models()
    panels = {
        "one-weight": one_weight,
        "near-ties": lambda axes: near_ties(axes, codes, scales),
        "sums": lambda axes: running_sums(axes, codes, scales, False),
        "towards": lambda axes: running_sums(axes, codes, scales, True),
    }
    for name, draw in panels.items():
        with matplotlib.rc_context(STYLE):
            figure, axes = pyplot.subplots(figsize=(5, 3.6), layout="constrained")
            draw(axes)
            figure.savefig(IMAGES / f"merging-{name}.png", dpi=120)
            pyplot.close(figure)


if __name__ == "__main__":
    main()
