"""Fake-quantize with the straight-through gradient, and the integer codes themselves (HDRQ, Eq. 8; LSQ)."""

from __future__ import annotations

import numpy as np

from hdrq import rng as stream
from hdrq.backends.reference import per_element_grid, straight_through
from hdrq.backends.reference.drop import keep_mask


def _divide_and_round(x, scale, zero_point, axis, rounding="quotient") -> tuple[np.ndarray, ...]:
    """``v = x/s``, the rounded integer before the clamp, zero point included, and s and z as they broadcast.

    "quotient": ``round_half_even(v) + z``; "reciprocal": the same of ``v = x·(1/s)``; "shifted": ``round_half_even(v +
    z)``, in which a zero has no sign.
    """
    s, z = per_element_grid(scale, zero_point, x.ndim, axis)
    v = x * (np.float32(1) / s) if rounding == "reciprocal" else x / s
    return s, z, v, np.rint(v + z) + np.float32(0) if rounding == "shifted" else np.rint(v) + z


def fake_quantize(
    x, scale, qmin, qmax, zero_point=None, axis=None, rng=None, threshold=stream.KEEP_ALL, rounding="quotient"
) -> np.ndarray:
    """``q = clamp(round_half_even(x/s) + z, qmin, qmax)``, ``y = (q − z)·s``, each operation rounded by itself.

    Dropped elements are x itself. ``rounding`` says how the integer is found: see ``_divide_and_round``.
    """
    s, z, _, shifted = _divide_and_round(x, scale, zero_point, axis, rounding)
    q = np.clip(shifted, np.float32(qmin), np.float32(qmax))
    return np.where(keep_mask(x.shape, threshold, rng), (q - z) * s, x)


def fake_quantize_backward(
    grad, x, scale, qmin, qmax, zero_point=None, axis=None, grad_scale=1.0, rng=None, threshold=stream.KEEP_ALL,
    rounding="quotient", gradient="round-first", learns_zero_point=False,
) -> tuple:  # fmt: skip
    """``∂x = g`` inside, else 0; ``∂s = grad_scale · Σ g·((q − z) − [inside]·v)``; ``∂z = grad_scale · Σ −g·s``
    outside, an empty tensor unless ``learns_zero_point``.

    Inside is where ``qmin ≤ round(v) + z ≤ qmax`` ("round-first"), where ``qmin ≤ v + z ≤ qmax`` ("clamp-first"), or
    everywhere ("pass-through"). A dropped element gives ``∂x = g`` and no term. Sums are float64, rounded once.

    Source: Esser et al., "Learned Step Size Quantization", ICLR 2020 ("clamp-first"); Bhalgat et al., "LSQ+", 2020 (z).
    """
    s, z, v, shifted = _divide_and_round(x, scale, zero_point, axis, rounding)
    bounded = v + z if gradient == "clamp-first" else shifted
    inside = (bounded >= qmin) & (bounded <= qmax) | (gradient == "pass-through")
    slope = np.clip(shifted, np.float32(qmin), np.float32(qmax)) - z - np.where(inside, v, np.float32(0))
    keep = keep_mask(x.shape, threshold, rng)
    grad_x, grad_s = straight_through(grad, inside, slope, keep, axis, grad_scale)
    if not learns_zero_point:
        return grad_x, grad_s, np.zeros(0, np.float32)
    _, grad_z = straight_through(grad, inside, np.where(inside, np.float32(0), -s), keep, axis, grad_scale)
    return grad_x, grad_s, grad_z


def quantize(x, scale, qmin, qmax, zero_point=None, axis=None) -> tuple[np.ndarray, np.ndarray]:
    """The codes ``q``, int8 where the range fits, else int16, and how many elements were NaN (their code is qmin)."""
    *_, shifted = _divide_and_round(x, scale, zero_point, axis)
    nan = np.isnan(shifted)
    q = np.where(nan, np.float32(qmin), np.clip(shifted, np.float32(qmin), np.float32(qmax)))
    dtype = np.int8 if qmin >= -128 and qmax <= 127 else np.int16
    return q.astype(dtype), nan.sum(dtype=np.int64).reshape(1)


def dequantize(codes, scale, zero_point=None, axis=None) -> np.ndarray:
    """``y = (q − z)·s``, float32."""
    s, z = per_element_grid(scale, zero_point, codes.ndim, axis)
    return (codes.astype(np.float32) - z) * s
