"""Noise in place of rounding, in plain PyTorch. Definition: :mod:`hdrq.backends.reference.noise`."""

from __future__ import annotations

import torch

from hdrq import rng as stream
from hdrq.backends.eager import straight_through, valid_scale
from hdrq.backends.eager.drop import keep_mask

BINS = 256


def unit_noise(shape: torch.Size, rng: torch.Tensor, cumulative: torch.Tensor | None) -> torch.Tensor:
    """One number in [−½, ½) per element."""
    word = stream.torch_words(rng, shape.numel()).reshape(shape)
    if cumulative is None:
        m = word >> 8
    else:
        t = ((word * cumulative[-1]) >> 32) & stream.LOW  # the mask undoes the signed shift
        b = (torch.searchsorted(cumulative, t, right=True) - 1).clamp_(max=BINS - 1)
        m = (b << 16) | (word & 0xFFFF)
    n = m.float() * 2**-24 - 0.5
    return n if cumulative is None else torch.where(cumulative[-1] > 0, n, 0.0)


def noise_quantize(x, scale, qmin, qmax, rng, cumulative, axis, threshold) -> torch.Tensor:
    x, s = x.float(), valid_scale(scale, x.ndim, axis)
    above, below = qmax * s, qmin * s
    y = x + unit_noise(x.shape, rng, cumulative) * s
    y = torch.where(x >= above, above, y)
    y = torch.where(x <= below, below, y)
    keep = keep_mask(x.shape, threshold, rng)
    return y if keep is None else torch.where(keep, y, x)


def noise_quantize_backward(grad, x, scale, qmin, qmax, rng, cumulative, axis, grad_scale, threshold) -> tuple:
    x, grad, s = x.float(), grad.float(), valid_scale(scale, x.ndim, axis)
    above, below = x >= qmax * s, x <= qmin * s
    inside = (x < qmax * s) & (x > qmin * s)
    slope = torch.where(inside, unit_noise(x.shape, rng, cumulative), 0.0)
    slope = slope.masked_fill(above, qmax).masked_fill(below, qmin)
    return straight_through(grad, inside, slope, keep_mask(x.shape, threshold, rng), axis, grad_scale)


def error_histogram(x, scale, qmin, qmax, axis) -> torch.Tensor:
    x, s = x.float(), valid_scale(scale, x.ndim, axis)
    inside = (x < qmax * s) & (x > qmin * s)
    v = x / s
    r = torch.round(v) - v
    b = ((r + 0.5) * BINS).floor_().clamp_(0, BINS - 1)
    b = torch.where(inside, b, BINS).long().flatten()  # bin 256 takes what is not counted
    counts = torch.zeros(BINS + 1, dtype=torch.int64, device=x.device).scatter_add_(0, b, torch.ones_like(b))
    return torch.cat([counts.new_zeros(1), counts[:BINS].cumsum(0)])
