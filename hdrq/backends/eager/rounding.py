"""AdaRound in plain PyTorch. Definition: :mod:`hdrq.backends.reference.rounding`."""

from __future__ import annotations

import torch

from hdrq.backends.eager import valid_grid
from hdrq.backends.eager.elementary import power, sigmoid


def _soft(alpha: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    sigma = sigmoid(alpha)
    u = 1.2 * sigma + -0.1
    return u.clamp(0, 1), torch.where((u >= 0) & (u <= 1), 1.2 * sigma * (1 - sigma), 0.0)


def adaround(x, scale, alpha, qmin, qmax, beta, axis, hard, zero_point=None) -> tuple[torch.Tensor, torch.Tensor]:
    s, z = valid_grid(scale, zero_point, x.ndim, axis)
    h = (alpha >= 0).float() if hard else _soft(alpha)[0]
    y = ((torch.floor(x.float() / s) + h + z).clamp(qmin, qmax) - z) * s
    if beta is None:
        return y, alpha.new_zeros(())
    terms = 1 - power((2 * h - 1).abs(), beta.reshape(()))
    return y, terms.sum(dtype=torch.float64).float()


def adaround_backward(grad, grad_penalty, x, scale, alpha, qmin, qmax, beta, axis, zero_point=None) -> torch.Tensor:
    s, z = valid_grid(scale, zero_point, x.ndim, axis)
    h, slope = _soft(alpha)
    q = torch.floor(x.float() / s) + h + z
    total = torch.where((q >= qmin) & (q <= qmax), grad.float() * s, 0.0)
    if beta is not None:
        beta, t = beta.reshape(()), 2 * h - 1
        total = total + torch.sign(t) * ((-2 * beta * grad_penalty) * power(t.abs(), beta - 1))
    return torch.where(slope == 0, 0.0, total * slope)
