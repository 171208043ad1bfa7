"""Rates, exponents and weights of losses, iteration by iteration."""

from __future__ import annotations

import math

import torch

from hdrq.recipes import Recipe

WEIGHT_RATE, ACTIVATION_RATE, BETA, ROUNDING_WEIGHT, BIAS_RATE = range(5)  # the columns of a schedule


def schedule(plan: Recipe) -> torch.Tensor:
    """A row for each iteration: the rates of weights, activations' scales and biases, AdaRound's β and its weight."""
    share = torch.arange(plan.iterations, dtype=torch.float64) / max(plan.iterations, 1)
    warm = round(plan.warmup * plan.iterations) / max(plan.iterations, 1)
    rising = 1e-3 + (1 - 1e-3) * share / max(warm, 1e-12)
    falling = _cosine(_after(share, warm)) if plan.weight_schedule == "cosine" else torch.ones_like(share)
    weights = plan.weight_lr * torch.where(share < warm, rising, falling)
    decay = _after(share, plan.rounding_warmup)
    decay = _cosine(decay) if plan.beta_schedule == "cosine" else 1 - decay
    beta = plan.beta_end + (plan.beta_start - plan.beta_end) * decay
    rounding = plan.rounding_weight * (share >= plan.rounding_warmup)
    cosine = _cosine(share)
    columns = [weights, plan.activation_lr * cosine, beta, rounding, plan.bias_lr * cosine]
    return torch.stack(columns, dim=1).float()


def _after(share: torch.Tensor, warm: float) -> torch.Tensor:
    """How much of what follows the warm-up is done, 0 before."""
    return ((share - warm) / max(1 - warm, 1e-12)).clamp(0, 1)


def _cosine(share: torch.Tensor) -> torch.Tensor:
    return 0.5 * (1 + torch.cos(math.pi * share))
