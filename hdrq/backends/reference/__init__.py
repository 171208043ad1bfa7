"""The definition: every op in NumPy, in the order of its equation.

All other implementations are checked against this one, bit for bit. Arguments are arrays; ``x`` is float32 (half types
are widened before and rounded once, to nearest even, after); every arithmetic operation is a float32 operation,
rounded by itself, unless the function says otherwise.
"""

from __future__ import annotations

import numpy as np


def per_element(values: np.ndarray, ndim: int, axis: int | None) -> np.ndarray:
    """A scale or zero point in the shape that broadcasts over a tensor of ``ndim`` dimensions along ``axis``."""
    shape = [1] * ndim
    if axis is not None:
        shape[axis] = -1
    return values.reshape(shape)


def per_element_grid(scale: np.ndarray, zero_point: np.ndarray | None, ndim: int, axis: int | None) -> tuple:
    """Scale and zero point as :func:`per_element` has them; zeros for no zero point."""
    s = per_element(scale, ndim, axis)
    return s, np.zeros_like(s) if zero_point is None else per_element(zero_point, ndim, axis)


def sum_but(values: np.ndarray, axis: int | None) -> np.ndarray:
    """The float64 sum over all axes but ``axis``: one element for each element of the scale."""
    others = tuple(i for i in range(values.ndim) if i != axis)
    return np.atleast_1d(values.sum(axis=others, dtype=np.float64))


def straight_through(grad, inside, slope, keep, axis: int | None, grad_scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Gradients of a quantizer: ``∂x`` is g inside and where dropped, else 0; ``∂s = grad_scale · Σ_kept g·slope``."""
    terms = np.where(keep, grad.astype(np.float64) * slope, 0.0)
    grad_s = sum_but(terms, axis) * grad_scale
    return np.where(inside | ~keep, grad, np.float32(0)), grad_s.astype(np.float32)
