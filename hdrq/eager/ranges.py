"""The search for the scale with the least error, in plain PyTorch. Definition: :mod:`hdrq.reference.ranges`."""

from __future__ import annotations

import torch

from hdrq.eager import sum_but
from hdrq.eager.fakequant import fake_quantize
from hdrq.rng import KEEP_ALL

SMALLEST = 2.0**-126


def search_scale(x, qmin, qmax, norm, candidates, axis) -> torch.Tensor:
    x = x.float()
    length = 1 if axis is None else x.shape[axis]
    size = (x.abs() if qmin < 0 else x.clamp(min=0)).reshape(x.shape if x.ndim else (1,))
    rows = size.reshape(1, -1) if axis is None else size.unsqueeze(-1).transpose(0, axis).flatten(1)
    extent = rows.amax(dim=1) if rows.shape[1] else x.new_zeros(length)
    levels = (qmax - qmin) / 2 if qmin < 0 else qmax
    best = extent.new_full((length,), torch.inf, dtype=torch.float64)
    scale = torch.ones_like(extent)
    for i in range(1, candidates + 1):
        trial = (extent * (i / candidates) / levels).clamp(min=SMALLEST)
        error = sum_but((fake_quantize(x, trial, qmin, qmax, None, axis, None, KEEP_ALL) - x).abs_().pow_(norm), axis)
        better = (error < best) & (extent > 0)
        best, scale = torch.where(better, error, best), torch.where(better, trial, scale)
    return scale
