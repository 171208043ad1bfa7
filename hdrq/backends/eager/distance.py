"""Distance to the source weights, in plain PyTorch. Definition: :mod:`hdrq.backends.reference.distance`."""

from __future__ import annotations

import torch


def source_distance(w, w_src) -> torch.Tensor:
    d = (w.float() - w_src.float()).double()
    return (d * d).sum().sqrt().float()


def source_distance_backward(grad, distance, w, w_src) -> torch.Tensor:
    factor = torch.where(distance > 0, grad / distance, 0.0)
    return (w.float() - w_src.float()) * factor
