"""Family ``fakequant`` in C++ (csrc/fakequant.h)."""

from __future__ import annotations

import torch

import hdrq._C as _C
from hdrq import checks
from hdrq.backends.native import CODES, FLOATS, address, backward, empty, forward, grid, job, quantizer

ROUNDINGS = {"quotient": 0, "reciprocal": 1, "shifted": 2}  # enum Rounding of csrc/kernels.h
GRADIENTS = {"round-first": 0, "clamp-first": 1, "pass-through": 2}  # enum Gradient


def fake_quantize(x, scale, qmin, qmax, zero_point, axis, rng, threshold, rounding="quotient") -> torch.Tensor:
    q = quantizer(x, scale, zero_point, qmin, qmax, axis, rng, threshold, noise=False, rounding=ROUNDINGS[rounding])
    ((y,), _) = forward([q], [x])
    return y


def fake_quantize_backward(
    grad, x, scale, qmin, qmax, zero_point, axis, grad_scale, rng, threshold,
    rounding="quotient", gradient="round-first", learns_zero_point=False,
) -> tuple:  # fmt: skip
    forms = {"rounding": ROUNDINGS[rounding], "gradient": GRADIENTS[gradient]}
    q = quantizer(x, scale, zero_point, qmin, qmax, axis, rng, threshold, noise=False, **forms)
    grad_z = torch.empty_like(zero_point) if learns_zero_point else torch.empty(0)
    ((grad_x,), (grad_s,)) = backward([q], [grad], [scale], [grad_scale], [0.0], [grad_z] if learns_zero_point else [])
    return grad_x, grad_s, grad_z


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
