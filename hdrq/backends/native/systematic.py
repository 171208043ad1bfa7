"""Family ``systematic`` in C++ (csrc/systematic.h)."""

from __future__ import annotations

import torch

import hdrq._C as _C
from hdrq.backends.eager.merging import merged_grid
from hdrq.backends.native import address, threads
from hdrq.backends.native.merging import merge_inputs, merged_codes


def merge_systematic(
    codes, scales, zero_points, qmin, qmax, rng, weights, tau, axis, shape, signed, packed
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    step, zero = merged_grid(torch.tensor(weights, dtype=torch.float32).unbind(), scales, zero_points)
    inputs = merge_inputs(codes, scales, zero_points, step, zero, qmin, qmax, rng, weights, axis, shape, signed)
    merged, code = merged_codes(shape, qmin, qmax, packed)
    _C.merge_systematic(_C.Job(shape.numel(), threads()), inputs, tau, code, address(merged))
    return merged, step, zero
