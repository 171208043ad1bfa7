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
    draw = (NOISE[noise], mode == "fast")
    inputs = merge_inputs(codes, scales, zero_points, step, zero, qmin, qmax, rng, weights, axis, shape, signed, *draw)
    work, models = _C.Job(shape.numel(), threads()), len(codes)
    sums = torch.empty(models + draws * (1 + models), dtype=torch.float64)
    _C.merge_score(work, inputs, draws, address(sums))
    per_draw = sums[models:].view(draws, 1 + models)
    similarity = cosines(sums[:models], per_draw[:, 1:], per_draw[:, :1])
    best = kept(similarity, select)
    merged, code = merged_codes(shape, qmin, qmax, packed)
    _C.merge_codes(work, inputs, int(best), code, address(merged))
    return merged, step, zero, similarity, best


def merge_inputs(
    codes, scales, zero_points, step, zero, qmin, qmax, rng, weights, axis, shape, signed, noise=0, fast=False
):
    """The models, and Δ* and z*, as the kernels take them; all tensors must outlive the call that takes it."""
    return _C.Merge(
        [PACKED[s] if c.dtype == torch.uint8 else CODES[c.dtype] for c, s in zip(codes, signed, strict=True)],
        *([address(t) for t in tensors] for tensors in (codes, scales, zero_points)),
        weights,
        address(step),
        address(zero),
        *((1, shape.numel()) if axis is None else (shape[axis], shape[axis + 1 :].numel())),
        qmin,
        qmax,
        address(rng),
        noise,
        fast,
    )


def merged_codes(shape: torch.Size, qmin: int, qmax: int, packed: bool) -> tuple[torch.Tensor, int]:
    """Memory for the merged codes, and how they lie in it."""
    if packed:
        return empty(torch.Size([(shape.numel() + 1) // 2]), torch.uint8), PACKED[True]
    dtype = checks.code_range(qmin, qmax)
    return empty(shape, dtype), CODES[dtype]
