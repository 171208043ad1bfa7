"""Family ``merge`` in C++ (csrc/merge.h)."""

from __future__ import annotations

import torch

import hdrq._C as _C
from hdrq import checks
from hdrq.native import CODES, address, empty, job, layout

NOISE = {"all": 0, "odd": 1, "none": 2}  # enum Merge::Noise of csrc/kernels.h


def merge(codes, scales, qmin, qmax, rng, weights, draws, noise, axis) -> tuple[torch.Tensor, ...]:
    first = codes[0]
    lam = torch.tensor(weights, dtype=torch.float32).unbind()
    merged_scale = lam[0] * scales[0]
    for weight, scale in zip(lam[1:], scales[1:], strict=True):
        merged_scale = merged_scale + weight * scale
    inputs = _C.Merge(
        CODES[first.dtype],
        [address(c) for c in codes],
        [address(s) for s in scales],
        address(merged_scale),
        weights,
        *layout(first, axis),
        qmin,
        qmax,
        address(rng),
        NOISE[noise],
    )
    models = len(codes)
    sums = torch.empty(models + draws * (1 + models), dtype=torch.float64)
    _C.merge_score(job(first), inputs, draws, address(sums))
    dd, per_draw = sums[:models], sums[models:].view(draws, 1 + models)
    rr, dr = per_draw[:, :1], per_draw[:, 1:]
    length = (dd * (dd + 2 * dr + rr).clamp(min=0)).sqrt()
    cosines = torch.where(length > 0, (dd + dr) / length, 1.0)
    kept = cosines.amin(dim=1).argmax()
    merged = empty(first.shape, checks.code_range(qmin, qmax))
    _C.merge_codes(job(first), inputs, int(kept), CODES[merged.dtype], address(merged))
    return merged, merged_scale, cosines, kept
