"""Family ``drop`` in C++ (csrc/drop.h)."""

from __future__ import annotations

import torch

import hdrq._C as _C
from hdrq.backends.native import FLOATS, address, empty, job


def drop_mix(a, b, threshold, rng) -> torch.Tensor:
    y = empty(a.shape, a.dtype)
    _C.drop_mix(job(a), FLOATS[a.dtype], address(a), address(b), address(y), threshold, address(rng))
    return y


def drop_mix_backward(grad, threshold, rng) -> tuple[torch.Tensor, torch.Tensor]:
    grad_a, grad_b = empty(grad.shape, grad.dtype), empty(grad.shape, grad.dtype)
    tensors = (address(grad), address(grad_a), address(grad_b))
    _C.drop_mix_backward(job(grad), FLOATS[grad.dtype], *tensors, threshold, address(rng))
    return grad_a, grad_b
