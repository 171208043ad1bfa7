"""Fake-quantize and integer codes, in Triton. Definition: :mod:`hdrq.backends.reference.fakequant`."""

import torch
import triton
import triton.language as tl

from hdrq.kernels import _lang as lang
from hdrq.kernels._launch import drops, launch, operand, tiling


@triton.jit
def _grid_of(scale, zero_point, start, i, inner, channels, ROWS: tl.constexpr):
    """The element's scale and zero point."""
    s = lang.valid_scale(lang.per_element(scale, start, i, inner, channels, ROWS))
    z = 0.0 if zero_point is None else lang.per_element(zero_point, start, i, inner, channels, ROWS)
    return s, z


@triton.jit(do_not_specialize=["threshold", "inner", "channels"])
def fake_quantize_kernel(
    y,
    x,
    scale,
    zero_point,
    rng,
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
    s, z = _grid_of(scale, zero_point, start, i, inner, channels, ROWS)
    result = lang.nearest_forward(value, s, z, qmin, qmax)
    if DROP:
        result = tl.where(lang.kept(rng, threshold, start, BLOCK), result, value)
    tl.store(y + start + i, result.to(y.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["threshold", "inner", "channels", "slots"])
def fake_quantize_backward_kernel(
    grad_x,
    row_sums,
    grad,
    x,
    scale,
    zero_point,
    rng,
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
    s, z = _grid_of(scale, zero_point, start, i, inner, channels, ROWS)
    inside, slope = lang.nearest_backward(value, s, z, qmin, qmax)
    if DROP:
        keep = lang.kept(rng, threshold, start, BLOCK)
        inside, slope = inside | ~keep, tl.where(keep, slope, 0.0)
    tl.store(grad_x + start + i, tl.where(inside, g, 0.0).to(grad_x.dtype.element_ty), mask=live)
    lang.store_row_sums(row_sums, g * slope, start, i, live, numel, inner, slots, ROWS, BLOCK)


@triton.jit(do_not_specialize=["inner", "channels"])
def quantize_kernel(
    codes, nan_count, x, scale, zero_point, qmin, qmax, numel, inner, channels, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    i = tl.arange(0, BLOCK)
    live = i < numel - start
    value = tl.load(x + start + i, mask=live, other=0.0).to(tl.float32)
    s, z = _grid_of(scale, zero_point, start, i, inner, channels, ROWS)
    shifted = lang.round_half_even(tl.div_rn(value, s)) + z
    nan = live & (shifted != shifted)
    q = tl.where(nan, qmin, lang.clamp(shifted, qmin, qmax))
    tl.store(codes + start + i, q.to(codes.dtype.element_ty), mask=live)
    found = tl.sum(nan.to(tl.int32)).to(tl.int64)
    tl.atomic_add(nan_count, found, mask=found > 0, sem="relaxed")


@triton.jit(do_not_specialize=["inner", "channels"])
def dequantize_kernel(y, codes, scale, zero_point, numel, inner, channels, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    i = tl.arange(0, BLOCK)
    live = i < numel - start
    q = tl.load(codes + start + i, mask=live, other=0).to(tl.float32)
    s, z = _grid_of(scale, zero_point, start, i, inner, channels, ROWS)
    tl.store(y + start + i, (q - z) * s, mask=live)


def fake_quantize(x, scale, qmin, qmax, zero_point, axis, rng, threshold) -> torch.Tensor:
    x = operand(x)
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    t = tiling(x, axis)
    args = (y, x, scale, zero_point, rng, threshold, float(qmin), float(qmax), t.numel, t.inner, t.channels)
    launch(fake_quantize_kernel, t.count, x, *args, ROWS=t.rows, DROP=drops(threshold), block=t.block)
    return y


def fake_quantize_backward(grad, x, scale, qmin, qmax, zero_point, axis, grad_scale, rng, threshold) -> tuple:
    grad, x = operand(grad), operand(x)
    grad_x = torch.empty_like(x)
    if x.numel() == 0:
        return grad_x, torch.zeros_like(scale)
    t = tiling(x, axis)
    sums = t.row_sums(x.device)
    args = (grad_x, sums, grad, x, scale, zero_point, rng, threshold, float(qmin), float(qmax))
    args += (t.numel, t.inner, t.channels, t.slots)
    launch(fake_quantize_backward_kernel, t.count, x, *args, ROWS=t.rows, DROP=drops(threshold), block=t.block)
    return grad_x, (t.channel_sums(sums) * grad_scale).float()


def quantize(x, scale, qmin, qmax, zero_point, axis) -> tuple[torch.Tensor, torch.Tensor]:
    x = operand(x)
    codes = torch.empty_like(x, dtype=torch.int8 if qmin >= -128 and qmax <= 127 else torch.int16)
    nan_count = torch.zeros(1, dtype=torch.int64, device=x.device)
    if x.numel() > 0:
        t = tiling(x, axis)
        args = (codes, nan_count, x, scale, zero_point, float(qmin), float(qmax), t.numel, t.inner, t.channels)
        launch(quantize_kernel, t.count, x, *args, ROWS=t.rows, block=t.block)
    return codes, nan_count


def dequantize(codes, scale, zero_point, axis) -> torch.Tensor:
    y = torch.empty_like(codes, dtype=torch.float32)
    if codes.numel() == 0:
        return y
    t = tiling(codes, axis)
    args = (y, codes, scale, zero_point, t.numel, t.inner, t.channels)
    # Four elements a thread: 16 bytes of what is written, so that no value need change its thread on the way out.
    launch(dequantize_kernel, t.count, codes, *args, ROWS=t.rows, block=t.block, per_thread=4)
    return y
