"""Systematic rounding of a merge, in Triton. Definition: :mod:`hdrq.backends.reference.systematic`.

A tile is a group, so its running sum stays in one program.
"""

import torch
import triton
import triton.language as tl

from hdrq.backends.reference.systematic import GROUP, UNIT
from hdrq.kernels import _lang as lang
from hdrq.kernels._codes import alike, input_tile, store_code
from hdrq.kernels._launch import Tiling, launch
from hdrq.kernels.merging import merged_grid, on_device

SHIFT = tl.constexpr(UNIT)
ONE = tl.constexpr(float(2**UNIT))
FROM_WORD = tl.constexpr(32 - UNIT)


@triton.jit
def _group_word(rng, group):
    """The word of element ``group``: one of the four of its counter."""
    seed, stream, step = lang.read_state(rng)
    four = lang.words(seed, stream, step, group // 4 * 4, 4)
    return tl.sum(tl.where(tl.arange(0, 4) == group % 4, four, 0))


@triton.jit(do_not_specialize=["inner", "channels"])
def merge_systematic_kernel(
    merged, codes, scales, zeros, merged_scale, merged_zero, weights, rng, tau, qmin, qmax,
    numel, inner, channels,
    MODELS: tl.constexpr, ROWS: tl.constexpr, PACKED: tl.constexpr, PACK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    inputs = codes, scales, zeros, inner, channels
    group = tl.program_id(0).to(tl.int64)
    start = group * BLOCK
    i = tl.arange(0, BLOCK)
    live = i < numel - start
    midpoint = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(MODELS):
        integer, delta = input_tile(inputs, k, start, i, live, ROWS, PACKED)
        midpoint += tl.load(weights + k) * (integer * delta)
    v = tl.div_rn(midpoint, lang.per_element(merged_scale, start, i, inner, channels, ROWS))
    low = lang.floor(v)
    y = v - low
    near = live & (tl.abs(y - 0.5) < tau)
    p = tl.where(near, y * ONE, 0.0).to(tl.int32)
    passed = tl.cumsum(p, 0) + (_group_word(rng, group) >> FROM_WORD).to(tl.int32)
    up = (passed >> SHIFT) - ((passed - p) >> SHIFT)
    q = tl.where(near, low + up.to(tl.float32), lang.round_half_even(v))
    q = lang.clamp(q + lang.per_element(merged_zero, start, i, inner, channels, ROWS), qmin, qmax)
    q = tl.where(q == q, q, qmin)  # a NaN has no code
    store_code(merged, q.to(tl.int32), start, i, numel, PACK, BLOCK)


def merge_systematic(
    codes, scales, zero_points, qmin, qmax, rng, weights, tau, axis, shape, signed, packed
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    result = rng.new_empty(shape, dtype=torch.int8 if packed or (qmin >= -128 and qmax <= 127) else torch.int16)
    merged = rng.new_empty((result.numel() + 1) // 2, dtype=torch.uint8) if packed else result
    codes, layout = alike(codes, shape, signed)
    scales, zeros, lam = torch.stack(scales), torch.stack(zero_points), on_device(weights, rng.device)
    merged_scale, merged_zero = merged_grid(scales, zeros, lam)
    if result.numel() > 0:
        t = _groups(result, axis)
        args = (merged, codes, scales, zeros, merged_scale, merged_zero, lam, rng, tau)
        args += (float(qmin), float(qmax), t.numel, t.inner, t.channels)
        constants = {"MODELS": len(weights), "ROWS": t.rows, "PACKED": layout, "PACK": packed}
        launch(merge_systematic_kernel, t.count, rng, *args, block=t.block, **constants)
    return merged, merged_scale, merged_zero


def _groups(x: torch.Tensor, axis: int | None) -> Tiling:
    """Tiles that are groups: a row is "long" only where two of them cover any tile."""
    if axis is None:
        return Tiling(x.numel(), x.numel(), 1, "one", GROUP)
    inner = x.shape[axis + 1 :].numel()
    return Tiling(x.numel(), inner, x.shape[axis], "long" if inner >= GROUP else "short", GROUP)
