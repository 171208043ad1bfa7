"""Family ``noise`` in C++ (csrc/noise.h)."""

from __future__ import annotations

import torch

import hdrq._C as _C
from hdrq.backends.native import FLOATS, address, backward, forward, grid, job, quantizer


def noise_quantize(x, scale, qmin, qmax, rng, cumulative, axis, threshold) -> torch.Tensor:
    q = quantizer(x, scale, None, qmin, qmax, axis, rng, threshold, noise=True, cumulative=cumulative)
    ((y,), _) = forward([q], [x])
    return y


def noise_quantize_backward(grad, x, scale, qmin, qmax, rng, cumulative, axis, grad_scale, threshold) -> tuple:
    q = quantizer(x, scale, None, qmin, qmax, axis, rng, threshold, noise=True, cumulative=cumulative)
    ((grad_x,), (grad_s,)) = backward([q], [grad], [scale], [grad_scale], [0.0])
    return grad_x, grad_s


def error_histogram(x, scale, qmin, qmax, axis) -> torch.Tensor:
    cumulative = torch.empty(257, dtype=torch.int64)
    on = grid(x, scale, None, qmin, qmax, axis)
    _C.error_histogram(job(x), FLOATS[x.dtype], address(x), address(cumulative), on)
    return cumulative
