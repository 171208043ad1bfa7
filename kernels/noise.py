"""Noise in place of rounding, in Triton. Definition: :mod:`hdrq.backends.reference.noise`."""

import torch
import triton
import triton.language as tl

from hdrq.kernels import _lang as lang
from hdrq.kernels._launch import BLOCK, drops, launch, operand, tiling

BINS = tl.constexpr(256)
TILES = 16  # of one histogram program: enough to make its 256 additions to memory few


@triton.jit(do_not_specialize=["threshold", "inner", "channels", "over_inner", "over_channels"])
def noise_quantize_kernel(
    y,
    x,
    scale,
    rng,
    cumulative,
    guide,
    threshold,
    qmin,
    qmax,
    numel,
    inner,
    channels,
    over_inner,
    over_channels,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    DROP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start = lang.first_element(numel, BLOCK)
    i = tl.arange(0, BLOCK)
    live = i < numel - start
    value = tl.load(x + start + i, mask=live, other=0.0).to(tl.float32)
    at = lang.place(start, i, (inner, channels, over_inner, over_channels), ROWS, GROUP, BLOCK)
    s = lang.element_scales(scale, at, ROWS, GROUP)
    seed, stream, step = lang.read_state(rng)
    n = lang.unit_noise(lang.words(seed, stream, step, start, BLOCK, GROUP), cumulative, guide)
    noisy = lang.noise_forward(value, s, n, qmin, qmax)
    if DROP:
        noisy = tl.where(lang.kept(rng, threshold, start, BLOCK), noisy, value)
    tl.store(y + start + i, noisy.to(y.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["threshold", "inner", "channels", "over_inner", "over_channels", "slots"])
def noise_quantize_backward_kernel(
    grad_x,
    row_sums,
    grad,
    x,
    scale,
    rng,
    cumulative,
    guide,
    threshold,
    qmin,
    qmax,
    numel,
    inner,
    channels,
    over_inner,
    over_channels,
    slots,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    SPAN: tl.constexpr,
    DROP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start = lang.first_element(numel, BLOCK)
    i = tl.arange(0, BLOCK)
    live = i < numel - start
    value = tl.load(x + start + i, mask=live, other=0.0).to(tl.float32)
    g = tl.load(grad + start + i, mask=live, other=0.0).to(tl.float32)
    at = lang.place(start, i, (inner, channels, over_inner, over_channels), ROWS, GROUP, BLOCK)
    s = lang.element_scales(scale, at, ROWS, GROUP)
    seed, stream, step = lang.read_state(rng)
    n = lang.unit_noise(lang.words(seed, stream, step, start, BLOCK, GROUP), cumulative, guide)
    inside, slope = lang.noise_backward(value, s, n, qmin, qmax)
    if DROP:
        keep = lang.kept(rng, threshold, start, BLOCK)
        inside, slope = inside | ~keep, tl.where(keep, slope, 0.0)
    tl.store(grad_x + start + i, tl.where(inside, g, 0.0).to(grad_x.dtype.element_ty), mask=live)
    lang.store_row_sums(row_sums, g * slope, start, i, live, numel, inner, slots, ROWS, SPAN, BLOCK)


@triton.jit(do_not_specialize=["inner", "channels", "over_inner", "over_channels"])
def error_histogram_kernel(
    counts, x, scale, qmin, qmax, numel, inner, channels, over_inner, over_channels, ROWS: tl.constexpr,
    GROUP: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, BLOCK)
    total = tl.zeros([BINS], tl.int32)
    for tile in range(TILES):
        start = lang.first_element(numel, TILES * BLOCK) + tile * BLOCK
        live = i < numel - start
        value = tl.load(x + start + i, mask=live, other=0.0).to(tl.float32)
        at = lang.place(start, i, (inner, channels, over_inner, over_channels), ROWS, GROUP, BLOCK)
        divisor = lang.divisors(scale, at, ROWS, GROUP)
        s = divisor[0]
        counted = live & (value < qmax * s) & (value > qmin * s)
        v = lang.quotient(value, divisor, ROWS)
        r = lang.round_half_even(v) - v
        b = tl.where(counted, (r + 0.5) * BINS, 0.0).to(tl.int32)  # r + 0.5 ≥ 0, where truncation is the floor
        total += tl.histogram(tl.minimum(b, BINS - 1), BINS, mask=counted)
    tl.atomic_add(counts + tl.arange(0, BINS), total.to(tl.int64), sem="relaxed")


@triton.jit
def guides_kernel(guides, cumulatives, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """For each histogram 4,096 entries of :func:`_lang.guide_of`, and whether each program's say all: 0 if so."""
    PARTS: tl.constexpr = 4096 // BLOCK
    part = tl.program_id(0) % PARTS
    cell = part * BLOCK + tl.arange(0, BLOCK)
    for k in tl.static_range(COUNT):
        if tl.program_id(0) // PARTS == k:
            entry, hidden = lang.guide_of(cell.to(tl.uint32) << 20, cumulatives[k])
            tl.store(guides + k * (4096 + PARTS) + cell, entry.to(tl.int64, bitcast=True))
            tl.store(guides + k * (4096 + PARTS) + 4096 + part, hidden.to(tl.int64))


def guides(cumulatives: list[torch.Tensor]) -> list[torch.Tensor]:
    """Tables by which ``_lang.unit_noise`` finds a word's bin with one load: made on the device, by one launch."""
    made = cumulatives[0].new_empty((len(cumulatives), 4096 + 4096 // BLOCK))
    programs = len(cumulatives) * (4096 // BLOCK)
    constants = {"COUNT": len(cumulatives), "block": BLOCK, "per_thread": 8}
    launch(guides_kernel, programs, made, made, tuple(cumulatives), **constants)
    return list(made)


def guide(cumulative: torch.Tensor | None) -> torch.Tensor | None:
    return None if cumulative is None else guides([cumulative])[0]


def noise_quantize(x, scale, qmin, qmax, rng, cumulative, axis, threshold) -> torch.Tensor:
    x = operand(x)
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    t = tiling(x, axis, groups=True)
    args = (y, x, scale, rng, cumulative, guide(cumulative), threshold, float(qmin), float(qmax), *t.lengths)
    launch(noise_quantize_kernel, t.count, x, *args, DROP=drops(threshold), **t.cut)
    return y


def noise_quantize_backward(grad, x, scale, qmin, qmax, rng, cumulative, axis, grad_scale, threshold) -> tuple:
    grad, x = operand(grad), operand(x)
    grad_x = torch.empty_like(x)
    if x.numel() == 0:
        return grad_x, torch.zeros_like(scale)
    t = tiling(x, axis, groups=True)
    sums = t.row_sums(x.device)
    args = (grad_x, sums, grad, x, scale, rng, cumulative, guide(cumulative), threshold, float(qmin), float(qmax))
    args += (*t.lengths, t.slots)
    launch(noise_quantize_backward_kernel, t.count, x, *args, SPAN=t.span, DROP=drops(threshold), **t.cut)
    return grad_x, t.channel_sums(sums, grad_scale)


def error_histogram(x, scale, qmin, qmax, axis) -> torch.Tensor:
    x = operand(x)
    counts = torch.zeros(BINS.value + 1, dtype=torch.int64, device=x.device)
    if x.numel() == 0:
        return counts
    t = tiling(x, axis, groups=True)
    programs = triton.cdiv(t.count, TILES)
    args = (counts[1:], x, scale, float(qmin), float(qmax), *t.lengths)
    launch(error_histogram_kernel, programs, x, *args, TILES=TILES, **t.cut)
    return counts.cumsum(0)
