"""Noise in place of rounding: ``y = clamp(x + ε)``, ε uniform or empirical, and its gradients (HDRQ, Eq. 8-9)."""

from __future__ import annotations

import numpy as np

from hdrq import rng as stream
from hdrq.backends.reference import per_element, straight_through
from hdrq.backends.reference.drop import keep_mask

BINS = 256


def unit_noise(shape: tuple[int, ...], rng: np.ndarray, cumulative: np.ndarray | None) -> np.ndarray:
    """``n = float(m)·2⁻²⁴ − 0.5``, exact, from one 24-bit integer m per element.

    Uniform: ``m = word >> 8``. Empirical: ``t = (word · N) >> 32`` picks the bin b with ``C[b] ≤ t < C[b+1]``, then
    ``m = (b << 16) | (word & 0xffff)``. An empty histogram, N = 0, is no noise: n = 0.
    """
    word = stream.words(rng, int(np.prod(shape))).reshape(shape).astype(np.uint64)
    if cumulative is None:
        m = word >> np.uint64(8)
    elif cumulative[-1] == 0:
        return np.zeros(shape, np.float32)
    else:
        t = (word * np.uint64(cumulative[-1])) >> np.uint64(32)
        b = np.searchsorted(cumulative.astype(np.uint64), t, side="right").astype(np.uint64) - np.uint64(1)
        m = (b << np.uint64(16)) | (word & np.uint64(0xFFFF))
    return m.astype(np.float32) * np.float32(2**-24) - np.float32(0.5)


def noise_quantize(x, scale, qmin, qmax, rng, cumulative=None, axis=None, threshold=stream.KEEP_ALL) -> np.ndarray:
    """``y = x + n·s``, then ``qmax·s`` where ``x ≥ qmax·s`` and ``qmin·s`` where ``x ≤ qmin·s``.

    A dropped element is x itself. Rounded, each by itself: n·s, x + n·s, qmax·s, qmin·s.
    """
    s = per_element(scale, x.ndim, axis)
    above, below = np.float32(qmax) * s, np.float32(qmin) * s
    y = x + unit_noise(x.shape, rng, cumulative) * s
    y = np.where(x >= above, above, y)
    y = np.where(x <= below, below, y)
    return np.where(keep_mask(x.shape, threshold, rng), y, x)


def noise_quantize_backward(
    grad, x, scale, qmin, qmax, rng, cumulative=None, axis=None, grad_scale=1.0, threshold=stream.KEEP_ALL
) -> tuple:
    """``∂x = g`` strictly inside the range, else 0; ``∂s = grad_scale · Σ g·(n inside, qmax above, qmin below)``.

    A dropped element gives ``∂x = g`` and no term. The sum is float64, rounded once to float32.
    """
    s = per_element(scale, x.ndim, axis)
    above, below = x >= np.float32(qmax) * s, x <= np.float32(qmin) * s
    inside = (x < np.float32(qmax) * s) & (x > np.float32(qmin) * s)
    slope = np.where(inside, unit_noise(x.shape, rng, cumulative), np.float32(0))
    slope = np.where(above, np.float32(qmax), np.where(below, np.float32(qmin), slope))
    return straight_through(grad, inside, slope, keep_mask(x.shape, threshold, rng), axis, grad_scale)


def error_histogram(x, scale, qmin, qmax, axis=None) -> np.ndarray:
    """Cumulative counts C, int64 (257,), of the rounding error in steps over elements strictly inside the range.

    ``v = x/s``, ``r = round_half_even(v) − v``, bin ``clamp(floor((r + 0.5)·256), 0, 255)``; C[0] = 0, C[256] = N.
    """
    s = per_element(scale, x.ndim, axis)
    inside = (x < np.float32(qmax) * s) & (x > np.float32(qmin) * s)
    v = (x / s)[inside]
    r = np.rint(v) - v
    b = np.clip(np.floor((r + np.float32(0.5)) * np.float32(BINS)), 0, BINS - 1).astype(np.int64)
    return np.concatenate([[0], np.cumsum(np.bincount(b, minlength=BINS))]).astype(np.int64)
