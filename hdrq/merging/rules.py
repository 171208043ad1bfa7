"""Baselines of a merge: fixed rules on the integers, and rounding the float mean anew."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hdrq import checks, ops
from hdrq.backends.eager import per_element
from hdrq.backends.eager.merging import weighted_sum
from hdrq.ops import MergedTensor
from hdrq.rng import rng_state

RULES = ("half-even", "half-up", "half-away", "requantize")


def merge_rule(
    codes: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor],
    qmin: int,
    qmax: int,
    rule: str,
    *,
    weights: Sequence[float] | None = None,
    zero_points: Sequence[torch.Tensor] | None = None,
    ranges: Sequence[tuple[int, int]] | None = None,
    axis: int | None = None,
    extrapolate: bool = False,
) -> MergedTensor:
    """Average K quantized tensors into one by a fixed rule. Arguments and Δ*, z* are those of :func:`hdrq.ops.merge`.

    Equation, in float32, with ``m = Σ λ_k·(I_k − z_k)·Δ_k``: ``I* = clamp(rounded(m / Δ*) + z*, qmin, qmax)``.
    ``"half-even"`` is also a rule there; ``"half-up"`` rounds ties towards +∞, ``"half-away"`` away from 0.
    ``"requantize"`` takes m as a float tensor: its scale is searched anew (its zero point too, if zero points are
    given) and it is rounded to nearest. The first three differ at ties only. Where scales were learned there are hardly
    any ties: of two models a step apart, all three rules take the one of the greater ``λ_k·Δ_k``.

    Args:
        codes: int8 or int16, of one shape.
        rule: one of ``RULES``.
        extrapolate: allow negative weights, and with ``"requantize"`` weights of any sum.

    Raises:
        TypeError, ValueError: "X must be …, got …".
    """
    checks.choice("rule", rule, RULES)
    if rule == "requantize":
        mean = _midpoint(codes, scales, weights, zero_points, axis, extrapolate)
        return _nearest(mean, qmin, qmax, axis, zero_points is not None, len(codes))
    unused = rng_state(0, device=codes[0].device)
    options: dict[str, Any] = {"weights": weights, "zero_points": zero_points, "ranges": ranges, "axis": axis}
    even = ops.merge(codes, scales, qmin, qmax, unused, rule="half-even", extrapolate=extrapolate, **options)
    if rule == "half-even":
        return even
    mean = _midpoint(codes, scales, weights, zero_points, axis, extrapolate)
    step, zero = (per_element(t, mean.ndim, axis) for t in (even.scale, even.zero_point))
    position = mean / step
    rounded = _half_up(position) if rule == "half-up" else _half_up(position.abs()).copysign(position)
    return even._replace(codes=(rounded + zero).clamp(qmin, qmax).to(even.codes.dtype))


def _half_up(x: torch.Tensor) -> torch.Tensor:
    """Round to nearest, ties upwards. ``floor(x + ½)`` rounds the sum, so that 0.49999997 would become 1."""
    low = x.floor()
    return torch.where(x - low >= 0.5, low + 1, low)


def _midpoint(codes, scales, weights, zero_points, axis, extrapolate) -> torch.Tensor:
    """``Σ λ_k·(I_k − z_k)·Δ_k`` with the bits that :func:`hdrq.ops.merge` rounds."""
    lam = torch.tensor(
        checks.mixing_weights(weights, len(codes), extrapolate, any_sum=extrapolate),
        dtype=torch.float32,
        device=codes[0].device,
    )
    zeros = [torch.zeros_like(s) for s in scales] if zero_points is None else zero_points
    values = [
        (c.float() - per_element(z, c.ndim, axis)) * per_element(s, c.ndim, axis)
        for c, s, z in zip(codes, scales, zeros, strict=True)
    ]
    return weighted_sum(lam.unbind(), values)


def _nearest(x, qmin, qmax, axis, affine, models) -> MergedTensor:
    if affine:
        scale, zero_point = ops.search_affine(x, qmin, qmax, axis=axis)
    else:
        scale = ops.search_scale(x, qmin, qmax, axis=axis)
        zero_point = torch.zeros_like(scale)
    codes = ops.quantize(x, scale, qmin, qmax, zero_point=zero_point, axis=axis)
    similarity = scale.new_empty((0, models), dtype=torch.float64)
    return MergedTensor(codes, scale, similarity, scale.new_zeros((), dtype=torch.int64), zero_point)
