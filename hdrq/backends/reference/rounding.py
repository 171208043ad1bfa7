"""AdaRound: rounding up or down as learned, softly at first (Nagel et al., ICML 2020; BRECQ, Li et al., ICLR 2021)."""

from __future__ import annotations

import numpy as np

from hdrq.backends.reference import per_element_grid
from hdrq.backends.reference.elementary import power, sigmoid

STRETCH, OFFSET = np.float32(1.2), np.float32(-0.1)


def _soft(alpha: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``h = clamp(1.2·σ(α) − 0.1, 0, 1)`` and its slope, ``1.2·σ·(1 − σ)`` where nothing is clamped."""
    sigma = sigmoid(alpha)
    u = STRETCH * sigma + OFFSET
    slope = np.where((u >= 0) & (u <= 1), STRETCH * sigma * (np.float32(1) - sigma), np.float32(0))
    return np.clip(u, np.float32(0), np.float32(1)), slope


def adaround(
    x, scale, alpha, qmin, qmax, beta=None, axis=None, hard=False, zero_point=None
) -> tuple[np.ndarray, np.ndarray]:
    """``y = (clamp(floor(x/s) + h + z, qmin, qmax) − z)·s``, h soft, or 1 where α ≥ 0 and else 0; and the
    penalty ``Σ (1 − |2h − 1|^β)``.

    That is a float64 sum of float32 terms, rounded once to float32; 0 without β.
    """
    s, z = per_element_grid(scale, zero_point, x.ndim, axis)
    h = np.where(alpha >= 0, np.float32(1), np.float32(0)) if hard else _soft(alpha)[0]
    y = (np.clip(np.floor(x / s) + h + z, np.float32(qmin), np.float32(qmax)) - z) * s
    if beta is None:
        return y, np.zeros((), np.float32)
    terms = np.float32(1) - power(np.abs(np.float32(2) * h - np.float32(1)), beta.reshape(())[()])
    return y, terms.sum(dtype=np.float64).astype(np.float32).reshape(())


def adaround_backward(
    grad, grad_penalty, x, scale, alpha, qmin, qmax, beta=None, axis=None, zero_point=None
) -> np.ndarray:
    """``∂α = (g·s·[qmin ≤ floor(x/s) + h + z ≤ qmax] − g_pen·2β·|2h − 1|^(β−1)·sign(2h − 1))·h'``."""
    s, z = per_element_grid(scale, zero_point, x.ndim, axis)
    h, slope = _soft(alpha)
    q = np.floor(x / s) + h + z
    total = np.where((q >= qmin) & (q <= qmax), grad * s, np.float32(0))
    if beta is not None:
        b, t = beta.reshape(())[()], np.float32(2) * h - np.float32(1)
        factor = np.float32(-2) * b * grad_penalty
        total = total + np.sign(t) * (factor * power(np.abs(t), b - np.float32(1)))
    return np.where(slope == 0, np.float32(0), total * slope)
