"""Fake-quantize and integer codes, in Triton. Definition: :mod:`hdrq.backends.reference.fakequant`."""

import torch
import triton
import triton.language as tl

from hdrq.kernels import _lang as lang
from hdrq.kernels._launch import drops, launch, operand, tiling


@triton.jit
def _divided(value, divisor, scale, at, ROUNDING: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr):
    """v: ``x/s``, or x times the reciprocal of s."""
    if ROUNDING == "reciprocal":
        v = value * lang.inverses(scale, at, ROWS, GROUP)
    else:
        v = lang.quotient(value, divisor, ROWS)
    return v


@triton.jit(do_not_specialize=["threshold", "inner", "channels", "over_inner", "over_channels"])
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
    over_inner,
    over_channels,
    ROUNDING: tl.constexpr,
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
    divisor, z = lang.divisors(scale, at, ROWS, GROUP), lang.element_zeros(zero_point, at, ROWS, GROUP)
    v = _divided(value, divisor, scale, at, ROUNDING, ROWS, GROUP)
    result = lang.nearest_forward(lang.rounded(v, z, ROUNDING == "shifted"), divisor[0], z, qmin, qmax)
    if DROP:
        result = tl.where(lang.kept(rng, threshold, start, BLOCK), result, value)
    tl.store(y + start + i, result.to(y.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["threshold", "inner", "channels", "over_inner", "over_channels", "slots"])
def fake_quantize_backward_kernel(
    grad_x,
    row_sums,
    zero_sums,
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
    over_inner,
    over_channels,
    slots,
    ROUNDING: tl.constexpr,
    GRADIENT: tl.constexpr,
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
    divisor, z = lang.divisors(scale, at, ROWS, GROUP), lang.element_zeros(zero_point, at, ROWS, GROUP)
    v = _divided(value, divisor, scale, at, ROUNDING, ROWS, GROUP)
    inside, slope = lang.nearest_backward(v, lang.rounded(v, z, ROUNDING == "shifted"), z, qmin, qmax, GRADIENT)
    if DROP:
        keep = lang.kept(rng, threshold, start, BLOCK)
        inside, slope = inside | ~keep, tl.where(keep, slope, 0.0)
    if zero_sums is not None:
        zero_slope = tl.where(inside, 0.0, -divisor[0])
        lang.store_row_sums(zero_sums, g * zero_slope, start, i, live, numel, inner, slots, ROWS, SPAN, BLOCK)
    tl.store(grad_x + start + i, tl.where(inside, g, 0.0).to(grad_x.dtype.element_ty), mask=live)
    lang.store_row_sums(row_sums, g * slope, start, i, live, numel, inner, slots, ROWS, SPAN, BLOCK)


@triton.jit(do_not_specialize=["inner", "channels", "over_inner", "over_channels"])
def quantize_kernel(
    codes, nan_count, x, scale, zero_point, qmin, qmax, numel, inner, channels, over_inner, over_channels,
    ROWS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    start = lang.first_element(numel, BLOCK)
    i = tl.arange(0, BLOCK)
    live = i < numel - start
    value = tl.load(x + start + i, mask=live, other=0.0).to(tl.float32)
    at = lang.place(start, i, (inner, channels, over_inner, over_channels), ROWS, GROUP, BLOCK)
    divisor, z = lang.divisors(scale, at, ROWS, GROUP), lang.element_zeros(zero_point, at, ROWS, GROUP)
    shifted = lang.rounded(lang.quotient(value, divisor, ROWS), z)
    nan = live & (shifted != shifted)
    q = tl.where(nan, qmin, lang.clamp(shifted, qmin, qmax))
    tl.store(codes + start + i, q.to(codes.dtype.element_ty), mask=live)
    found = tl.sum(nan.to(tl.int32)).to(tl.int64)
    tl.atomic_add(nan_count, found, mask=found > 0, sem="relaxed")


@triton.jit(do_not_specialize=["inner", "channels", "over_inner", "over_channels"])
def dequantize_kernel(
    y, codes, scale, zero_point, numel, inner, channels, over_inner, over_channels,
    ROWS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    start = lang.first_element(numel, BLOCK)
    i = tl.arange(0, BLOCK)
    live = i < numel - start
    q = tl.load(codes + start + i, mask=live, other=0).to(tl.float32)
    at = lang.place(start, i, (inner, channels, over_inner, over_channels), ROWS, GROUP, BLOCK)
    z = lang.element_zeros(zero_point, at, ROWS, GROUP)
    tl.store(y + start + i, (q - z) * lang.element_scales(scale, at, ROWS, GROUP), mask=live)


def fake_quantize(x, scale, qmin, qmax, zero_point, axis, rng, threshold, rounding="quotient") -> torch.Tensor:
    x = operand(x)
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    t = tiling(x, axis, groups=True)
    args = (y, x, scale, zero_point, rng, threshold, float(qmin), float(qmax), *t.lengths)
    launch(fake_quantize_kernel, t.count, x, *args, ROUNDING=rounding, DROP=drops(threshold), **t.cut)
    return y


def fake_quantize_backward(
    grad, x, scale, qmin, qmax, zero_point, axis, grad_scale, rng, threshold,
    rounding="quotient", gradient="round-first", learns_zero_point=False,
) -> tuple:  # fmt: skip
    grad, x = operand(grad), operand(x)
    grad_x = torch.empty_like(x)
    if x.numel() == 0:
        return grad_x, torch.zeros_like(scale), torch.zeros_like(scale) if learns_zero_point else scale.new_empty(0)
    t = tiling(x, axis, groups=True)
    sums = t.row_sums(x.device)
    zero_sums = t.row_sums(x.device) if learns_zero_point else None
    args = (grad_x, sums, zero_sums, grad, x, scale, zero_point, rng, threshold, float(qmin), float(qmax))
    forms = {"ROUNDING": rounding, "GRADIENT": gradient, "DROP": drops(threshold)}
    launch(fake_quantize_backward_kernel, t.count, x, *args, *t.lengths, t.slots, SPAN=t.span, **forms, **t.cut)
    grad_z = scale.new_empty(0) if zero_sums is None else t.channel_sums(zero_sums, grad_scale)
    return grad_x, t.channel_sums(sums, grad_scale), grad_z


def quantize(x, scale, qmin, qmax, zero_point, axis) -> tuple[torch.Tensor, torch.Tensor]:
    x = operand(x)
    codes = torch.empty_like(x, dtype=torch.int8 if qmin >= -128 and qmax <= 127 else torch.int16)
    nan_count = torch.zeros(1, dtype=torch.int64, device=x.device)
    if x.numel() > 0:
        t = tiling(x, axis, groups=True)
        args = (codes, nan_count, x, scale, zero_point, float(qmin), float(qmax), *t.lengths)
        launch(quantize_kernel, t.count, x, *args, **t.cut)
    return codes, nan_count


def dequantize(codes, scale, zero_point, axis) -> torch.Tensor:
    y = torch.empty_like(codes, dtype=torch.float32)
    if codes.numel() == 0:
        return y
    t = tiling(y, axis, groups=True)
    args = (y, codes, scale, zero_point, *t.lengths)
    # Four elements a thread: 16 bytes of what is written, so that no value need change its thread on the way out.
    launch(dequantize_kernel, t.count, codes, *args, **t.cut, per_thread=4)
    return y
