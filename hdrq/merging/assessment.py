"""Will merging these models work? Answered layer by layer, from integers and scales alone."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields

import torch
from torch.nn.functional import pdist

from hdrq import checks, ops
from hdrq.backends.eager.merging import cosines
from hdrq.ops import MergedTensor

UNREADY = ("warn", "refuse")
LOOKED_AT = 2**18  # weights of a layer, where nobody asked for a report
CHUNK = 2**14  # elements of every model that are read at a time: their float64 values stay in the cache
TIE = 2.0**-16  # a mean this near to half an integer counts as a tie, since λ is rounded to float32


@dataclass(frozen=True)
class LayerReadiness:
    """What decides whether one layer merges well.

    Symbols as in :func:`hdrq.ops.merge`, ``w_k = J_k·Δ_k`` and ``m = Σ λ_k·w_k``; ``v = m / Δ*`` is where the mean lies
    between the integers of the merged model.
    """

    name: str
    elements: int
    ambiguous: float  # share of weights whose v is nearer to a tie than to an integer
    ties: float  # share of weights whose v is a tie: without noise a rule decides for all of them alike
    scale_ratio: float  # the largest scale of a channel over its smallest, in the channel where that is most
    mean_scale_ratio: float  # the same, the mean over channels
    distance: float  # ‖w_i − w_j‖₂ of the pair that is farthest apart, over the mean of ‖w_k‖₂
    steps_apart: float  # root mean square of (w_i − w_j) / Δ*, of the pair where it is most
    lowest_cosine: float  # of the draws, each scored by its smallest cosine over the models; of the result without any
    highest_cosine: float
    kept_cosine: float  # of the draw kept
    clipped: float  # share of weights that the clamp moved: round(v) + z* outside [qmin, qmax]
    at_bounds: float  # share of the models' own codes at either end of their range
    rounding_error: float  # ‖(I* − z*)·Δ* − m‖₂ / ‖m‖₂ of the draw kept


NUMBERS = tuple(field.name for field in fields(LayerReadiness))[2:]


def examine(
    name: str,
    merged: MergedTensor,
    codes: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor],
    qmin: int,
    qmax: int,
    *,
    weights: Sequence[float] | None = None,
    axis: int | None = None,
    zero_points: Sequence[torch.Tensor] | None = None,
    ranges: Sequence[tuple[int, int]] | None = None,
    shape: Sequence[int] | None = None,
) -> LayerReadiness:
    """Measure how well :func:`hdrq.ops.merge` merged a layer.

    Args:
        name: of the layer.
        merged: what the merge returned; every other argument is one that the merge was called with.

    A weight is *ambiguous* where ``abs(v − floor(v) − ½) < ¼``. Where all scales are equal, those are the weights on
    which ``noise="odd"`` keeps noise; where scales differ, ``noise="odd"`` tests the mean integer ``Σ λ_k·J_k`` in
    place of ``v``. Ties need equal scales. Where scales differ ever so little and two models are a step apart, rounding
    to nearest takes the model of the greater ``λ_k·Δ_k`` everywhere, which is as much of a bias.

    ``v`` is a mean of the models' ``J_k``, so the clamp moves weights only where ranges differ, zero points round,
    or λ extrapolates. Sums are float64, over ``CHUNK`` weights at a time; an empty layer has shares and norms of 0.
    """
    count = len(codes)
    lam = torch.tensor(checks.mixing_weights(weights, count, True, True), dtype=torch.float64)
    lam = lam.to(merged.scale.device)
    shape = merged.codes.shape if shape is None else torch.Size(shape)
    bounds = [(qmin, qmax)] * count if ranges is None else list(ranges)
    axis = checks.axis_of(torch.empty(shape, device="meta"), axis)
    rows = [
        _rows(ops.unpack(c, shape, signed=low < 0) if c.dtype == torch.uint8 else c, axis)
        for c, (low, _) in zip((*codes, merged.codes), (*bounds, (qmin, qmax)), strict=True)
    ]
    steps, zeros = (
        torch.stack([t.flatten() for t in values]).double()[..., None]
        for values in (scales, [torch.zeros_like(s) for s in scales] if zero_points is None else zero_points)
    )
    grid = [t.double()[:, None] for t in (merged.scale, merged.zero_point)]

    totals = torch.zeros(6 + 3 * count + count * (count - 1), dtype=torch.float64, device=lam.device)
    for channels, columns in _tiles(rows[0].shape):
        tile = [r[channels, columns].double() for r in rows]
        step, zero = (t[channels] for t in grid)
        values = (torch.stack(tile[:-1]) - zeros[:, channels]) * steps[:, channels]
        midpoint = torch.tensordot(lam, values, 1)
        position = midpoint / step
        nearest = position.round() + zero
        to_tie = (position - position.floor() - 0.5).abs()
        residue, distances = (tile[-1] - zero) * step - midpoint, midpoint - values
        at_bounds = sum(((c == low) | (c == high)).sum() for c, (low, high) in zip(tile, bounds, strict=False))
        sums = (
            (to_tie < 0.25).sum(),
            (to_tie <= TIE).sum(),
            ((nearest < qmin) | (nearest > qmax)).sum(),
            at_bounds,
            residue.square().sum(),
            midpoint.square().sum(),
            *distances.square().sum((1, 2)),
            *(distances * residue).sum((1, 2)),
            *values.square().sum((1, 2)),
            *pdist(values.flatten(1)).square(),
            *pdist((values / step).flatten(1)).square(),
        )
        totals += torch.stack([s.double() for s in sums])

    elements = max(shape.numel(), 1)
    ambiguous, ties, clipped, at_bounds, error, length = totals[:6].tolist()
    squares, products, lengths = totals[6 : 6 + 3 * count].view(3, count)
    norms, apart = lengths.sqrt().mean(), totals[6 + 3 * count :].sqrt().view(2, -1).amax(1)
    ratio = steps.amax(0) / steps.amin(0)
    similarity = merged.similarity if len(merged.similarity) else cosines(squares, products[None], totals[4:5, None])
    scores = similarity.amin(1)
    return LayerReadiness(
        name,
        shape.numel(),
        ambiguous=ambiguous / elements,
        ties=ties / elements,
        scale_ratio=float(ratio.max()),
        mean_scale_ratio=float(ratio.mean()),
        distance=_over(float(apart[0]), float(norms)),
        steps_apart=float(apart[1]) / elements**0.5,
        lowest_cosine=float(scores.min()),
        highest_cosine=float(scores.max()),
        kept_cosine=float(scores[merged.draw]),
        clipped=clipped / elements,
        at_bounds=at_bounds / (elements * count),
        rounding_error=_over(error, length) ** 0.5,
    )


def _rows(x: torch.Tensor, axis: int | None) -> torch.Tensor:
    """``x`` as (channels, elements of each)."""
    return x.reshape(1, -1) if axis is None else x.unsqueeze(-1).transpose(0, axis).flatten(1)


def _tiles(shape: torch.Size) -> Iterator[tuple[slice, slice]]:
    """Slices that part a matrix into tiles of at most ``CHUNK`` elements."""
    high, wide = shape
    width = min(max(wide, 1), CHUNK)
    height = CHUNK // width
    for top in range(0, high, height):
        for left in range(0, wide, width):
            yield slice(top, top + height), slice(left, left + width)


def _over(a: float, b: float) -> float:
    return a / b if b else 0.0


# Where merging stops working, measured on the demo's network at 8 and 4 bits, nearest rounding, 30 draws. Distances: a
# model was merged with itself, a share of the channels inside its blocks permuted (the same function, other weights).
# Up to 0.68 the mean accuracy over the domains fell by at most 5 points, at 0.84 by 10 to 14, at 1.03 by 23 to 27,
# and at 1.42 to chance; the demo's own models are 0.49 to 0.69 apart at 8 to 2 bits. Between two models of equal norm
# the distance is 2·sin(angle / 2), and averaging keeps cos(angle / 2) of the norm.
FAR = 0.77  # 45 degrees: the mean keeps 92% of the norm
TOO_FAR = 1.0  # 60 degrees: the mean keeps 87%, and each model is as far from the other as it is from nothing
# Clipping: the demo's "mnist" model at 3 to 8 bits was merged with itself at others, into the range of one of the two.
# Up to 7% clipped in the worst layer cost nothing; 11 to 15% cost 4 to 26 points, 16% and more 32 to 55.
CLIPPED = 0.05
TOO_CLIPPED = 0.10
# Nothing else decides. Scales 25 times apart cost a point where the range of the merged model held the mean (3 and 8
# bits, into 8), and where it does not, weights are clipped. Cosines are high where models are far apart, low where they
# are alike. The rounding error was 0.34 at 2 bits where merging worked (HDRQ), and 0.33 where it did not (nearest,
# whose models do not work by themselves either).
LIMITS = (  # a field of LayerReadiness, the limit of merging with ease, the limit of merging at all, a message
    ("distance", FAR, TOO_FAR, "models are {:.2f} of their norm apart"),
    ("clipped", CLIPPED, TOO_CLIPPED, "{:.0%} of the weights are clipped"),
)


@dataclass(frozen=True)
class Readiness:
    """How well models merge: every layer, the total, and a verdict. Each model is taken to work by itself.

    Raises:
        ValueError: no layers.
    """

    layers: tuple[LayerReadiness, ...]

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("layers must be one or more, got none")

    @property
    def total(self) -> LayerReadiness:
        """The mean of every number over the layers, weighted by their elements."""
        elements = sum(layer.elements for layer in self.layers)
        means = {
            field: sum(layer.elements * getattr(layer, field) for layer in self.layers) / max(elements, 1)
            for field in NUMBERS
        }
        return LayerReadiness("total", elements, **means)

    @property
    def verdict(self) -> str:
        """``"ready"``, ``"ready, with care: …"`` or ``"not ready: …"``, by the worst layer: one spoils a network."""
        care: list[str] = []
        stop: list[str] = []
        for field, careful, failing, says in LIMITS:
            worst = max(self.layers, key=lambda layer: getattr(layer, field))
            value = getattr(worst, field)
            if value > careful:
                limit, reasons = (failing, stop) if value > failing else (careful, care)
                count = sum(getattr(layer, field) > limit for layer in self.layers)
                beyond = f"over {limit:g} in {count} of {len(self.layers)} layers"
                reasons.append(f"{says.format(value)} in {worst.name} ({beyond})")
        if stop:
            return f"not ready: {'; '.join(stop)}"
        return f"ready, with care: {'; '.join(care)}" if care else "ready"

    def as_dict(self) -> dict:
        """The verdict, the total and the layers, for JSON."""
        return {
            "verdict": self.verdict,
            "total": asdict(self.total),
            "layers": [asdict(layer) for layer in self.layers],
        }


def check_ready(found: Readiness, unready: str) -> None:
    """Say that models were not ready to be merged, as their dry run would.

    Args:
        unready: ``"warn"``, or ``"refuse"``.

    Raises:
        ValueError: they are not ready, and that is refused.
    """
    if not found.verdict.startswith("not ready"):
        return
    if unready == "refuse":
        raise ValueError(f"models must be ready to be merged, got {found.verdict}; --force merges them all the same")
    warnings.warn(f"models are merged that are {found.verdict}", stacklevel=4)
