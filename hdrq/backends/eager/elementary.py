"""Elementary functions in plain PyTorch, operation by operation.

Definition: :mod:`hdrq.backends.reference.elementary`.
"""

from __future__ import annotations

import torch

from hdrq.backends.reference.elementary import EXP, LN2, LN2_HIGH, LN2_LOW, LOG2, LOG2_E, SQRT_HALF


def _horner(coefficients: tuple[float, ...], x: torch.Tensor) -> torch.Tensor:
    total = torch.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        total = total * x + coefficient
    return total


def _exp(r: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    power_of_two = ((k.nan_to_num(0).to(torch.int32) + 127) << 23).view(torch.float32)
    return (1 + (r + (r * r) * _horner(EXP, r))) * power_of_two


def exp(x: torch.Tensor) -> torch.Tensor:
    k = torch.round(x * LOG2_E)
    return _exp((x - k * LN2_HIGH) - k * LN2_LOW, k)


def sigmoid(x: torch.Tensor) -> torch.Tensor:
    return 1 / (1 + exp(-x.clamp(-16, 16)))


def power(t: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    u = t.view(torch.int32)
    e = (u - SQRT_HALF) >> 23
    m = (u - (e << 23)).view(torch.float32)
    s = (m - 1) / (m + 1)
    x = p * (e.float() + s * _horner(LOG2, s * s))
    k = torch.round(x.clamp(-126, 127))
    y = _exp((x - k) * LN2, k)
    y = torch.where((t < 2**-126) | (x < -126), 0.0, y)
    return torch.where(t.isnan(), t, torch.where(x > 127, torch.inf, y))
