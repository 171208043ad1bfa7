"""Merges to compare noise-sampled rounding with: naive rules on the integers, and rounding a float mean anew."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from hdrq import checks, ops
from hdrq.eager import per_element
from hdrq.eager.merge import weighted_sum
from hdrq.rng import rng_state

RULES = ("half-even", "half-up", "half-away", "requantize")
SAMPLED = "noise-sampled"  # the rule of hdrq.ops.merge, in compare


class RuleMerge(NamedTuple):
    """What a baseline made, as :class:`hdrq.ops.MergedTensor` has it; one draw, so there is none to choose."""

    codes: torch.Tensor  # int8 or int16
    scale: torch.Tensor  # float32
    zero_point: torch.Tensor  # float32


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
) -> RuleMerge:
    """Average K quantized tensors into one by a fixed rule. Arguments and Δ*, z* are those of :func:`hdrq.ops.merge`.

    Equation, in float32, with ``m = Σ λ_k·(I_k − z_k)·Δ_k``: ``I* = clamp(rounded(m / Δ*) + z*, qmin, qmax)``.
    ``"half-even"`` is ``noise="none"`` there; ``"half-up"`` rounds ties towards +∞, ``"half-away"`` away from 0.
    ``"requantize"`` takes m as a float tensor: its scale is searched anew (its zero point too, if zero points are
    given) and it is rounded to nearest. The first three differ at ties only, of which there are hardly any where scales
    were learned: then of two models a step apart each of them takes the one of the greater ``λ_k·Δ_k``.

    Args:
        codes: int8 or int16, of one shape.
        rule: one of ``RULES``.

    Raises:
        TypeError, ValueError: "X must be …, got …".
    """
    checks.choice("rule", rule, RULES)
    options: dict[str, Any] = {"weights": weights, "zero_points": zero_points, "ranges": ranges, "axis": axis}
    even = _half_even(codes, scales, qmin, qmax, **options)
    if rule == "half-even":
        return even
    mean = _midpoint(codes, scales, weights, zero_points, axis)
    if rule == "requantize":
        return _nearest(mean, qmin, qmax, axis, affine=zero_points is not None)
    step, zero = (per_element(t, mean.ndim, axis) for t in (even.scale, even.zero_point))
    position = mean / step
    rounded = _half_up(position) if rule == "half-up" else _half_up(position.abs()).copysign(position)
    return even._replace(codes=(rounded + zero).clamp(qmin, qmax).to(even.codes.dtype))


def float_then_round(
    float_weights: Sequence[torch.Tensor],
    qmin: int,
    qmax: int,
    *,
    weights: Sequence[float] | None = None,
    axis: int | None = None,
) -> RuleMerge:
    """Average float tensors, search the mean's scale (:func:`hdrq.ops.search_scale`) and round to nearest: what merging
    could reach by that if the originals were kept.

    Args:
        float_weights: 1 to 64 tensors of one shape: float32, bfloat16 or float16.
        qmin, qmax: the integer range.
        weights: λ, one per tensor, not negative, summing to 1; None for equal ones.
        axis: the axis along which scales vary.

    Raises:
        TypeError, ValueError: "X must be …, got …".
    """
    floats = list(float_weights)
    checks.integer("the number of tensors", len(floats), 1, 64)
    for k, w in enumerate(floats):
        checks.tensor(f"float_weights[{k}]", w, checks.FLOATS, floats[0].device)
        checks.same_shape(f"float_weights[{k}]", w, "float_weights[0]", floats[0])
    lam = checks.mixing_weights(weights, len(floats))
    return _nearest(weighted_sum(lam, [w.float() for w in floats]), qmin, qmax, axis, affine=False)


def compare(
    codes: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor],
    qmin: int,
    qmax: int,
    rng: torch.Tensor,
    *,
    weights: Sequence[float] | None = None,
    zero_points: Sequence[torch.Tensor] | None = None,
    ranges: Sequence[tuple[int, int]] | None = None,
    axis: int | None = None,
    draws: int = 30,
    mode: str = "exact",
) -> dict[str, float]:
    """The squared distance ``Σ ((I* − z*)·Δ* − m)²`` to the midpoint m, in float64, of every rule and of
    noise-sampled rounding (``SAMPLED``).

    Rounding to nearest is as near as a grid allows. Noise is farther, by ``Σ (λ_k·Δ_k / Δ*)²`` of that where means lie
    evenly between integers, and as near where they are ties. What it gains is not in this number: a rule errs by the
    same function of the integers everywhere, noise independently.

    Raises:
        TypeError, ValueError: "X must be …, got …".
    """
    options: dict[str, Any] = {"weights": weights, "zero_points": zero_points, "ranges": ranges, "axis": axis}
    sampled = ops.merge(codes, scales, qmin, qmax, rng, draws=draws, mode=mode, **options)
    made = {rule: merge_rule(codes, scales, qmin, qmax, rule, **options) for rule in RULES}
    made[SAMPLED] = RuleMerge(sampled.codes, sampled.scale, sampled.zero_point)
    mean = _midpoint(codes, scales, weights, zero_points, axis).double()

    def error(merged: RuleMerge) -> float:
        step, zero = (per_element(t.double(), mean.ndim, axis) for t in (merged.scale, merged.zero_point))
        return float(((merged.codes - zero) * step - mean).square().sum())

    return {rule: error(merged) for rule, merged in made.items()}


def _half_even(codes, scales, qmin, qmax, **options) -> RuleMerge:
    unused = rng_state(0, device=codes[0].device)
    merged = ops.merge(codes, scales, qmin, qmax, unused, noise="none", **options)
    return RuleMerge(merged.codes, merged.scale, merged.zero_point)


def _half_up(x: torch.Tensor) -> torch.Tensor:
    """Not ``floor(x + ½)``, which rounds the sum: 0.49999997 would become 1."""
    low = x.floor()
    return torch.where(x - low >= 0.5, low + 1, low)


def _midpoint(codes, scales, weights, zero_points, axis) -> torch.Tensor:
    """``Σ λ_k·(I_k − z_k)·Δ_k`` with the bits that :func:`hdrq.ops.merge` rounds."""
    lam = torch.tensor(checks.mixing_weights(weights, len(codes)), device=codes[0].device)
    zeros = [torch.zeros_like(s) for s in scales] if zero_points is None else zero_points
    values = [
        (c.float() - per_element(z, c.ndim, axis)) * per_element(s, c.ndim, axis)
        for c, s, z in zip(codes, scales, zeros, strict=True)
    ]
    return weighted_sum(lam.unbind(), values)


def _nearest(x, qmin, qmax, axis, affine) -> RuleMerge:
    if affine:
        scale, zero_point = ops.search_affine(x, qmin, qmax, axis=axis)
    else:
        scale = ops.search_scale(x, qmin, qmax, axis=axis)
        zero_point = torch.zeros_like(scale)
    return RuleMerge(ops.quantize(x, scale, qmin, qmax, zero_point=zero_point, axis=axis), scale, zero_point)
