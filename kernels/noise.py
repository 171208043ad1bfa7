"""Noise in place of rounding, in Triton. Definition: :mod:`hdrq.backends.reference.noise`."""

import torch
import triton
import triton.language as tl

from hdrq.kernels import _lang as lang
from hdrq.kernels._launch import drops, launch, operand, tiling

BINS = tl.constexpr(256)
TILES = 16  # of one histogram program: enough to make its 256 additions to memory few


@triton.jit(do_not_specialize=["threshold", "inner", "channels"])
def noise_quantize_kernel(
    y,
    x,
    scale,
    rng,
    cumulative,
    threshold,
    qmin,
    qmax,
    numel,
    inner,
    channels,
    ROWS: tl.constexpr,
    DROP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    i = tl.arange(0, BLOCK)
    live = i < numel - start
    value = tl.load(x + start + i, mask=live, other=0.0).to(tl.float32)
    s = lang.valid_scale(lang.per_element(scale, start, i, inner, channels, ROWS))
    seed, stream, step = lang.read_state(rng)
    n = lang.unit_noise(lang.words(seed, stream, step, start, BLOCK), cumulative)
    noisy = lang.noise_forward(value, s, n, qmin, qmax)
    if DROP:
        noisy = tl.where(lang.kept(rng, threshold, start, BLOCK), noisy, value)
    tl.store(y + start + i, noisy.to(y.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["threshold", "inner", "channels", "slots"])
def noise_quantize_backward_kernel(
    grad_x,
    row_sums,
    grad,
    x,
    scale,
    rng,
    cumulative,
    threshold,
    qmin,
    qmax,
    numel,
    inner,
    channels,
    slots,
    ROWS: tl.constexpr,
    DROP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    i = tl.arange(0, BLOCK)
    live = i < numel - start
    value = tl.load(x + start + i, mask=live, other=0.0).to(tl.float32)
    g = tl.load(grad + start + i, mask=live, other=0.0).to(tl.float32)
    s = lang.valid_scale(lang.per_element(scale, start, i, inner, channels, ROWS))
    seed, stream, step = lang.read_state(rng)
    n = lang.unit_noise(lang.words(seed, stream, step, start, BLOCK), cumulative)
    inside, slope = lang.noise_backward(value, s, n, qmin, qmax)
    if DROP:
        keep = lang.kept(rng, threshold, start, BLOCK)
        inside, slope = inside | ~keep, tl.where(keep, slope, 0.0)
    tl.store(grad_x + start + i, tl.where(inside, g, 0.0).to(grad_x.dtype.element_ty), mask=live)
    lang.store_row_sums(row_sums, g * slope, start, i, live, numel, inner, slots, ROWS, BLOCK)


@triton.jit(do_not_specialize=["inner", "channels"])
def error_histogram_kernel(
    counts, x, scale, qmin, qmax, numel, inner, channels, ROWS: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr
):
    i = tl.arange(0, BLOCK)
    total = tl.zeros([BINS], tl.int32)
    for tile in range(TILES):
        start = (tl.program_id(0).to(tl.int64) * TILES + tile) * BLOCK
        live = i < numel - start
        value = tl.load(x + start + i, mask=live, other=0.0).to(tl.float32)
        s = lang.valid_scale(lang.per_element(scale, start, i, inner, channels, ROWS))
        counted = live & (value < qmax * s) & (value > qmin * s)
        v = tl.div_rn(value, s)
        r = lang.round_half_even(v) - v
        b = tl.where(counted, (r + 0.5) * BINS, 0.0).to(tl.int32)  # r + 0.5 ≥ 0, where truncation is the floor
        total += tl.histogram(tl.minimum(b, BINS - 1), BINS, mask=counted)
    tl.atomic_add(counts + tl.arange(0, BINS), total.to(tl.int64), sem="relaxed")


def noise_quantize(x, scale, qmin, qmax, rng, cumulative, axis, threshold) -> torch.Tensor:
    x = operand(x)
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    t = tiling(x, axis)
    args = (y, x, scale, rng, cumulative, threshold, float(qmin), float(qmax), t.numel, t.inner, t.channels)
    launch(noise_quantize_kernel, t.count, x, *args, ROWS=t.rows, DROP=drops(threshold), block=t.block)
    return y


def noise_quantize_backward(grad, x, scale, qmin, qmax, rng, cumulative, axis, grad_scale, threshold) -> tuple:
    grad, x = operand(grad), operand(x)
    grad_x = torch.empty_like(x)
    if x.numel() == 0:
        return grad_x, torch.zeros_like(scale)
    t = tiling(x, axis)
    sums = t.row_sums(x.device)
    args = (grad_x, sums, grad, x, scale, rng, cumulative, threshold, float(qmin), float(qmax))
    args += (t.numel, t.inner, t.channels, t.slots)
    launch(noise_quantize_backward_kernel, t.count, x, *args, ROWS=t.rows, DROP=drops(threshold), block=t.block)
    return grad_x, (t.channel_sums(sums) * grad_scale).float()


def error_histogram(x, scale, qmin, qmax, axis) -> torch.Tensor:
    x = operand(x)
    counts = torch.zeros(BINS.value + 1, dtype=torch.int64, device=x.device)
    if x.numel() == 0:
        return counts
    t = tiling(x, axis)
    args = (counts[1:], x, scale, float(qmin), float(qmax), t.numel, t.inner, t.channels)
    programs = triton.cdiv(t.count, TILES)
    launch(error_histogram_kernel, programs, x, *args, ROWS=t.rows, TILES=TILES, block=t.block)
    return counts.cumsum(0)
