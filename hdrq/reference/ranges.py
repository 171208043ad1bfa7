"""The scale with the least error: a search over clip thresholds."""

from __future__ import annotations

import numpy as np

from hdrq.reference import sum_but
from hdrq.reference.fakequant import fake_quantize

SMALLEST = np.float32(2**-126)


def search_scale(x, qmin, qmax, norm=2.4, candidates=100, axis=None) -> np.ndarray:
    """Of ``s_i = (i/candidates)·max|x|/h``, i = 1 … candidates, the one with the least error, the first if several.

    The error is ``Σ |fake_quantize(x, s_i) − x|^norm``: float32 powers, summed in float64, so near-ties may fall either
    way between implementations.

    ``h = (qmax − qmin)/2`` where qmin < 0, else qmax: the threshold ``s_i·h`` is where clipping starts. Unsigned ranges
    take their maximum over x itself. A constant zero gives s = 1; every scale is at least 2⁻¹²⁶.
    """
    others = tuple(i for i in range(x.ndim) if i != axis)
    extent = np.atleast_1d((np.abs(x) if qmin < 0 else np.maximum(x, 0)).max(axis=others, initial=0))
    levels = np.float32((qmax - qmin) / 2 if qmin < 0 else qmax)
    best = np.full(extent.shape, np.inf)
    scale = np.ones(extent.shape, np.float32)
    for i in range(1, candidates + 1):
        trial = np.maximum(extent * np.float32(i / candidates) / levels, SMALLEST).astype(np.float32)
        error = np.abs(fake_quantize(x, trial, qmin, qmax, None, axis) - x) ** np.float32(norm)
        error = sum_but(error, axis)
        better = (error < best) & (extent > 0)
        best, scale = np.where(better, error, best), np.where(better, trial, scale)
    return scale.astype(np.float32)
