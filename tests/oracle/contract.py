"""The numerical contract (docs/contract.md) once more, one element at a time.

Written from the text of the contract alone, in Python integers and float32 scalars: it shares no line with
``hdrq.backends.reference``, so a mistake there does not hide here.
"""

from __future__ import annotations

import math

import numpy as np

f32 = np.float32


def word(seed: int, stream: int, step: int, e: int) -> int:
    """The 32-bit word of element e."""
    group = e // 4
    c = [group % 2**32, group // 2**32 % 2**32, stream, step]
    k = [seed % 2**32, seed // 2**32 % 2**32]
    for _ in range(7):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b % 2**32, (a >> 32) ^ c[3] ^ k[1], a % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c[e % 4]


def unit(m: int) -> np.float32:
    return f32(m / 2**24 - 0.5)


def uniform(state, e: int) -> np.float32:
    return unit(word(*state, e) >> 8)


def empirical(state, e: int, counts: list[int]) -> np.float32:
    """``counts`` of the 256 bins."""
    total = sum(counts)
    if total == 0:
        return f32(0)
    w = word(*state, e)
    t, b = (w * total) >> 32, 0
    while t >= counts[b]:
        t -= counts[b]
        b += 1
    return unit((b << 16) | (w & 0xFFFF))


def histogram(x, s, qmin: int, qmax: int) -> list[int]:
    """Counts of the rounding error of the elements strictly inside the range. ``x`` and ``s``: float32, alike long."""
    counts = [0] * 256
    for x_e, s_e in zip(x, s, strict=True):
        if f32(qmin) * s_e < x_e < f32(qmax) * s_e:
            v = x_e / s_e
            r = nearest_even(v) - v
            counts[min(max(math.floor((r + f32(0.5)) * f32(256)), 0), 255)] += 1
    return counts


def noise_quantize(x, s, n, qmin: int, qmax: int) -> np.float32:
    if x >= f32(qmax) * s:
        return f32(qmax) * s
    if x <= f32(qmin) * s:
        return f32(qmin) * s
    return x + n * s


def nearest_even(v: np.float32) -> np.float32:
    if not np.isfinite(v) or abs(v) >= 2**23:
        return v
    return f32(round(float(v)))  # Python rounds ties to even


def code(x, s, z, qmin: int, qmax: int) -> np.float32:
    q = nearest_even(x / s) + z
    return q if np.isnan(q) else f32(min(max(q, qmin), qmax))


def fake_quantize(x, s, z, qmin: int, qmax: int, rounding: str = "quotient") -> np.float32:
    if rounding == "quotient":
        return (code(x, s, z, qmin, qmax) - z) * s
    q = nearest_even(x / s + z) + f32(0) if rounding == "shifted" else nearest_even(x * (f32(1) / s)) + z
    return (q if np.isnan(q) else f32(min(max(q, qmin), qmax)) - z) * s


def keeps(state, e: int, p: float) -> bool:
    seed, stream, step = state
    return word(seed, stream ^ 0x80000000, step, e // 2) >> 16 * (e % 2) & 0xFFFF < round(p * 2**16)


def merged_code(codes, deltas, weights, noises, qmin: int, qmax: int, zeros=None) -> int:
    """One element of Eq. 12: integers, steps, λ and noise of each model; zero points are merged as steps are."""
    total = step = zero = None
    for k, (i, delta, weight, n) in enumerate(zip(codes, deltas, weights, noises, strict=True)):
        z = f32(0) if zeros is None else zeros[k]
        term, part = weight * ((f32(i) - z) * delta + n * delta), weight * delta
        total = term if total is None else total + term
        step = part if step is None else step + part
        zero = part * z if zero is None else zero + part * z
    return int(min(max(nearest_even(total / step) + nearest_even(zero / step), qmin), qmax))


def fast_merged_code(state, e: int, draw: int, codes, deltas, weights, qmin: int, qmax: int) -> int:
    """One element of two to four models by one threshold on the word ``A + draw·B``."""
    seed, stream, step = state
    products = [weight * delta for weight, delta in zip(weights, deltas, strict=True)]
    merged = total = f32(0)
    for k, product in enumerate(products):
        value = weights[k] * (f32(codes[k]) * deltas[k])
        merged, total = (product, value) if k == 0 else (merged + product, total + value)
    v = total / merged
    shares = [max(float(product / merged), 2.0**-14) for product in products]
    low = f32(np.floor(v))
    y = v - low
    h = float(min(y, f32(1) - y))
    below, volume = 0.0, float(math.factorial(len(shares)))
    for share in shares:
        volume *= share
    for subset in range(2 ** len(shares)):
        inside, reached = [share for k, share in enumerate(shares) if subset >> k & 1], 0.0
        for share in inside:
            reached += share
        part = power = max(h - reached, 0.0)
        for _ in shares[1:]:
            power *= part
        below += -power if len(inside) % 2 else power
    p = min(max(below * (1.0 / volume), 0.0), 1.0)
    p = p if y <= f32(0.5) else 1.0 - p
    a, b = (word(seed, (stream + k) % 2**32, step, e) for k in range(2))
    up = (a + draw * b) % 2**32 >> 8 < int(p * 2.0**24)
    return int(min(max(low + up, qmin), qmax))


def systematic_codes(state, codes, deltas, weights, tau: float, qmin: int, qmax: int, zeros) -> list[int]:
    """All elements of a tensor: ``codes[k]``, ``deltas[k]`` and ``zeros[k]`` have one entry for each of them."""
    result, count = [], len(codes[0])
    for first in range(0, count, 1024):
        passed = word(*state, first // 1024) >> 12
        for e in range(first, min(first + 1024, count)):
            total = step = zero = None
            for k, weight in enumerate(weights):
                part = weight * deltas[k][e]
                term = weight * ((f32(codes[k][e]) - zeros[k][e]) * deltas[k][e])
                total = term if total is None else total + term
                step = part if step is None else step + part
                zero = part * zeros[k][e] if zero is None else zero + part * zeros[k][e]
            v = total / step
            low = math.floor(v)
            y = v - f32(low)
            q = int(nearest_even(v))
            if abs(y - f32(0.5)) < f32(tau):
                before = passed
                passed += int(float(y) * 2**20)
                q = low + (passed >> 20) - (before >> 20)
            result.append(int(min(max(q + int(nearest_even(zero / step)), qmin), qmax)))
    return result


def exponential(x: np.float32) -> np.float32:
    """e^x for |x| ≤ 16, as the reference's docstring spells it."""
    k = nearest_even(x * f32(1.4426950408889634))
    r = (x - k * f32(22713 / 32768)) - k * f32(1.42860682030941723e-6)
    q = f32(1 / 5040)
    for factorial in (720, 120, 24, 6, 2):
        q = q * r + f32(1 / factorial)
    return (f32(1) + (r + (r * r) * q)) * f32(2.0 ** int(k))


def adaround(x, s, alpha, qmin: int, qmax: int, hard: bool, z) -> np.float32:
    if hard:
        h = f32(1) if alpha >= 0 else f32(0)
    elif np.isnan(alpha):
        return f32(np.nan)
    else:
        sigma = f32(1) / (f32(1) + exponential(-f32(min(max(alpha, -16), 16))))
        h = f32(min(max(f32(1.2) * sigma + f32(-0.1), 0), 1))
    q = np.floor(x / s) + h + z
    return ((q if np.isnan(q) else f32(min(max(q, qmin), qmax))) - z) * s
