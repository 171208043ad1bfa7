"""Family ``noise`` in C++ (csrc/noise.h)."""

from __future__ import annotations

import torch

import hdrq._C as _C
from hdrq.native import FLOATS, address, empty, grid, job


def noise_quantize(x, scale, qmin, qmax, rng, cumulative, axis) -> torch.Tensor:
    y = empty(x.shape, x.dtype)
    on = grid(x, scale, None, qmin, qmax, axis)
    _C.noise_quantize(job(x), FLOATS[x.dtype], address(x), address(y), on, address(rng), address(cumulative))
    return y


def noise_quantize_backward(grad, x, scale, qmin, qmax, rng, cumulative, axis, grad_scale) -> tuple:
    grad_x, total = empty(x.shape, x.dtype), torch.empty(scale.numel(), dtype=torch.float64)
    tensors = (address(grad), address(x), address(grad_x), address(total))
    on = grid(x, scale, None, qmin, qmax, axis)
    _C.noise_quantize_backward(job(x), FLOATS[x.dtype], *tensors, on, address(rng), address(cumulative))
    return grad_x, (total * grad_scale).float()


def error_histogram(x, scale, qmin, qmax, axis) -> torch.Tensor:
    cumulative = torch.empty(257, dtype=torch.int64)
    on = grid(x, scale, None, qmin, qmax, axis)
    _C.error_histogram(job(x), FLOATS[x.dtype], address(x), address(cumulative), on)
    return cumulative
