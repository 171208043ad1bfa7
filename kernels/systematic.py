"""Systematic rounding of a merge, in Triton. Definition: :mod:`hdrq.backends.reference.systematic`.

A tile is a group, so its running sum stays in one program.
"""

import torch
import triton
import triton.language as tl

from hdrq.backends.reference import systematic as definition
from hdrq.kernels import _lang as lang
from hdrq.kernels._codes import alike, input_tile, on_device, store_code
from hdrq.kernels._launch import Tiling, launch, tiling
from hdrq.kernels.merging import merged_grid

SHIFT = tl.constexpr(definition.UNIT)
ONE = tl.constexpr(float(2**definition.UNIT))
FROM_WORD = tl.constexpr(32 - definition.UNIT)


@triton.jit
def _group_word(rng, group):
    """The word of element ``group``, of the four of its counter."""
    seed, stream, step = lang.read_state(rng)
    c0, c1, c2, c3 = lang.philox(seed, stream, step, (group >> 2).to(tl.uint32), tl.cast(0, tl.uint32))
    return tl.where(group % 4 < 2, tl.where(group % 2 == 0, c0, c1), tl.where(group % 2 == 0, c2, c3))


@triton.jit(do_not_specialize=["inner", "channels", "over_inner", "over_channels"])
def merge_systematic_kernel(
    merged, codes, scales, zeros, merged_scale, merged_zero, weights, rng, tau, qmin, qmax,
    numel, inner, channels, over_inner, over_channels,
    MODELS: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr, LAYOUT: tl.constexpr, PACK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    start = lang.first_element(numel, BLOCK)
    i = tl.arange(0, BLOCK)
    at = lang.place(start, i, (inner, channels, over_inner, over_channels), ROWS, GROUP, BLOCK)
    inputs = codes, scales, zeros, numel, channels
    midpoint = tl.zeros([BLOCK], tl.float32)
    for k in range(MODELS):
        integer, delta = input_tile(inputs, k, (start, at), ROWS, GROUP, LAYOUT, BLOCK)
        midpoint += tl.load(weights + k) * (integer * delta)
    v = lang.quotient(midpoint, lang.divisors(merged_scale, at, ROWS, GROUP), ROWS)
    low = lang.floor(v)
    y = v - low
    near = (i < numel - start) & (tl.abs(y - 0.5) < tau)
    p = tl.where(near, y * ONE, 0.0).to(tl.int32)
    passed = tl.cumsum(p, 0) + (_group_word(rng, tl.program_id(0)) >> FROM_WORD).to(tl.int32)
    up = (passed >> SHIFT) - ((passed - p) >> SHIFT)
    q = tl.where(near, low + up.to(tl.float32), lang.round_half_even(v))
    q = lang.clamp(q + lang.element_values(merged_zero, at, ROWS, GROUP), qmin, qmax)
    q = tl.where(q == q, q, qmin)  # a NaN has no code
    store_code(merged, q.to(tl.int32), start, i, numel, PACK, BLOCK)


def merge_systematic(
    codes, scales, zero_points, qmin, qmax, rng, weights, tau, axis, shape, signed, packed
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    result = rng.new_empty(shape, dtype=torch.int8 if packed or (qmin >= -128 and qmax <= 127) else torch.int16)
    merged = rng.new_empty((result.numel() + 1) // 2, dtype=torch.uint8) if packed else result
    codes = alike(codes, shape, signed)
    scales, zeros, lam = torch.stack(scales), torch.stack(zero_points), on_device(weights, torch.float32, rng.device)
    merged_scale, merged_zero = merged_grid(scales, zeros, lam)
    if result.numel() > 0:
        t = _groups(result, axis)
        args = (merged, codes.addresses, scales, zeros, merged_scale, merged_zero, lam, rng, tau)
        constants = {"MODELS": len(weights), "LAYOUT": codes.layout, "PACK": packed}
        launch(merge_systematic_kernel, t.count, rng, *args, float(qmin), float(qmax), *t.lengths, **constants, **t.cut)
    return merged, merged_scale, merged_zero


def _groups(x: torch.Tensor, axis: int | None) -> Tiling:
    """Tiles that are groups, in which a row may begin anywhere."""
    t = tiling(x, axis, groups=True)
    return t if t.block == definition.GROUP else t._replace(rows="short", block=definition.GROUP)
