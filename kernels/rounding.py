"""AdaRound, in Triton. Definition: :mod:`hdrq.backends.reference.rounding`."""

import torch
import triton
import triton.language as tl

from hdrq.kernels import _elementary as elementary
from hdrq.kernels import _lang as lang
from hdrq.kernels._launch import launch, operand, tiling


@triton.jit
def _soft(alpha):
    """h and its slope."""
    sigma = elementary.sigmoid(alpha)
    u = 1.2 * sigma + -0.1
    slope = tl.where((u >= 0.0) & (u <= 1.0), 1.2 * sigma * (1.0 - sigma), 0.0)
    return lang.clamp(u, 0.0, 1.0), slope


@triton.jit(do_not_specialize=["inner", "channels", "over_inner", "over_channels"])
def adaround_kernel(
    y, penalties, x, scale, zero_point, alpha, beta, qmin, qmax, numel, inner, channels, over_inner, over_channels,
    ROWS: tl.constexpr, GROUP: tl.constexpr, HARD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    start = lang.first_element(numel, BLOCK)
    i = tl.arange(0, BLOCK)
    live = i < numel - start
    value = tl.load(x + start + i, mask=live, other=0.0).to(tl.float32)
    a = tl.load(alpha + start + i, mask=live, other=0.0)
    at = lang.place(start, i, (inner, channels, over_inner, over_channels), ROWS, GROUP, BLOCK)
    s = lang.element_scales(scale, at, ROWS, GROUP)
    z = lang.element_zeros(zero_point, at, ROWS, GROUP)
    if HARD:
        h = tl.where(a >= 0.0, 1.0, 0.0)
    else:
        h, _ = _soft(a)
    q = lang.clamp(lang.floor(tl.div_rn(value, s)) + h + z, qmin, qmax)
    tl.store(y + start + i, ((q - z) * s).to(y.dtype.element_ty), mask=live)
    if beta is not None:
        term = 1.0 - elementary.power(tl.abs(2.0 * h - 1.0), tl.load(beta))
        tl.store(penalties + tl.program_id(0), tl.sum(tl.where(live, term, 0.0)))


@triton.jit(do_not_specialize=["inner", "channels", "over_inner", "over_channels"])
def adaround_backward_kernel(
    grad_alpha, grad, grad_penalty, x, scale, zero_point, alpha, beta, qmin, qmax, numel, inner, channels,
    over_inner, over_channels, ROWS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    start = lang.first_element(numel, BLOCK)
    i = tl.arange(0, BLOCK)
    live = i < numel - start
    value = tl.load(x + start + i, mask=live, other=0.0).to(tl.float32)
    g = tl.load(grad + start + i, mask=live, other=0.0).to(tl.float32)
    at = lang.place(start, i, (inner, channels, over_inner, over_channels), ROWS, GROUP, BLOCK)
    s = lang.element_scales(scale, at, ROWS, GROUP)
    z = lang.element_zeros(zero_point, at, ROWS, GROUP)
    h, slope = _soft(tl.load(alpha + start + i, mask=live, other=0.0))
    q = lang.floor(tl.div_rn(value, s)) + h + z
    total = tl.where((q >= qmin) & (q <= qmax), g * s, 0.0)
    if beta is not None:
        b, t = tl.load(beta), 2.0 * h - 1.0
        pull = (-2.0 * b * tl.load(grad_penalty)) * elementary.power(tl.abs(t), b - 1.0)
        total += tl.where(t > 0.0, pull, tl.where(t < 0.0, -pull, t * 0.0))
    tl.store(grad_alpha + start + i, tl.where(slope == 0.0, 0.0, total * slope), mask=live)


def adaround(x, scale, alpha, qmin, qmax, beta, axis, hard, zero_point=None) -> tuple[torch.Tensor, torch.Tensor]:
    x = operand(x)
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y, alpha.new_zeros(())
    t = tiling(x, axis, groups=True)
    penalties = None if beta is None else alpha.new_empty(t.count)
    args = (y, penalties, x, scale, zero_point, alpha, beta, float(qmin), float(qmax), *t.lengths)
    launch(adaround_kernel, t.count, x, *args, HARD=hard, **t.cut)
    return y, alpha.new_zeros(()) if penalties is None else penalties.sum(dtype=torch.float64).float()


def adaround_backward(grad, grad_penalty, x, scale, alpha, qmin, qmax, beta, axis, zero_point=None) -> torch.Tensor:
    grad, x = operand(grad), operand(x)
    grad_alpha = torch.empty_like(alpha)
    if x.numel() > 0:
        t = tiling(x, axis, groups=True)
        args = (grad_alpha, grad, grad_penalty, x, scale, zero_point, alpha, beta, float(qmin), float(qmax))
        launch(adaround_backward_kernel, t.count, x, *args, *t.lengths, **t.cut)
    return grad_alpha
