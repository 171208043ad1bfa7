"""The division of the Triton kernels, step by step in NumPy: the bits of IEEE division wherever an op looks.

``hdrq.kernels._lang.quotient`` computes, with r = RN(1/s) and q = RN(x·r), ``v = RN(q + e·r)`` of ``e = RN(x − q·s)``.
Mantissas of x and s are X and S, integers in [2²³, 2²⁴). Let X < S, the harder case, so that x/s is in (½, 1) and units
of q are 2⁻²⁴. The error of q is below 2⁻²⁵ of rounding and 2⁻²⁴ of r; x − q·s is below 3·2⁻²⁴, a multiple of 2⁻⁴⁷, and
so e misses 2⁻⁴⁷ at most; e·r misses 3·2⁻⁴⁹ for r. Before its rounding v is within 7·2⁻⁴⁹ of x/s, and can only round
otherwise if the middle of two floats is as near: if ``2²⁵·X = M·S + ρ`` with M odd and ``abs(ρ) < 7``. With X ≥ S it is
2²⁴ and ``abs(ρ) < 2``. These X are few for every S, and found by the inverse of S modulo a power of two.
"""

import os

import numpy as np
import pytest

f32, f64 = np.float32, np.float64
EVERY = 1 if "HDRQ_ALL_CASES" in os.environ else 128  # so many S are tried as one in this number


def fused(a, b, c):
    """``RN(a·b + c)`` of float32: the product is exact in float64; a sum that is not becomes odd before it is cut."""
    product, c = a.astype(f64) * b.astype(f64), c.astype(f64)
    with np.errstate(invalid="ignore", over="ignore"):
        total = product + c
        other = total - product
        error = (product - (total - other)) + (c - other)
        bits = np.ascontiguousarray(total).view(np.int64)
        even = (bits & 1 == 0) & (error != 0) & np.isfinite(total)
        away = (error > 0) == (total > 0)
        return np.where(even, bits + np.where(away, 1, -1), bits).view(f64).astype(f32)


def quotient(x, s):
    with np.errstate(all="ignore"):
        factor = np.where(s < 2.0**-60, f32(2.0**96), np.where(s > 2.0**60, f32(2.0**-96), f32(1)))
        x, s = x * factor, s * factor
        r = f32(1) / s
        q = x * r
        v = fused(fused(-q, s, x), r, q)
    return np.where(np.abs(q) <= np.finfo(f32).max, v, q)


def hard_cases(S, shift):
    """X and S with ``X·2^shift = M·S + ρ``, M odd and ``0 < abs(ρ) ≤ 8``, X ≥ S for 24 and X < S for 25."""
    for rho in (rho for rho in range(-8, 9) if rho):
        for power in range(4):  # of two in S
            own = S[(S & (2 ** (power + 1) - 1)) == 2**power] if rho % 2**power == 0 else S[:0]
            odd, modulus = (own >> power).astype(np.uint64), np.uint64(2 ** (shift - power))
            inverse = odd.copy()
            for _ in range(5):
                inverse *= np.uint64(2) - odd * inverse
            first = np.int64(-(rho >> power)).astype(np.uint64) * inverse % modulus
            for turn in range(2 ** (25 - shift + power)):
                M = (first + np.uint64(turn) * modulus).astype(np.int64)
                X = (M * odd.astype(np.int64) + (rho >> power)) >> (shift - power)
                hard = (M > 2**24) & (M < 2**25) & (M % 2 == 1) & (X >= 2**23) & (X < 2**24)
                hard &= (own <= X) if shift == 24 else (own > X)
                yield X[hard], own[hard]


@pytest.mark.parametrize("shift", [24, 25])
def test_quotients_near_the_middle_of_two_floats_round_as_they_should(shift):
    S = np.arange(2**23, 2**24, dtype=np.int64)
    if EVERY > 1:
        S = np.random.default_rng(shift).choice(S, len(S) // EVERY, replace=False)
    tried = 0
    for X, own in hard_cases(S, shift):
        x, s = X.astype(f32), own.astype(f32)
        assert (X * 2**shift % own != 0).all()
        np.testing.assert_array_equal(quotient(x, s), x / s)
        tried += len(X)
    assert tried > len(S)


def pairs(rng, count, low, high):
    """x of any bits, and s, positive, with exponents from low on below high."""
    x = rng.integers(0, 2**32, count, dtype=np.uint32).view(f32)
    s = (rng.integers(low + 127, high + 127, count).astype(np.uint32) << 23) | rng.integers(0, 2**23, count, np.uint32)
    return x, np.maximum(s, 1).view(f32)


@pytest.mark.parametrize("exponents", [(-127, 128), (-127, -120), (-64, -56), (-20, 20), (56, 64), (120, 128)])
def test_quotients_are_those_of_ieee_division_where_an_op_looks(exponents):
    rng = np.random.default_rng(0)
    x, s = pairs(rng, 2**20, *exponents)
    # As many x whose quotients lie where quantizers look, on halves and beside them too.
    near = (rng.integers(-520, 520, 2**20) / 2).astype(f32)
    with np.errstate(all="ignore"):
        x = np.concatenate(
            [x, near * s, np.nextafter(near * s, f32(np.inf)), np.tile(f32([0, -0.0, np.inf, -np.inf]), 2**18)]
        )
        s = np.tile(s, 4)
        v, expected = quotient(x, s), x / s
        size = np.abs(expected)
        exact = ((size >= 2.0**-40) & (size <= 2.0**92)) | ~np.isfinite(x)
        assert exact.mean() > 0.3
        np.testing.assert_array_equal(v[exact], expected[exact])
        beyond = size > 2.0**92
        assert (np.abs(v[beyond]) > 2.0**92).all() and (np.sign(v[beyond]) == np.sign(expected[beyond])).all()
        assert (np.abs(v[size < 2.0**-40]) < 2.0**-39).all()
        bins = [np.floor(((np.rint(w) - w) + f32(0.5)) * f32(256)) for w in (v, expected)]
        np.testing.assert_array_equal(*(b[size <= 2.0**22] for b in bins))
