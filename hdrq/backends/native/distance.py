"""Family ``distance`` in C++ (csrc/distance.h)."""

from __future__ import annotations

import math

import torch

import hdrq._C as _C
from hdrq.backends.native import FLOATS, address, empty, job


def source_distance(w, w_src) -> torch.Tensor:
    return torch.tensor(
        math.sqrt(_C.squared_distance(job(w), FLOATS[w.dtype], address(w), address(w_src))), dtype=torch.float32
    )


def source_distance_backward(grad, distance, w, w_src) -> torch.Tensor:
    y = empty(w.shape, w.dtype)
    factor = float(grad / distance) if distance > 0 else 0.0
    _C.scaled_difference(job(w), FLOATS[w.dtype], address(w), address(w_src), address(y), factor)
    return y
