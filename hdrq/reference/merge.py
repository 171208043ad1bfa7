"""Merging quantized tensors on their integers, with noise-sampled rounding (METHOD.md, Eq. 12)."""

from __future__ import annotations

import numpy as np

from hdrq import rng as stream
from hdrq.reference import per_element
from hdrq.reference.noise import unit_noise


def merge(codes, scales, qmin, qmax, rng, weights, draws=1, noise="all", axis=None) -> tuple:
    """``I* = clamp(round_half_even(Σ_k λ_k·(I_k·Δ_k + n_k·Δ_k) / Δ*))``, ``Δ* = Σ_k λ_k·Δ_k``: the best of ``draws``.

    Float32 throughout, every operation rounded by itself, sums from the first term on. Input k of draw d takes its
    noise from ``stream + k``, ``step + d``. Returns the codes, Δ*, the cosines (draws, K) in float64 and the draw kept:
    the first with the greatest smaller cosine.

    The cosine of model k is that of the angle between the step taken, ``I*Δ* − w_k``, and the step to the midpoint,
    ``d_k = Σ λw − w_k``, ``w_k = I_k·Δ_k``. With ``r = I*Δ* − Σ λw`` it is
    ``(Σ d² + Σ d·r) / sqrt(Σ d² · Σ (d + r)²)``, and 1 where a step is nothing. The terms d and r
    are float32, their products and sums float64.
    """
    lam = [np.float32(w) for w in weights]
    steps = [per_element(s, codes[0].ndim, axis) for s in scales]
    merged_step = _weighted_sum(lam, steps)
    values = [c.astype(np.float32) * s for c, s in zip(codes, steps, strict=True)]
    midpoint = _weighted_sum(lam, values)
    distances = [midpoint - v for v in values]
    noisy = np.ones(codes[0].shape, bool)
    if noise == "none":
        noisy[...] = False
    elif noise == "odd":
        noisy = (codes[0].astype(np.int32) + codes[1].astype(np.int32)) % 2 == 1

    def draw(d: int) -> np.ndarray:
        seed, first, step = (int(v) for v in rng)
        terms = []
        for k, (value, delta) in enumerate(zip(values, steps, strict=True)):
            own = np.array([seed, (first + k) & stream.LOW, (step + d) & stream.LOW], dtype=np.int64)
            n = np.where(noisy, unit_noise(value.shape, own, None), np.float32(0))
            terms.append(value + n * delta)
        q = np.rint(_weighted_sum(lam, terms) / merged_step)
        return np.clip(q, np.float32(qmin), np.float32(qmax))

    cosines = np.array([_cosines(draw(d) * merged_step - midpoint, distances) for d in range(draws)])
    kept = int(cosines.min(axis=1).argmax())
    dtype = np.int8 if qmin >= -128 and qmax <= 127 else np.int16
    return draw(kept).astype(dtype), merged_step.reshape(-1), cosines, np.int64(kept).reshape(())


def _weighted_sum(weights: list, terms: list) -> np.ndarray:
    total = weights[0] * terms[0]
    for weight, term in zip(weights[1:], terms[1:], strict=True):
        total = total + weight * term
    return total


def _cosines(r: np.ndarray, distances: list) -> list[float]:
    r = r.astype(np.float64)
    rr = (r * r).sum()
    result = []
    for distance in distances:
        d = distance.astype(np.float64)
        dd, dr = (d * d).sum(), (d * r).sum()
        length = np.sqrt(dd * max(dd + 2 * dr + rr, 0.0))
        result.append((dd + dr) / length if length > 0 else 1.0)
    return result
