"""Merging quantized tensors on their integers, by systematic rounding of what lies near a tie."""

from __future__ import annotations

import numpy as np

from hdrq import rng as stream
from hdrq.backends.reference import packing
from hdrq.backends.reference.merging import inputs, weighted_sum

f32 = np.float32
GROUP = 1024  # neighbours whose sum is kept
UNIT = 20  # bits of a probability


def merge_systematic(
    codes, scales, zero_points, qmin, qmax, rng, weights, tau, axis, shape, signed, packed
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """With ``v = Σ_k λ_k·(J_k·Δ_k) / Δ*``, ``low = floor(v)`` and ``y = v − low``: ``I* = clamp(low + up + z*)`` where
    ``abs(y − ½) < tau``, and ``clamp(round_half_even(v) + z*)`` elsewhere. Δ*, z* and ``J_k`` are those of
    :func:`hdrq.backends.reference.merging.merge`; all is float32, every operation rounded by itself.

    The near-ties of a group of 1,024 neighbours, in row-major order, are rounded together: each has the weight
    ``p = trunc(y·2²⁰)``, every other element 0. With C the running sum of p up to the element, it included, and
    ``u = word(g) >> 12`` the word of group g, ``up = ((C + u) >> 20) − ((C − p + u) >> 20)`` is 0 or 1. So an element
    goes up with probability p·2⁻²⁰, and so many of a group do that their sum is within one step of that of y.

    Returns the codes, Δ* and z*.
    """
    lam = [f32(w) for w in weights]
    integers, steps, merged_step, merged_zero = inputs(codes, scales, zero_points, lam, axis, shape, signed)
    v = weighted_sum(lam, [j * s for j, s in zip(integers, steps, strict=True)]) / merged_step
    low = np.floor(v)
    y = v - low
    near = np.abs(y - f32(0.5)) < f32(tau)
    p = np.where(near, y * f32(2**UNIT), f32(0)).astype(np.int32).reshape(-1)
    groups = -(-p.size // GROUP)
    rows = np.pad(p, (0, groups * GROUP - p.size)).reshape(groups, GROUP)
    u = (stream.words(rng, groups) >> np.uint32(32 - UNIT)).astype(np.int32)[:, None]
    passed = np.cumsum(rows, axis=1, dtype=np.int32) + u
    up = ((passed >> UNIT) - ((passed - rows) >> UNIT)).reshape(-1)[: p.size].reshape(v.shape)
    q = np.where(near, low + up.astype(f32), np.rint(v)) + merged_zero
    result = np.clip(q, f32(qmin), f32(qmax)).astype(np.int8 if packed or (qmin >= -128 and qmax <= 127) else np.int16)
    return packing.pack(result) if packed else result, merged_step.reshape(-1), merged_zero.reshape(-1)
