"""Every op in plain PyTorch, on any device: what runs where neither C++ nor Triton does.

The same signatures and the same bits as :mod:`hdrq.backends.reference`. Nothing here reads a device value on the
host: a scale that is not positive and finite becomes NaN, and with it every element that depends on it.
"""

from __future__ import annotations

import torch


def per_element(values: torch.Tensor, ndim: int, axis: int | None) -> torch.Tensor:
    """A scale or zero point in the shape that broadcasts over a tensor of ``ndim`` dimensions along ``axis``."""
    shape = [1] * ndim
    if axis is not None:
        shape[axis] = -1
    return values.reshape(shape)


def valid_scale(scale: torch.Tensor, ndim: int, axis: int | None) -> torch.Tensor:
    """:func:`per_element` of a scale, NaN where it is not positive and finite."""
    return per_element(torch.where((scale > 0) & scale.isfinite(), scale, torch.nan), ndim, axis)


def valid_grid(scale: torch.Tensor, zero_point: torch.Tensor | None, ndim: int, axis: int | None) -> tuple:
    """:func:`valid_scale`, and the zero point as it broadcasts; 0.0 for none."""
    return valid_scale(scale, ndim, axis), 0.0 if zero_point is None else per_element(zero_point, ndim, axis)


def sum_but(values: torch.Tensor, axis: int | None) -> torch.Tensor:
    """The float64 sum over all axes but ``axis``: one element for each element of the scale."""
    if axis is None:
        return values.sum(dtype=torch.float64).reshape(1)
    return values.unsqueeze(-1).transpose(0, axis).flatten(1).sum(dim=1, dtype=torch.float64)


def straight_through(grad, inside, slope, keep, axis: int | None, grad_scale: float) -> tuple:
    """Gradients of a quantizer: ``∂x`` is g inside and where dropped, else 0; ``∂s = grad_scale · Σ_kept g·slope``."""
    terms = grad.double() * slope
    if keep is not None:
        inside, terms = inside | ~keep, torch.where(keep, terms, 0.0)
    return torch.where(inside, grad, 0.0), (sum_but(terms, axis) * grad_scale).float()
