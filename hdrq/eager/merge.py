"""Merging quantized tensors on their integers, in plain PyTorch. Definition: :mod:`hdrq.reference.merge`."""

from __future__ import annotations

import torch

from hdrq import rng as stream
from hdrq.eager import valid_scale
from hdrq.eager.noise import unit_noise


def merge(codes, scales, qmin, qmax, rng, weights, draws, noise, axis) -> tuple[torch.Tensor, ...]:
    lam = torch.tensor(weights, dtype=torch.float32, device=rng.device).unbind()
    steps = [valid_scale(s, codes[0].ndim, axis) for s in scales]
    merged_step = _weighted_sum(lam, steps)
    values = [c.float() * s for c, s in zip(codes, steps, strict=True)]
    midpoint = _weighted_sum(lam, values)
    distances = [midpoint - v for v in values]
    odd = (codes[0].int() + codes[1].int()) % 2 == 1 if noise == "odd" else None

    def draw(d: int | torch.Tensor) -> torch.Tensor:
        terms = []
        for k, (value, delta) in enumerate(zip(values, steps, strict=True)):
            seed, first, step = rng.unbind()
            own = torch.stack((seed, (first + k) & stream.LOW, (step + d) & stream.LOW))
            n = torch.zeros_like(value) if noise == "none" else unit_noise(value.shape, own, None)
            terms.append(value + (n if odd is None else n.masked_fill(~odd, 0.0)) * delta)
        return torch.round(_weighted_sum(lam, terms) / merged_step).clamp(qmin, qmax)

    cosines = torch.stack([_cosines(draw(d) * merged_step - midpoint, distances) for d in range(draws)])
    kept = cosines.amin(dim=1).argmax()
    dtype = torch.int8 if qmin >= -128 and qmax <= 127 else torch.int16
    return draw(kept).to(dtype), merged_step.flatten(), cosines, kept


def _weighted_sum(weights, terms: list) -> torch.Tensor:
    total = weights[0] * terms[0]
    for weight, term in zip(weights[1:], terms[1:], strict=True):
        total = total + weight * term
    return total


def _cosines(r: torch.Tensor, distances: list) -> torch.Tensor:
    r = r.double()
    rr = (r * r).sum()
    result = []
    for distance in distances:
        d = distance.double()
        dd, dr = (d * d).sum(), (d * r).sum()
        length = (dd * (dd + 2 * dr + rr).clamp(min=0)).sqrt()
        result.append(torch.where(length > 0, (dd + dr) / length, 1.0))
    return torch.stack(result)
