"""Fake-quantize and integer codes, in plain PyTorch. Definition: :mod:`hdrq.backends.reference.fakequant`."""

from __future__ import annotations

import torch

from hdrq.backends.eager import per_element, straight_through, valid_scale
from hdrq.backends.eager.drop import keep_mask


def _divide_and_round(x, scale, zero_point, axis) -> tuple:
    s = valid_scale(scale, x.ndim, axis)
    z = 0.0 if zero_point is None else per_element(zero_point, x.ndim, axis)
    v = x.float() / s
    return s, z, v, torch.round(v) + z


def fake_quantize(x, scale, qmin, qmax, zero_point, axis, rng, threshold) -> torch.Tensor:
    s, z, _, shifted = _divide_and_round(x, scale, zero_point, axis)
    y = (shifted.clamp(qmin, qmax) - z) * s
    keep = keep_mask(x.shape, threshold, rng)
    return y if keep is None else torch.where(keep, y, x.float())


def fake_quantize_backward(grad, x, scale, qmin, qmax, zero_point, axis, grad_scale, rng, threshold) -> tuple:
    _, z, v, shifted = _divide_and_round(x, scale, zero_point, axis)
    grad = grad.float()
    inside = (shifted >= qmin) & (shifted <= qmax)
    slope = shifted.clamp(qmin, qmax) - z - torch.where(inside, v, 0.0)
    return straight_through(grad, inside, slope, keep_mask(x.shape, threshold, rng), axis, grad_scale)


def quantize(x, scale, qmin, qmax, zero_point, axis) -> tuple[torch.Tensor, torch.Tensor]:
    *_, shifted = _divide_and_round(x, scale, zero_point, axis)
    nan = shifted.isnan()
    q = shifted.clamp(qmin, qmax).masked_fill(nan, qmin)
    dtype = torch.int8 if qmin >= -128 and qmax <= 127 else torch.int16
    return q.to(dtype), nan.sum().reshape(1)


def dequantize(codes, scale, zero_point, axis) -> torch.Tensor:
    z = 0.0 if zero_point is None else per_element(zero_point, codes.ndim, axis)
    return (codes.float() - z) * valid_scale(scale, codes.ndim, axis)
