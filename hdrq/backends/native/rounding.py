"""Family ``rounding`` in C++ (csrc/rounding.h)."""

from __future__ import annotations

import torch

import hdrq._C as _C
from hdrq.backends.native import FLOATS, address, empty, grid, job


def adaround(x, scale, alpha, qmin, qmax, beta, axis, hard, zero_point=None) -> tuple[torch.Tensor, torch.Tensor]:
    y = empty(x.shape, x.dtype)
    on = grid(x, scale, zero_point, qmin, qmax, axis)
    tensors = (address(x), address(alpha), address(y))
    penalty = _C.adaround(job(x), FLOATS[x.dtype], *tensors, on, address(beta), hard)
    return y, torch.tensor(penalty, dtype=torch.float32)


def adaround_backward(grad, grad_penalty, x, scale, alpha, qmin, qmax, beta, axis, zero_point=None) -> torch.Tensor:
    grad_alpha = empty(alpha.shape, alpha.dtype)
    on = grid(x, scale, zero_point, qmin, qmax, axis)
    tensors = (address(x), address(alpha), address(grad_alpha))
    arguments = (address(grad), float(grad_penalty), *tensors, on, address(beta))
    _C.adaround_backward(job(x), FLOATS[x.dtype], *arguments)
    return grad_alpha
