"""Family ``fakequant`` in C++ (csrc/fakequant.h)."""

from __future__ import annotations

import torch

import hdrq._C as _C
from hdrq import checks
from hdrq.native import CODES, FLOATS, address, empty, grid, job


def fake_quantize(x, scale, qmin, qmax, zero_point, axis) -> torch.Tensor:
    y = empty(x.shape, x.dtype)
    _C.fake_quantize(job(x), FLOATS[x.dtype], address(x), address(y), grid(x, scale, zero_point, qmin, qmax, axis))
    return y


def fake_quantize_backward(grad, x, scale, qmin, qmax, zero_point, axis, grad_scale) -> tuple:
    grad_x, total = empty(x.shape, x.dtype), torch.empty(scale.numel(), dtype=torch.float64)
    tensors = (address(grad), address(x), address(grad_x), address(total))
    _C.fake_quantize_backward(job(x), FLOATS[x.dtype], *tensors, grid(x, scale, zero_point, qmin, qmax, axis))
    return grad_x, (total * grad_scale).float()


def quantize(x, scale, qmin, qmax, zero_point, axis) -> tuple[torch.Tensor, torch.Tensor]:
    codes = empty(x.shape, checks.code_range(qmin, qmax))
    on = grid(x, scale, zero_point, qmin, qmax, axis)
    nan = _C.quantize(job(x), FLOATS[x.dtype], address(x), CODES[codes.dtype], address(codes), on)
    return codes, torch.tensor([nan])


def dequantize(codes, scale, zero_point, axis) -> torch.Tensor:
    y = empty(codes.shape, torch.float32)
    on = grid(codes, scale, zero_point, 0, 1, axis)  # the range plays no part
    _C.dequantize(job(codes), CODES[codes.dtype], address(codes), address(y), on)
    return y
