"""Fake-quantize with the straight-through gradient, and the integer codes themselves (METHOD.md, Eq. 8; LSQ)."""

from __future__ import annotations

import numpy as np

from hdrq import rng as stream
from hdrq.backends.reference import per_element, straight_through
from hdrq.backends.reference.drop import keep_mask


def _divide_and_round(x, scale, qmin, qmax, zero_point, axis) -> tuple[np.ndarray, ...]:
    """``v = x/s`` and ``round_half_even(v) + z``, before the clamp, with s and z as they broadcast."""
    s = per_element(scale, x.ndim, axis)
    z = np.zeros_like(s) if zero_point is None else per_element(zero_point, x.ndim, axis)
    v = x / s
    return s, z, v, np.rint(v) + z


def fake_quantize(x, scale, qmin, qmax, zero_point=None, axis=None, rng=None, threshold=stream.KEEP_ALL) -> np.ndarray:
    """``q = clamp(round_half_even(x/s) + z, qmin, qmax)``, ``y = (q − z)·s``, each operation rounded by itself.

    Dropped elements are x itself.
    """
    s, z, _, shifted = _divide_and_round(x, scale, qmin, qmax, zero_point, axis)
    q = np.clip(shifted, np.float32(qmin), np.float32(qmax))
    return np.where(keep_mask(x.shape, threshold, rng), (q - z) * s, x)


def fake_quantize_backward(
    grad, x, scale, qmin, qmax, zero_point=None, axis=None, grad_scale=1.0, rng=None, threshold=stream.KEEP_ALL
) -> tuple:
    """``∂x = g`` where ``qmin ≤ round(v) + z ≤ qmax``, else 0; ``∂s = grad_scale · Σ g·((q − z) − [inside]·v)``.

    A dropped element gives ``∂x = g`` and no term. The sum is float64, rounded once to float32.

    Source: Esser et al., "Learned Step Size Quantization", ICLR 2020.
    """
    _, z, v, shifted = _divide_and_round(x, scale, qmin, qmax, zero_point, axis)
    inside = (shifted >= qmin) & (shifted <= qmax)
    slope = np.clip(shifted, np.float32(qmin), np.float32(qmax)) - z - np.where(inside, v, np.float32(0))
    return straight_through(grad, inside, slope, keep_mask(x.shape, threshold, rng), axis, grad_scale)


def quantize(x, scale, qmin, qmax, zero_point=None, axis=None) -> tuple[np.ndarray, np.ndarray]:
    """The codes ``q``, int8 where the range fits, else int16, and how many elements were NaN (their code is qmin)."""
    *_, shifted = _divide_and_round(x, scale, qmin, qmax, zero_point, axis)
    nan = np.isnan(shifted)
    q = np.where(nan, np.float32(qmin), np.clip(shifted, np.float32(qmin), np.float32(qmax)))
    dtype = np.int8 if qmin >= -128 and qmax <= 127 else np.int16
    return q.astype(dtype), nan.sum(dtype=np.int64).reshape(1)


def dequantize(codes, scale, zero_point=None, axis=None) -> np.ndarray:
    """``y = (q − z)·s``, float32."""
    s = per_element(scale, codes.ndim, axis)
    z = np.zeros_like(s) if zero_point is None else per_element(zero_point, codes.ndim, axis)
    return (codes.astype(np.float32) - z) * s
