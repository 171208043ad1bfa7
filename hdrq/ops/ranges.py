"""Family ``ranges``: where a quantizer's scale, and its zero point, start.

Every backend has two functions: the errors of candidates, all in one read of the values, and a table of the values.
What is made of them is here, once.
"""

from __future__ import annotations

import torch

from hdrq import checks
from hdrq.backends.dispatch import implementation
from hdrq.ops._library import grouped, not_differentiable, register

SMALLEST, LARGEST = 2.0**-126, torch.finfo(torch.float32).max  # a scale is a normal float32
BINS = 2**16  # of the largest table that stands for a row
PER_STEP = 64  # bins in a step of the widest scale that a table must have
TRUSTED = 32  # bins in a step of the scale found: of less, its errors say too little
COARSE = 2**9  # points that rank the zero points of a scale
SHORTLIST = 8  # candidates left to rank on the elements, after a table of a long row
AFFINE_SHORTLIST = 256  # candidates left of all scales and zero points
UNCLIPPED = 2.0**22  # a level that no element reaches
ROOM = 2**22  # candidates, or bins, that are in memory at a time


def search_scale(
    x: torch.Tensor,
    qmin: int,
    qmax: int,
    *,
    norm: float = 2.4,
    candidates: int = 100,
    axis: int | None = None,
    group_size: int | None = None,
) -> torch.Tensor:
    """The scale whose quantization error is least in the L_p sense, over evenly spaced clip thresholds.

    Equation: of ``s_i = (i/candidates)·max|x|/h``, i = 1 … candidates, the first with the least
    ``Σ |fake_quantize(x, s_i) − x|^norm``; ``h = (qmax − qmin)/2`` where qmin < 0, else qmax (and then the maximum is
    that of x itself). Its error is within 1e-5 of the least, relative; a long row is ranked by a table of its values
    first, and only the best 8 scales on the elements themselves.

    Args:
        x: float32, bfloat16 or float16, any shape and strides.
        qmin, qmax: the integer range.
        norm: the exponent p, over 0.
        candidates: how many thresholds, at least 1.
        axis: the axis along which a scale of its own is sought for each element; None for one scale.
        group_size: neighbours along the last axis for which a scale of their own is sought; None for no groups.

    Returns:
        float32, one element, ``x.shape[axis]`` elements, or with groups ``(*x.shape[:-1], x.shape[-1] / group_size)``,
        positive and finite: 1 where x is all zero or empty.

    Raises:
        TypeError, ValueError: "X must be …, got …"; x not finite (on a CPU).

    Source: BRECQ (Li et al., ICLR 2021) and the released code of HDRQ, which take p = 2.4 over 100 thresholds.
    """
    rows, axis = grouped(x, None, None, axis, group_size)
    _check(rows, qmin, qmax, norm, candidates, axis)
    scale = _search_op(rows.detach(), qmin, qmax, norm, candidates, axis)
    return scale if group_size is None else scale.view(*x.shape[:-1], x.shape[-1] // group_size)


def search_affine(
    x: torch.Tensor,
    qmin: int,
    qmax: int,
    *,
    norm: float = 2.4,
    candidates: int = 100,
    axis: int | None = None,
    group_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale and zero point whose quantization error is least in the L_p sense.

    Equation: of ``s_i = (i/candidates)·(max(x, 0) − min(x, 0))/(qmax − qmin)``, i = 1 … candidates, and every integer
    z in [qmin, qmax] (0 has a code), the pair with the least ``Σ |fake_quantize(x, s_i, zero_point=z) − x|^norm``:
    25,600 pairs at 8 bits. Its error is within 1e-5 of the least, relative; pairs are ranked by tables of the values
    first, and only the best on the elements themselves.

    Arguments, errors and source as :func:`search_scale`.

    Returns:
        ``(scale, zero_point)``, float32, each shaped as there: a scale is positive and finite, a zero point an integer
        in [qmin, qmax]; where x is all zero or empty, 1 and the one next to 0.
    """
    rows, axis = grouped(x, None, None, axis, group_size)
    _check(rows, qmin, qmax, norm, candidates, axis)
    scale, zero_point = _affine_op(rows.detach(), qmin, qmax, norm, candidates, axis)
    if group_size is None:
        return scale, zero_point
    shape = (*x.shape[:-1], x.shape[-1] // group_size)
    return scale.view(shape), zero_point.view(shape)


def _check(x, qmin, qmax, norm, candidates, axis) -> int | None:
    checks.tensor("x", x, checks.FLOATS)
    checks.quant_range(qmin, qmax)
    checks.integer("candidates", candidates, 1, 2**16)
    if checks.real("norm", norm) <= 0:
        raise ValueError(f"norm must be over 0, got {norm}")
    return checks.axis_of(x, axis)


def _search(x, qmin, qmax, norm=2.4, candidates=100, axis=None) -> torch.Tensor:
    axis = _check(x, qmin, qmax, norm, candidates, axis)
    scale, _ = _least(x, qmin, qmax, norm, candidates, axis, affine=False)
    return scale


def _affine(x, qmin, qmax, norm=2.4, candidates=100, axis=None) -> tuple[torch.Tensor, torch.Tensor]:
    axis = _check(x, qmin, qmax, norm, candidates, axis)
    return _least(x, qmin, qmax, norm, candidates, axis, affine=True)


def _least(x, qmin, qmax, norm, candidates, axis, affine) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale and zero point of each row; a row is the elements of a channel."""
    count = 1 if axis is None else x.shape[axis]
    zero = float(min(max(0, qmin), qmax))
    if x.numel() == 0:
        return x.new_ones(count, dtype=torch.float32), x.new_full((count,), zero, dtype=torch.float32)
    rows = (x if axis is None else x.movedim(axis, 0)).reshape(count, -1).contiguous()
    low, high = (extreme.float() for extreme in (rows.amin(1), rows.amax(1)))
    if x.device.type == "cpu" and not (low.isfinite() & high.isfinite()).all():
        raise ValueError(
            f"x must be finite to search its scale, got {int((~x.isfinite()).sum())} elements that are not"
        )
    levels = (qmax - qmin) / 2 if affine or qmin < 0 else qmax
    if affine:
        extent = high.clamp(min=0) / 2 - low.clamp(max=0) / 2  # of both halved: their difference may overflow
    else:
        extent = torch.maximum(high, -low) if qmin < 0 else high.clamp(min=0)
    fractions = torch.arange(1, candidates + 1, dtype=torch.float32, device=x.device) / candidates
    scales = (extent[:, None] * fractions / levels).clamp(SMALLEST, LARGEST)
    zeros = (
        torch.arange(qmin, qmax + 1, device=x.device).float()
        if affine
        else torch.zeros(1, dtype=torch.float32, device=x.device)
    )
    bins = _bins(rows.shape[1], qmax - qmin, affine)
    at_once = max(1, ROOM // max(candidates * len(zeros), bins))
    found = [
        _least_of_rows(rows[i], low[i], high[i], scales[i], zeros, qmin, qmax, norm, bins)
        for i in (slice(first, first + at_once) for first in range(0, count, at_once))
    ]
    scale, zero_point = (torch.cat(f) for f in zip(*found, strict=True))
    return torch.where(extent > 0, scale, 1.0), torch.where(extent > 0, zero_point, zero)


def _bins(length: int, steps: int, affine: bool) -> int:
    """How many bins stand for a row in a table; 0 where the row itself is as quick. Zero points need many."""
    fewest = PER_STEP << steps.bit_length()
    bins = min(BINS, max(fewest, 1 << (length // 16).bit_length() - 1 if length >= 16 else 0, BINS * affine))
    return bins if fewest <= bins and length >= 4 * bins else 0


def _least_of_rows(x, low, high, scales, zeros, qmin, qmax, norm, bins) -> tuple[torch.Tensor, torch.Tensor]:
    """Of ``scales`` (rows, N) with each of ``zeros`` (Z,), the pair with the least error on each row of x."""
    pairs = (len(x), scales.shape[1], len(zeros))
    scale, zero_point = scales[..., None].expand(pairs).flatten(1), zeros.expand(pairs).flatten(1)

    def errors(points, scale, below, above):
        bounds = (below.contiguous(), above.contiguous())
        unit = scales[:, -1].contiguous()
        return implementation("ranges", "range_errors", x)(*points, scale.contiguous(), *bounds, unit, norm)

    def shortlist(count, errors):
        best = errors.argsort(dim=1, stable=True)[:, :count]  # of equals the first
        return scale.gather(1, best), zero_point.gather(1, best)

    elements = (x, None)
    finest = _table(x, low, high, bins) if bins else elements
    if scale.shape[1] > AFFINE_SHORTLIST and len(zeros) > 1 and x.shape[1] > 2 * COARSE:
        # A zero point only decides what is clipped, and few points tell how far; rounding takes all of them, but once
        # for each scale.
        few = _coarser(*finest) if bins else _table(x, low, high, COARSE)
        unclipped = torch.full_like(scales, UNCLIPPED)
        rounding, known = (errors(points, scales, -unclipped, unclipped) for points in (finest, few))
        clipping = errors(few, scale, qmin - zero_point, qmax - zero_point).view(pairs)
        scale, zero_point = shortlist(AFFINE_SHORTLIST, ((rounding - known)[..., None] + clipping).flatten(1))
    for points, count in ((finest, SHORTLIST), (elements, 1))[not bins :]:
        scale, zero_point = shortlist(count, errors(points, scale, qmin - zero_point, qmax - zero_point))
    if bins:
        width = (high / 2 - low / 2) / (bins / 2)
        again = (scale[:, 0] < TRUSTED * width) & (
            scales[:, 0] < scales[:, -1]
        )  # all their scales on all their elements
        if again.any():
            exact = _least_of_rows(x[again], low[again], high[again], scales[again], zeros, qmin, qmax, norm, 0)
            scale[again, 0], zero_point[again, 0] = exact
    return scale[:, 0], zero_point[:, 0]


def _table(x, low, high, bins) -> tuple[torch.Tensor, torch.Tensor]:
    """Points that stand for the rows of x, and how many elements each: the mean of every bin between low and high."""
    origin = low / 2  # of halves, whose difference does not overflow
    factor = (2.0**24 / (high / 2 - origin)).clamp(max=LARGEST)
    table = implementation("ranges", "range_table", x)(x, origin, factor, bins)
    count, offsets = table.unbind(2)
    first = torch.arange(bins, device=x.device) * (2**24 // bins)
    position = first + offsets / count.clamp(min=1).double() + 0.5
    return (2 * (origin[:, None] + position / factor[:, None])).float(), count.float()


def _coarser(values, weights) -> tuple[torch.Tensor, torch.Tensor]:
    """The same points, merged into COARSE."""
    values, weights = (t.view(len(t), COARSE, -1) for t in (values.double(), weights.double()))
    count = weights.sum(2)
    return ((values * weights).sum(2) / count.clamp(min=1)).float(), count.float()


def _fake(x, qmin, qmax, norm=2.4, candidates=100, axis=None) -> torch.Tensor:
    axis = _check(x, qmin, qmax, norm, candidates, axis)
    return x.new_empty(1 if axis is None else x.shape[axis], dtype=torch.float32)


def _affine_fake(*args) -> tuple[torch.Tensor, torch.Tensor]:
    return _fake(*args), _fake(*args)


_ARGS = "Tensor x, int qmin, int qmax, float norm=2.4, int candidates=100, int? axis=None"
NO_VMAP, NO_GRADIENT = "name the batch's axis with axis", "it is the place where learning a scale starts"
_search_op = register(f"search_scale({_ARGS}) -> Tensor", _search, _fake, no_vmap=NO_VMAP)
_affine_op = register(f"search_affine({_ARGS}) -> (Tensor, Tensor)", _affine, _affine_fake, no_vmap=NO_VMAP)
not_differentiable(_search_op, NO_GRADIENT)
not_differentiable(_affine_op, NO_GRADIENT)
