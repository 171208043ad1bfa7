"""Family ``merge``: one quantized tensor from several, on their integers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from hdrq import checks
from hdrq.backends import implementation
from hdrq.ops._library import register

NOISES = ("all", "odd", "none")


class MergedTensor(NamedTuple):
    """What :func:`merge` returns."""

    codes: torch.Tensor  # int8 or int16, shaped as the inputs
    scale: torch.Tensor  # float32: Δ* = Σ λ_k·Δ_k
    similarity: torch.Tensor  # float64 (draws, K): the cosine of each draw's step from each model
    draw: torch.Tensor  # int64, zero-dimensional: the draw kept


def merge(
    codes: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor],
    qmin: int,
    qmax: int,
    rng: torch.Tensor,
    *,
    weights: Sequence[float] | None = None,
    draws: int = 1,
    noise: str = "all",
    axis: int | None = None,
) -> MergedTensor:
    """Average K quantized tensors into one, with noise-sampled rounding; no float originals are needed.

    Equation, in float32::

        Δ* = Σ_k λ_k·Δ_k,  I* = clamp(round_half_even(Σ_k λ_k·(I_k·Δ_k + n_k·Δ_k) / Δ*), qmin, qmax),  n_k ~ U[−½, ½)

    Without noise the mean of two integers whose sum is odd lies half-way, and the tie rule would decide for all of them
    alike. Several draws may be made; the one whose step from each model is best aligned with the step to the midpoint
    (greatest smaller cosine) is kept. Noise of input k in draw d comes from ``stream + k``, ``step + d``.

    Args:
        codes: 2 to 64 tensors, int8 or int16, of one shape, dtype and device, inside [qmin, qmax].
        scales: as many float32 tensors, of one element, or ``codes[0].shape[axis]`` elements each.
        qmin, qmax: the integer range of the result.
        rng: :func:`hdrq.rng_state`.
        weights: λ, one per tensor, not negative, summing to 1; None for 1/K each.
        draws: how many roundings to try, at least 1.
        noise: on ``"all"`` elements, where the sum of two integers is ``"odd"`` (two inputs, λ = ½), or ``"none"``.
        axis: the axis along which the scales vary.

    Raises:
        TypeError, ValueError: "X must be …, got …".

    Source: HDRQ (Shin et al., ICML 2025), Eq. 12, generalised to K models.
    """
    count = checks.integer("the number of tensors", len(codes), 2, 64)
    if len(scales) != count:
        raise ValueError(f"scales must be as many as codes, {count}, got {len(scales)}")
    lam = checks.mixing_weights(weights, count)
    checks.choice("noise", noise, NOISES)
    if noise == "odd" and (count != 2 or lam != (0.5, 0.5)):
        raise ValueError(f'noise must be "all" or "none" but for two tensors of equal weight, got "odd" for λ = {lam}')
    codes, scales = list(codes), list(scales)
    _check(codes, scales, qmin, qmax, rng, lam, draws, noise, axis)
    return MergedTensor(*_merge_op(codes, scales, qmin, qmax, rng, list(lam), draws, noise, axis))


def _check(codes, scales, qmin, qmax, rng, weights, draws, noise, axis) -> int | None:
    first = checks.tensor("codes[0]", codes[0], checks.CODES)
    checks.quant_range(qmin, qmax)
    checks.rng(rng, first.device)
    checks.integer("draws", draws, 1, 2**16)
    axis = checks.axis_of(first, axis)
    for k, (code, scale) in enumerate(zip(codes, scales, strict=True)):
        checks.tensor(f"codes[{k}]", code, (first.dtype,), first.device)
        checks.same_shape(f"codes[{k}]", code, "codes[0]", first)
        checks.per_axis(f"scales[{k}]", scale, first, axis)
    return axis


def _merge(codes, scales, qmin, qmax, rng, weights, draws, noise, axis=None):
    axis = _check(codes, scales, qmin, qmax, rng, weights, draws, noise, axis)
    for k, (code, scale) in enumerate(zip(codes, scales, strict=True)):
        checks.scale_values(f"scales[{k}]", scale)
        checks.code_values(f"codes[{k}]", code, qmin, qmax)
    run = implementation("merge", "merge", codes[0])
    codes, scales = [c.contiguous() for c in codes], [s.flatten() for s in scales]
    return run(codes, scales, qmin, qmax, rng, weights, draws, noise, axis)


def _merge_fake(codes, scales, qmin, qmax, rng, weights, draws, noise, axis=None):
    axis = _check(codes, scales, qmin, qmax, rng, weights, draws, noise, axis)
    first = codes[0]
    length = 1 if axis is None else first.shape[axis]
    return (
        first.new_empty(first.shape, dtype=checks.code_range(qmin, qmax)),
        first.new_empty(length, dtype=torch.float32),
        first.new_empty((draws, len(codes)), dtype=torch.float64),
        first.new_empty((), dtype=torch.int64),
    )


_merge_op = register(
    "merge(Tensor[] codes, Tensor[] scales, int qmin, int qmax, Tensor rng, float[] weights, int draws, str noise, "
    "int? axis=None) -> (Tensor, Tensor, Tensor, Tensor)",
    _merge,
    _merge_fake,
)
