"""Merging quantized tensors on their integers, with noise-sampled rounding (HDRQ, Eq. 12)."""

from __future__ import annotations

import math

import numpy as np

from hdrq import rng as stream
from hdrq.backends.reference import packing, per_element
from hdrq.backends.reference.noise import unit_noise

f32 = np.float32
EQUAL = 1e-6


def merge(
    codes, scales, zero_points, qmin, qmax, rng, weights, draws, noise, axis, select, mode, shape, signed, packed
) -> tuple:
    """``I* = clamp(round_half_even(Σ_k λ_k·(J_k·Δ_k + n_k·Δ_k) / Δ*) + z*)``, ``J = I − z``, best of ``draws``.

    ``Δ* = Σ_k λ_k·Δ_k`` and ``z* = round_half_even(Σ_k λ_k·Δ_k·z_k / Δ*)``. Float32 throughout, every operation rounded
    by itself, products from the left, sums from the first term on. Returns the codes, Δ*, z*, the cosines (draws, K) in
    float64 and the draw kept.

    ``noise="odd"`` keeps noise where the mean integer ``c = Σ λ_k·J_k`` is nearer to a tie than to an integer,
    ``abs(c − floor(c) − ½) < ¼``: for two tensors of equal weight, where their sum is odd.

    The cosine of model k is that of the angle between the step taken, ``(I* − z*)Δ* − w_k``, and the step to the
    midpoint, ``d_k = Σ λw − w_k``, ``w_k = J_k·Δ_k``. With ``r = (I* − z*)Δ* − Σ λw`` it is
    ``(Σ d² + Σ d·r) / sqrt(Σ d² · Σ (d + r)²)``, and 1 where a step is nothing. The terms d and r
    are float32, their products and sums float64.
    """
    lam = [f32(w) for w in weights]
    integers, steps, merged_step, merged_zero = inputs(codes, scales, zero_points, lam, axis, shape, signed)
    values = [j * s for j, s in zip(integers, steps, strict=True)]
    midpoint = weighted_sum(lam, values)
    distances = [midpoint - v for v in values]
    noisy = np.full(midpoint.shape, noise != "none")
    if noise == "odd":
        mean = weighted_sum(lam, integers)
        noisy = np.abs(mean - np.floor(mean) - f32(0.5)) < f32(0.25)

    def clamped(q: np.ndarray) -> np.ndarray:
        return np.clip(q + merged_zero, f32(qmin), f32(qmax))

    def exact(d: int) -> np.ndarray:
        terms = []
        for k, (value, delta) in enumerate(zip(values, steps, strict=True)):
            n = np.where(noisy, unit_noise(value.shape, _state(rng, k, d), None), f32(0))
            terms.append(value + n * delta)
        return clamped(np.rint(weighted_sum(lam, terms) / merged_step))

    draw = exact if mode == "exact" else _fast(rng, lam, steps, merged_step, midpoint / merged_step, noisy, clamped)
    cosines = np.array([_cosines((draw(d) - merged_zero) * merged_step - midpoint, distances) for d in range(draws)])
    kept = _kept(cosines, select)
    result = draw(kept).astype(np.int8 if packed or (qmin >= -128 and qmax <= 127) else np.int16)
    result = packing.pack(result) if packed else result
    return result, merged_step.reshape(-1), merged_zero.reshape(-1), cosines, np.int64(kept).reshape(())


def inputs(codes, scales, zero_points, lam, axis, shape, signed) -> tuple:
    """``J_k = I_k − z_k`` and Δ_k of every model, Δ* and z*, which broadcast against the tensor."""
    codes = [packing.unpack(c, shape, s) if c.dtype == np.uint8 else c for c, s in zip(codes, signed, strict=True)]
    steps = [per_element(s, codes[0].ndim, axis) for s in scales]
    zeros = [per_element(z, codes[0].ndim, axis) for z in zero_points]
    merged_step = weighted_sum(lam, steps)
    merged_zero = np.rint(weighted_sum([w * s for w, s in zip(lam, steps, strict=True)], zeros) / merged_step)
    return [c.astype(f32) - z for c, z in zip(codes, zeros, strict=True)], steps, merged_step, merged_zero


def _fast(rng, lam, steps, merged_step, v, noisy, clamped):
    """Draws of few tensors, by one threshold on one word.

    With ``v = Σ λw / Δ*``, ``m = floor(v)``, ``y = v − m``, a rounding with noise gives m + 1 with probability p, else
    m: p is that the sum of K uniforms on [0, a_k], ``a_k = λ_k·Δ_k / Δ*``, Σ a = 1, is below y. In float64, with
    a_k of 2⁻¹⁴ at least, ``h = min(y, 1 − y)`` and the subsets S of the models in binary order, that is
    ``Σ_S (−1)^|S|·max(h − Σ_S a, 0)^K · (1 / (K!·Π a))``, in [0, 1], and 1 minus it where y > ½. Draw d gives m + 1
    where ``(A + d·B mod 2³²) >> 8 < trunc(p·2²⁴)``; A and B are the element's words of ``stream`` and ``stream + 1``.
    """
    shares = [np.maximum((w * s / merged_step).astype(np.float64), 2.0**-14) for w, s in zip(lam, steps, strict=True)]
    low = np.where(noisy, np.floor(v), np.rint(v))
    y = v - low
    h = np.minimum(y, f32(1) - y).astype(np.float64)
    below, volume, sums = np.zeros_like(h), float(math.factorial(len(shares))), [np.zeros_like(shares[0])]
    for share in shares:
        sums += [total + share for total in sums]
        volume = volume * share
    for subset, total in enumerate(sums):
        part = np.maximum(h - total, 0.0)
        power = part
        for _ in shares[1:]:
            power = power * part
        below = below - power if bin(subset).count("1") % 2 else below + power
    p = np.clip(below * (1.0 / volume), 0.0, 1.0)
    p = np.where(y <= f32(0.5), p, 1.0 - p)
    threshold = np.where(noisy, p * 2.0**24, 0.0).astype(np.uint32)
    first, second = (stream.words(_state(rng, k, 0), v.size).reshape(v.shape) for k in range(2))

    def draw(d: int) -> np.ndarray:
        up = (first + np.uint32(d) * second) >> np.uint32(8) < threshold
        return clamped(np.where(up, low + f32(1), low))

    return draw


def _state(rng, k: int, d: int) -> np.ndarray:
    seed, first, step = (int(v) for v in rng)
    return np.array([seed, (first + k) & stream.LOW, (step + d) & stream.LOW], dtype=np.int64)


def _kept(cosines: np.ndarray, select: str) -> int:
    """The first draw of the greatest smallest, or mean, cosine; or, in turn, each that raises all cosines at once.

    Cosines are sums, which backends know to their own rounding: what differs by less than 1e-6 is equal.
    """
    if select == "official":
        best = 0
        for d in range(1, len(cosines)):
            best = d if (cosines[d] > cosines[best] + EQUAL).all() else best
        return best
    if select == "first":
        return 0
    scores = cosines.min(axis=1) if select == "min-cosine" else cosines.mean(axis=1)
    return int((scores >= scores.max() - EQUAL).argmax())


def weighted_sum(weights: list, terms: list) -> np.ndarray:
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
