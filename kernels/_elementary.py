"""Elementary functions as fixed sequences of float32 operations.

Definition: :mod:`hdrq.backends.reference.elementary`.
"""

import triton
import triton.language as tl

from hdrq.backends.reference import elementary as constants
from hdrq.kernels import _lang as lang

E2, E3, E4, E5, E6, E7 = (tl.constexpr(c) for c in reversed(constants.EXP))
L1, L3, L5, L7, L9 = (tl.constexpr(c) for c in reversed(constants.LOG2))
LOG2_E, LN2 = tl.constexpr(constants.LOG2_E), tl.constexpr(constants.LN2)
LN2_HIGH, LN2_LOW = tl.constexpr(constants.LN2_HIGH), tl.constexpr(constants.LN2_LOW)
SQRT_HALF = tl.constexpr(constants.SQRT_HALF)


@triton.jit
def exp_of_parts(r, shifted):
    """``e^r·2^k`` for r in [−½ ln 2, ½ ln 2], k an integer in [−126, 127], from ``k + TO_INTEGER``; of NaN, NaN."""
    q = ((((E7 * r + E6) * r + E5) * r + E4) * r + E3) * r + E2
    power = (shifted.to(tl.int32, bitcast=True) << 23) + (127 << 23)  # the sum's last bits are those of k
    return (1.0 + (r + (r * r) * q)) * power.to(tl.float32, bitcast=True)


@triton.jit
def sigmoid(x):
    """``1/(1 + e^−x)``, within 2 ulp; beyond ±16 as at ±16."""
    a = -lang.clamp(x, -16.0, 16.0)
    shifted = a * LOG2_E + lang.TO_INTEGER
    k = shifted - lang.TO_INTEGER
    return tl.div_rn(tl.full(x.shape, 1.0, tl.float32), 1.0 + exp_of_parts((a - k * LN2_HIGH) - k * LN2_LOW, shifted))


@triton.jit
def power(t, p):
    """``t^p`` for t ≥ 0 and p ≥ 0."""
    u = t.to(tl.int32, bitcast=True)
    e = (u - SQRT_HALF) >> 23
    m = (u - (e << 23)).to(tl.float32, bitcast=True)
    s = tl.div_rn(m - 1.0, m + 1.0)
    s2 = s * s
    log2 = e.to(tl.float32) + s * ((((L9 * s2 + L7) * s2 + L5) * s2 + L3) * s2 + L1)
    x = p * log2
    shifted = lang.clamp(x, -126.0, 127.0) + lang.TO_INTEGER
    y = exp_of_parts((x - (shifted - lang.TO_INTEGER)) * LN2, shifted)
    y = tl.where((t < 2.0**-126) | (x < -126.0), 0.0, y)
    y = tl.where(x > 127.0, float("inf"), y)
    return tl.where(t == t, y, t)
