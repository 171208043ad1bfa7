"""What the search for a scale is made of: errors of candidates on rows of values, and tables of the values.

The search itself is in :mod:`hdrq.ops.ranges`, once for all backends; the tests hold it against an exhaustive one.
"""

from __future__ import annotations

import numpy as np


def range_errors(x, weights, scale, low, high, unit, norm) -> np.ndarray:
    """``errors[r, c] = Σ w·(|x − clamp(round_half_even(x/s), low, high)·s| / unit)^norm`` over row r, float64.

    s, low and high are those of candidate c in row r: (rows, candidates). ``x`` and ``weights`` (None: 1) are
    (rows, length), ``unit`` is (rows,). The difference is the float32 one of ``fake_quantize`` (low = qmin − z, high =
    qmax − z); the rest is float64. Others take powers of float32, to 1e-6.
    """
    errors = np.empty(scale.shape)
    for c in range(scale.shape[1]):
        s, lowest, highest = (t[:, c : c + 1] for t in (scale, low, high))
        e = np.abs(x - np.clip(np.rint(x / s), lowest, highest) * s)
        power = (e.astype(np.float64) / unit[:, None]) ** norm
        errors[:, c] = np.sum(power if weights is None else power * weights, axis=1)
    return errors


def range_table(x, origin, factor, bins) -> np.ndarray:
    """``table[r, b]``: how many elements of row r lie in bin b, and the sum of their offsets in it; int64.

    An element's position is the integer part of ``(x/2 − origin)·factor``, clamped to [0, 2²⁴): its upper bits are the
    bin, of a power of two, the rest is the offset. Every operation is a float32 one; ``origin`` and ``factor`` are
    (rows,).
    """
    position = (x * np.float32(0.5) - origin[:, None]) * factor[:, None]
    position = np.clip(position, np.float32(0), np.float32(2**24 - 1)).astype(np.int64)
    width = 2**24 // bins
    cell = (np.arange(len(x))[:, None] * bins + position // width).ravel()
    count = np.bincount(cell, minlength=len(x) * bins)
    offsets = np.bincount(cell, (position % width).ravel(), len(x) * bins)  # float64, exact
    return np.stack((count, offsets), axis=1).astype(np.int64).reshape(-1, bins, 2)
