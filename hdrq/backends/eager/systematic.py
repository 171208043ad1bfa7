"""Systematic rounding of a merge, in plain PyTorch. Definition: :mod:`hdrq.backends.reference.systematic`."""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from hdrq import rng as stream
from hdrq.backends.eager import packing
from hdrq.backends.eager.merging import inputs, weighted_sum
from hdrq.backends.reference.systematic import GROUP, UNIT


def merge_systematic(
    codes, scales, zero_points, qmin, qmax, rng, weights, tau, axis, shape, signed, packed
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    lam = torch.tensor(weights, dtype=torch.float32, device=rng.device).unbind()
    integers, steps, merged_step, merged_zero = inputs(codes, scales, zero_points, lam, axis, shape, signed)
    v = weighted_sum(lam, [j * s for j, s in zip(integers, steps, strict=True)]) / merged_step
    low = v.floor()
    y = v - low
    near = (y - 0.5).abs() < tau
    p = torch.where(near, y * 2**UNIT, 0.0).int().flatten()
    groups = -(-p.numel() // GROUP)
    rows = pad(p, (0, groups * GROUP - p.numel())).view(groups, GROUP)
    u = (stream.torch_words(rng, groups) >> (32 - UNIT)).int()[:, None]
    passed = rows.cumsum(1, dtype=torch.int32) + u
    up = ((passed >> UNIT) - ((passed - rows) >> UNIT)).flatten()[: p.numel()].view(v.shape)
    q = (torch.where(near, low + up, v.round()) + merged_zero).clamp(qmin, qmax)
    result = q.to(torch.int8 if packed or (qmin >= -128 and qmax <= 127) else torch.int16)
    return packing.pack(result) if packed else result, merged_step.flatten(), merged_zero.flatten()
