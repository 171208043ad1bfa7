"""Fake-quantize and integer codes, in plain PyTorch. Definition: :mod:`hdrq.backends.reference.fakequant`."""

from __future__ import annotations

import torch

from hdrq.backends.eager import straight_through, valid_grid
from hdrq.backends.eager.drop import keep_mask


def _divide_and_round(x, scale, zero_point, axis, rounding="quotient") -> tuple:
    s, z = valid_grid(scale, zero_point, x.ndim, axis)
    v = x.float() * (1 / s) if rounding == "reciprocal" else x.float() / s
    return s, z, v, torch.round(v + z) + 0.0 if rounding == "shifted" else torch.round(v) + z


def fake_quantize(x, scale, qmin, qmax, zero_point, axis, rng, threshold, rounding="quotient") -> torch.Tensor:
    s, z, _, shifted = _divide_and_round(x, scale, zero_point, axis, rounding)
    y = (shifted.clamp(qmin, qmax) - z) * s
    keep = keep_mask(x.shape, threshold, rng)
    return y if keep is None else torch.where(keep, y, x.float())


def fake_quantize_backward(
    grad, x, scale, qmin, qmax, zero_point, axis, grad_scale, rng, threshold,
    rounding="quotient", gradient="round-first", learns_zero_point=False,
) -> tuple:  # fmt: skip
    s, z, v, shifted = _divide_and_round(x, scale, zero_point, axis, rounding)
    grad = grad.float()
    bounded = v + z if gradient == "clamp-first" else shifted
    inside = (bounded >= qmin) & (bounded <= qmax) | (gradient == "pass-through")
    slope = shifted.clamp(qmin, qmax) - z - torch.where(inside, v, 0.0)
    keep = keep_mask(x.shape, threshold, rng)
    grad_x, grad_s = straight_through(grad, inside, slope, keep, axis, grad_scale)
    if not learns_zero_point:
        return grad_x, grad_s, grad_s.new_empty(0)
    _, grad_z = straight_through(grad, inside, torch.where(inside, 0.0, -s), keep, axis, grad_scale)
    return grad_x, grad_s, grad_z


def quantize(x, scale, qmin, qmax, zero_point, axis) -> tuple[torch.Tensor, torch.Tensor]:
    *_, shifted = _divide_and_round(x, scale, zero_point, axis)
    nan = shifted.isnan()
    q = shifted.clamp(qmin, qmax).masked_fill(nan, qmin)
    dtype = torch.int8 if qmin >= -128 and qmax <= 127 else torch.int16
    return q.to(dtype), nan.sum().reshape(1)


def dequantize(codes, scale, zero_point, axis) -> torch.Tensor:
    s, z = valid_grid(scale, zero_point, codes.ndim, axis)
    return (codes.float() - z) * s
