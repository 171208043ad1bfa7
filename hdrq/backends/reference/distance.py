"""Distance to the source weights: the pull that keeps adapted models near one another (HDRQ, Section 4.2)."""

from __future__ import annotations

import numpy as np


def source_distance(w, w_src):
    """``‖w − w_src‖₂``: float32 differences, squared and summed in float64, rounded once to float32."""
    d = (w - w_src).astype(np.float64)
    return np.sqrt((d * d).sum()).astype(np.float32).reshape(())


def source_distance_backward(grad, distance, w, w_src) -> np.ndarray:
    """``∂w = g·(w − w_src)/‖w − w_src‖₂``, and 0 where the distance is 0; the factor g/‖·‖ is rounded first."""
    factor = grad / distance if distance > 0 else np.float32(0)
    return (w - w_src) * factor
