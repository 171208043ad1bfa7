"""Elementary functions as fixed sequences of float32 operations, so that every backend has their bits.

A library's ``exp`` differs in the last bits from machine to machine. These are written out once: exponents are taken
and made as bits, the rest is a polynomial in Horner's form, every operation rounded by itself.
"""

from __future__ import annotations

import numpy as np

LOG2_E = 1.4426950408889634
LN2 = 0.6931471805599453
LN2_HIGH = 22713 / 2**15  # 15 bits: its product with an integer of up to 9 bits is exact
LN2_LOW = 1.42860682030941723e-6
EXP = tuple(1 / f for f in (5040, 720, 120, 24, 6, 2))  # e^r = 1 + (r + r²·Σ r^i/(i + 2)!), highest power first
LOG2 = tuple(2 * LOG2_E / n for n in (9, 7, 5, 3, 1))  # log2((1 + s)/(1 − s)) = s·Σ 2·log2(e)·s^2i/(2i + 1)
SQRT_HALF = 0x3F3504F3  # the bits of √½


def _horner(coefficients: tuple[float, ...], x: np.ndarray) -> np.ndarray:
    total = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        total = total * x + np.float32(coefficient)
    return total


def _exp(r: np.ndarray, k: np.ndarray) -> np.ndarray:
    """``e^r·2^k`` for r in [−½ ln 2, ½ ln 2], k an integer in [−126, 127] or NaN."""
    exponent = np.where(np.isnan(k), 0, k).astype(np.int32) + 127
    return (np.float32(1) + (r + (r * r) * _horner(EXP, r))) * (exponent << 23).view(np.float32)


def exp(x: np.ndarray) -> np.ndarray:
    """``e^x`` for x in [−80, 80], within 1 ulp: ``e^r·2^k``, ``k = round(x·log2 e)``, ``r = (x − k·ln2ₕ) − k·ln2ₗ``."""
    k = np.rint(x * np.float32(LOG2_E))
    r = (x - k * np.float32(LN2_HIGH)) - k * np.float32(LN2_LOW)
    return _exp(r, k)


def sigmoid(x: np.ndarray) -> np.ndarray:
    """``1/(1 + e^−x)``, within 2 ulp; beyond ±16 as at ±16."""
    return np.float32(1) / (np.float32(1) + exp(-np.clip(x, np.float32(-16), np.float32(16))))


def power(t: np.ndarray, p: np.float32) -> np.ndarray:
    """``t^p`` for t ≥ 0 and p ≥ 0, as ``2^(p·log2 t)``: within 2e-7·(1 + p·|log2 t|). Below 2⁻¹²⁶, t and ``t^p`` are 0.

    ``t = m·2^e`` with m in [√½, √2), ``s = (m − 1)/(m + 1)``, ``log2 t = e + s·(polynomial in s²)``.
    """
    u = t.view(np.int32)
    e = (u - np.int32(SQRT_HALF)) >> 23
    m = (u - (e << 23)).view(np.float32)
    s = (m - np.float32(1)) / (m + np.float32(1))
    x = p * (e.astype(np.float32) + s * _horner(LOG2, s * s))
    k = np.rint(np.clip(x, np.float32(-126), np.float32(127)))
    y = _exp((x - k) * np.float32(LN2), k)
    y = np.where((t < np.float32(2**-126)) | (x < -126), np.float32(0), y)
    return np.where(np.isnan(t), t, np.where(x > 127, np.float32(np.inf), y))
