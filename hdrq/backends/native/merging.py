"""Family ``merging`` in C++ (csrc/merging.h)."""

from __future__ import annotations

import torch

import hdrq._C as _C
from hdrq import checks
from hdrq.backends.eager.merging import cosines, kept, merged_grid
from hdrq.backends.native import CODES, PACKED, address, empty, threads

NOISE = {"all": 0, "odd": 1, "none": 2}  # enum Merge::Noise of csrc/kernels.h


def merge(
    codes, scales, zero_points, qmin, qmax, rng, weights, draws, noise, axis, select, mode, shape, signed, packed
) -> tuple[torch.Tensor, ...]:
    step, zero = merged_grid(torch.tensor(weights, dtype=torch.float32).unbind(), scales, zero_points)
    inputs = _C.Merge(
        [PACKED[s] if c.dtype == torch.uint8 else CODES[c.dtype] for c, s in zip(codes, signed, strict=True)],
        *([address(t) for t in tensors] for tensors in (codes, scales, zero_points)),
        weights,
        address(step),
        address(zero),
        *((1, shape.numel()) if axis is None else (shape[axis], shape[axis + 1 :].numel())),
        qmin,
        qmax,
        address(rng),
        NOISE[noise],
        mode == "fast",
    )
    work, models = _C.Job(shape.numel(), threads()), len(codes)
    sums = torch.empty(models + draws * (1 + models), dtype=torch.float64)
    _C.merge_score(work, inputs, draws, address(sums))
    per_draw = sums[models:].view(draws, 1 + models)
    similarity = cosines(sums[:models], per_draw[:, 1:], per_draw[:, :1])
    best = kept(similarity, select)
    dtype = checks.code_range(qmin, qmax)
    merged = empty(torch.Size([(shape.numel() + 1) // 2]), torch.uint8) if packed else empty(shape, dtype)
    _C.merge_codes(work, inputs, int(best), PACKED[True] if packed else CODES[dtype], address(merged))
    return merged, step, zero, similarity, best
