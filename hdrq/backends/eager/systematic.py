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
    up = drawn_together(p, group_words(rng, p.numel())).view(v.shape)
    q = (torch.where(near, low + up, v.round()) + merged_zero).clamp(qmin, qmax)
    result = q.to(torch.int8 if packed or (qmin >= -128 and qmax <= 127) else torch.int16)
    return packing.pack(result) if packed else result, merged_step.flatten(), merged_zero.flatten()


def group_words(rng: torch.Tensor, count: int) -> torch.Tensor:
    """u of every group of ``count`` elements: 20 bits of its word."""
    return (stream.torch_words(rng, -(-count // GROUP)) >> (32 - UNIT)).int()


def drawn_together(p: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Which elements go up, 1 or 0, by their weights p in [0, 2²⁰] and the words of their groups; all are int32."""
    rows = pad(p, (0, len(u) * GROUP - p.numel())).view(len(u), GROUP)
    passed = rows.cumsum(1, dtype=torch.int32) + u[:, None]
    return ((passed >> UNIT) - ((passed - rows) >> UNIT)).flatten()[: p.numel()]
