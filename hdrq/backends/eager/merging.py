"""Merging quantized tensors on their integers, in plain PyTorch. Definition: :mod:`hdrq.backends.reference.merging`."""

from __future__ import annotations

import math

import torch

from hdrq import rng as stream
from hdrq.backends.eager import packing, per_element, valid_scale
from hdrq.backends.eager.noise import unit_noise

EQUAL = 1e-6  # cosines that differ by less are equal


def merge(
    codes, scales, zero_points, qmin, qmax, rng, weights, draws, noise, axis, select, mode, shape, signed, packed
) -> tuple[torch.Tensor, ...]:
    lam = torch.tensor(weights, dtype=torch.float32, device=rng.device).unbind()
    integers, steps, merged_step, merged_zero = inputs(codes, scales, zero_points, lam, axis, shape, signed)
    values = [j * s for j, s in zip(integers, steps, strict=True)]
    midpoint = weighted_sum(lam, values)
    distances = [midpoint - v for v in values]
    noisy = torch.full_like(midpoint, noise != "none", dtype=torch.bool)
    if noise == "odd":
        mean = weighted_sum(lam, integers)
        noisy = (mean - mean.floor() - 0.5).abs() < 0.25

    def clamped(q: torch.Tensor) -> torch.Tensor:
        return (q + merged_zero).clamp(qmin, qmax)

    def exact(d: int | torch.Tensor) -> torch.Tensor:
        terms = []
        for k, (value, delta) in enumerate(zip(values, steps, strict=True)):
            n = unit_noise(value.shape, _state(rng, k, d), None) if noise != "none" else torch.zeros_like(value)
            terms.append(value + torch.where(noisy, n, 0.0) * delta)
        return clamped(torch.round(weighted_sum(lam, terms) / merged_step))

    draw = exact if mode == "exact" else _fast(rng, lam, steps, merged_step, midpoint / merged_step, noisy, clamped)
    scores = [_scores((draw(d) - merged_zero) * merged_step - midpoint, distances) for d in range(draws)]
    similarity = cosines(*map(torch.stack, zip(*scores, strict=True)))
    best = kept(similarity, select)
    result = draw(best).to(torch.int8 if packed or (qmin >= -128 and qmax <= 127) else torch.int16)
    result = packing.pack(result) if packed else result
    return result, merged_step.flatten(), merged_zero.flatten(), similarity, best


def inputs(codes, scales, zero_points, lam, axis, shape, signed) -> tuple:
    """``J_k`` and Δ_k of every model, Δ* and z*, which broadcast against the tensor."""
    codes = [packing.unpack(c, shape, s) if c.dtype == torch.uint8 else c for c, s in zip(codes, signed, strict=True)]
    steps = [valid_scale(s, codes[0].ndim, axis) for s in scales]
    zeros = [per_element(z, codes[0].ndim, axis) for z in zero_points]
    merged_step, merged_zero = merged_grid(lam, steps, zeros)
    return [c.float() - z for c, z in zip(codes, zeros, strict=True)], steps, merged_step, merged_zero


def merged_grid(lam, steps: list, zeros: list) -> tuple[torch.Tensor, torch.Tensor]:
    """``Δ*`` and ``z*``."""
    step = weighted_sum(lam, steps)
    return step, torch.round(weighted_sum([w * s for w, s in zip(lam, steps, strict=True)], zeros) / step)


def cosines(dd: torch.Tensor, dr: torch.Tensor, rr: torch.Tensor) -> torch.Tensor:
    """The cosines (draws, K), from the sums of d², d·r and r², float64."""
    length = (dd * (dd + 2 * dr + rr).clamp(min=0)).sqrt()
    return torch.where(length > 0, (dd + dr) / length, 1.0)


def kept(cosines: torch.Tensor, select: str) -> torch.Tensor:
    """The draw that a rule keeps, int64, on its device."""
    if select in ("min-cosine", "mean-cosine"):
        scores = cosines.amin(dim=1) if select == "min-cosine" else cosines.mean(dim=1)
        return (scores >= scores.max() - EQUAL).to(torch.uint8).argmax()
    best, highest = torch.zeros((), dtype=torch.int64, device=cosines.device), cosines[0]
    if select == "official":
        for d in range(1, len(cosines)):
            rises = (cosines[d] > highest + EQUAL).all()
            best, highest = torch.where(rises, d, best), torch.where(rises, cosines[d], highest)
    return best


def _fast(rng, lam, steps, merged_step, v, noisy, clamped):
    shares = [(w * s / merged_step).double().clamp(min=2.0**-14) for w, s in zip(lam, steps, strict=True)]
    low = torch.where(noisy, v.floor(), v.round())
    y = v - low
    h = torch.minimum(y, 1 - y).double()
    below, volume, sums = torch.zeros_like(h), float(math.factorial(len(shares))), [torch.zeros_like(shares[0])]
    for share in shares:
        sums += [total + share for total in sums]
        volume = volume * share
    for subset, total in enumerate(sums):
        part = (h - total).clamp(min=0)
        power = part
        for _ in shares[1:]:
            power = power * part
        below = below - power if bin(subset).count("1") % 2 else below + power
    p = (below * (1.0 / volume)).clamp(0, 1)
    threshold = torch.where(noisy, torch.where(y <= 0.5, p, 1 - p) * 2**24, 0.0).int()
    first, second = (stream.torch_words(_state(rng, k, 0), v.numel()).reshape(v.shape) for k in range(2))

    def draw(d: int | torch.Tensor) -> torch.Tensor:
        up = ((first + d * second) & stream.LOW) >> 8 < threshold
        return clamped(torch.where(up, low + 1, low))

    return draw


def _state(rng: torch.Tensor, k: int, d: int | torch.Tensor) -> torch.Tensor:
    seed, first, step = rng.unbind()
    return torch.stack((seed, (first + k) & stream.LOW, (step + d) & stream.LOW))


def weighted_sum(weights, terms: list) -> torch.Tensor:
    total = weights[0] * terms[0]
    for weight, term in zip(weights[1:], terms[1:], strict=True):
        total = total + weight * term
    return total


def _scores(r: torch.Tensor, distances: list) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``Σ d²`` and ``Σ d·r`` of each model, and ``Σ r²``."""
    r, ds = r.double(), [d.double() for d in distances]
    dd, dr = torch.stack([(d * d).sum() for d in ds]), torch.stack([(d * r).sum() for d in ds])
    return dd, dr, (r * r).sum().reshape(1)
