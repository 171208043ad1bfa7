"""The jitted pieces that the kernels share: the random stream, the arithmetic, and which scale is an element's own.

A tile is BLOCK neighbouring elements, from ``start`` (a multiple of BLOCK, int64 in large tensors) on; ``i`` counts
them from 0. Tensors are passed as pointers to their first element.

Every operation must round by itself, those of :func:`quotient` apart: kernels are launched with
``enable_fp_fusion=False``, and divide with it or with ``tl.div_rn``, since ``/`` is an approximation on a GPU.
"""

import triton
import triton.language as tl

from hdrq import rng as stream_constants

M0, M1 = (tl.constexpr(m) for m in stream_constants.MULTIPLIERS)
W0, W1 = (tl.constexpr(w) for w in stream_constants.KEY_STEPS)
ROUNDS = tl.constexpr(stream_constants.ROUNDS)
DROP_STREAM = tl.constexpr(stream_constants.DROP_STREAM)

# The interpreter's fused multiply-add may round twice.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
# The largest finite float32. A comparison with infinity would become a test of bits, which is dearer.
LARGEST = tl.constexpr(2.0**128 - 2.0**104)
TO_INTEGER = tl.constexpr(1.5 * 2.0**23)  # in [2²³, 2²⁴) float32 holds the integers and nothing between


@triton.jit
def read_state(rng):
    """``(seed, stream, step)``: int64 and two uint32."""
    return tl.load(rng), tl.load(rng + 1).to(tl.uint32), tl.load(rng + 2).to(tl.uint32)


@triton.jit
def first_element(numel, BLOCK: tl.constexpr):
    """Where the program's tile starts: int64 only in a tensor of more than int32 counts."""
    program = tl.program_id(0)
    return program.to((program + numel).dtype) * BLOCK


@triton.jit
def philox(seed, stream, step, low, high):
    """The four words of Philox4x32-7 for the counter ``low, high, stream, step``."""
    c0, c1, c2, c3 = low, high, stream, step
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(ROUNDS):
        p0, p1 = c0.to(tl.uint64) * M0, c2.to(tl.uint64) * M1  # one instruction makes both halves
        c0, c2 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0, (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1, c3 = p1.to(tl.uint32), p0.to(tl.uint32)
        k0, k1 = k0 + W0, k1 + W1
    return c0, c1, c2, c3


@triton.jit
def words(seed, stream, step, start, BLOCK: tl.constexpr, GROUP: tl.constexpr = 4):
    """The stream's words, uint32, of a tile: one Philox4x32-7 for four neighbours, which one thread keeps.

    GROUP, 4 or 8, is how many neighbours a thread has: made as many at once, words need not change their thread.
    The counter's high word is the tile's: a tile has no carry, because ``start`` is a multiple of BLOCK.
    """
    quad = start >> 2
    low, high = quad.to(tl.uint32), (quad.to(tl.int64) >> 32).to(tl.uint32)
    if GROUP == 8:
        low += 2 * tl.arange(0, BLOCK // 8).to(tl.uint32)
        c0, c1, c2, c3 = philox(seed, stream, step, low, high)
        d0, d1, d2, d3 = philox(seed, stream, step, low + 1, high)
        c0, c1, c2, c3 = tl.interleave(c0, d0), tl.interleave(c1, d1), tl.interleave(c2, d2), tl.interleave(c3, d3)
    else:
        c0, c1, c2, c3 = philox(seed, stream, step, low + tl.arange(0, BLOCK // 4).to(tl.uint32), high)
    return tl.interleave(tl.interleave(c0, c2), tl.interleave(c1, c3))


@triton.jit
def bin_of(t, cumulative):
    """The last bin b with C[b] ≤ t, where C[0] = 0 ≤ t < C[256]."""
    b = tl.zeros_like(t)
    for level in tl.static_range(8):
        probe = b + (128 >> level)
        b = tl.where(tl.load(cumulative + probe).to(tl.uint32) <= t, probe, b)
    return b


@triton.jit
def guide_of(first, cumulative):
    """The entries of the cells of 2²⁰ words that start with the words ``first``, and whether any does not say all.

    An entry has the bin of the cell's first word (from bit 16 on), that of its last (from bit 24 on), and the word
    where the last begins (from bit 32 on). It says all unless a bin between the two has words of its own.
    """
    count = tl.load(cumulative + 256).to(tl.uint32)
    low = bin_of(tl.umulhi(first, count), cumulative)
    high = bin_of(tl.umulhi(first | 0xFFFFF, count), cumulative)
    begins = tl.load(cumulative + high).to(tl.uint64)
    word = ((begins << 32) + count - 1) // tl.maximum(count, 1).to(tl.uint64)  # the first w with w·count ≥ begins·2³²
    entry = (word << 32) | (high << 24).to(tl.uint64) | (low << 16).to(tl.uint64)
    hidden = (high > low) & (tl.load(cumulative + low + 1).to(tl.uint64) < begins)
    return entry, (count == 0) | (tl.max(hidden.to(tl.int32)) > 0)


@triton.jit
def unit_noise(word, cumulative, guide=None):
    """``n = float(m)·2⁻²⁴ − 0.5``, exact: uniform where ``cumulative`` is None, else from its 256 bins.

    ``guide`` is the histogram's, of ``noise.guides``.
    """
    if cumulative is None:
        m = word >> 8
    else:
        hidden = tl.load(guide + 4096) | tl.load(guide + 4097) | tl.load(guide + 4098) | tl.load(guide + 4099)
        if hidden == 0:
            entry = tl.load(guide + (word >> 20))
            bins = entry.to(tl.uint32) >> tl.where(word >= (entry >> 32).to(tl.uint32), 8, 0).to(tl.uint32)
            m = (bins & 0xFF0000) | (word & 0xFFFF)
        else:
            count = tl.load(cumulative + 256).to(tl.uint32)
            m = (bin_of(tl.umulhi(word, count), cumulative) << 16) | (word & 0xFFFF)
            m = tl.where(count > 0, m, 1 << 23)
    return m.to(tl.float32) * 2.0**-24 - 0.5


@triton.jit
def kept(rng, threshold, start, BLOCK: tl.constexpr):
    """Where the element's coin keeps it. A thread makes the coins of eight neighbours."""
    seed, stream, step = read_state(rng)
    pair = words(seed, stream ^ DROP_STREAM, step, start >> 1, BLOCK // 2)
    bound = tl.cast(threshold, tl.uint32) << 16  # coins are compared where they lie highest in a word
    return tl.interleave((pair << 16) < bound, pair < bound)


@triton.jit
def round_half_even(v):
    """To the nearest integer, ties to even, by the rounding of two sums: exact for |v| ≤ 2²², without the sign of zero.

    Beyond, it is monotone and stays beyond, out of every quantization range, and keeps infinity and NaN.
    """
    return (v + TO_INTEGER) - TO_INTEGER


@triton.jit
def floor(v):
    """To the next integer below, as far as :func:`round_half_even` goes; Triton's own flushes subnormals to zero."""
    rounded = round_half_even(v)
    return tl.where(rounded > v, rounded - 1.0, rounded)


@triton.jit
def clamp(v, low, high):
    """Into [low, high]; NaN stays NaN."""
    return tl.clamp(v, low, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def valid_scale(s):
    """A scale, NaN where it is not positive and finite."""
    return tl.where((s > 0.0) & (s <= LARGEST), s, float("nan"))


@triton.jit
def noise_forward(x, s, n, qmin, qmax):
    """``x + n·s``, or the bound that x is at or beyond."""
    above, below = qmax * s, qmin * s
    y = x + n * s
    y = tl.where(x >= above, above, y)
    return tl.where(x <= below, below, y)


@triton.jit
def noise_backward(x, s, n, qmin, qmax):
    """Where the gradient of :func:`noise_forward` passes to x, and its slope in s."""
    above, below = qmax * s, qmin * s
    inside = (x < above) & (x > below)
    slope = tl.where(inside, n, 0.0)
    slope = tl.where(x >= above, qmax, slope)
    return inside, tl.where(x <= below, qmin, slope)


@triton.jit
def rounded(v, z, SHIFTED: tl.constexpr = False):
    """The integer before the clamp, of v = x/s. Without a zero point z is 0.0, still added: it makes −0.0 of 0.0."""
    return round_half_even(v + z) if SHIFTED else round_half_even(v) + z


@triton.jit
def nearest_forward(integer, s, z, qmin, qmax):
    """``(clamp(integer) − z)·s``."""
    return (clamp(integer, qmin, qmax) - z) * s


@triton.jit
def nearest_backward(v, integer, z, qmin, qmax, GRADIENT: tl.constexpr):
    """Where the gradient of :func:`nearest_forward` passes to x, and its slope in s."""
    bounded = v + z if GRADIENT == "clamp-first" else integer
    inside = (bounded >= qmin) & (bounded <= qmax)
    if GRADIENT == "pass-through":
        inside = inside | True
    return inside, (clamp(integer, qmin, qmax) - z) - tl.where(inside, v, 0.0)


@triton.jit
def difference(w, w_src, start, i, live):
    """``w − w_src`` of a tile, 0 where ``live`` is false."""
    value = tl.load(w + start + i, mask=live, other=0.0).to(tl.float32)
    return value - tl.load(w_src + start + i, mask=live, other=0.0).to(tl.float32)


@triton.jit
def pull(grad, distance):
    """The factor of ``w − w_src`` in the gradient of its norm, 0 where the norm is 0."""
    norm = tl.load(distance)
    return tl.where(norm > 0.0, tl.div_rn(tl.load(grad), norm), 0.0)


@triton.jit
def floor_divide(n, over):
    """``n // d`` of n < 2³¹, uint32, by one product: ``over`` is ``_launch.reciprocal(d)``."""
    return tl.umulhi(n + n, over.to(tl.uint32)) >> ((over >> 32).to(tl.uint32) - 1)


@triton.jit
def place(start, i, rows, ROWS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """Which channels a tile's elements have: ``(channel, following, first)``, for :func:`spread`.

    A row is ``inner`` neighbours of one channel; row r is of channel r % channels. ``rows`` are their lengths.

    ROWS says how they lie in a tile: "one" value for all; "groups" of GROUP neighbours, each of one row; "long" rows,
    of which a tile touches two at most; "short".
    """
    inner, channels, over_inner, over_channels = rows
    if ROWS == "one":
        at = 0, 0, 0
    elif start.dtype == tl.int64 and ROWS != "groups":
        row = start // inner
        channel = row % channels
        if ROWS == "long":
            at = channel, tl.where(channel + 1 < channels, channel + 1, 0), i < (row + 1) * inner - start
        else:
            rows_on = ((start - row * inner).to(tl.uint32) + i.to(tl.uint32)) // tl.cast(inner, tl.uint32)
            own = (channel.to(tl.uint32) + rows_on) % tl.cast(channels, tl.uint32)
            at = own, own, 0
    else:
        if ROWS == "groups":
            part = start // GROUP + tl.arange(0, BLOCK // GROUP)
        elif ROWS == "long":
            part = start
        else:
            part = start + i
        row = floor_divide(part.to(tl.uint32), over_inner)
        channel = (row - floor_divide(row, over_channels) * tl.cast(channels, tl.uint32)).to(tl.int32)
        if ROWS == "long":
            end = (row + 1).to(tl.int32) * inner - start
            at = channel, tl.where(channel + 1 < channels, channel + 1, 0), i < end
        else:
            at = channel, channel, 0
    return at


@triton.jit
def spread(own, following, at, ROWS: tl.constexpr, GROUP: tl.constexpr):
    """Each element's value, from those of its channel."""
    if ROWS == "long":
        own = tl.where(at[2], own, following)
    if ROWS == "groups":  # copies in the thread that made the value
        own = tl.interleave(own, own)
        own = tl.interleave(own, own)
        if GROUP == 8:
            own = tl.interleave(own, own)
    return own


@triton.jit
def element_values(values, at, ROWS: tl.constexpr, GROUP: tl.constexpr):
    """Each element's entry of ``values``, which has one for each channel."""
    return spread(tl.load(values + at[0]), tl.load(values + at[1]), at, ROWS, GROUP)


@triton.jit
def element_scales(scale, at, ROWS: tl.constexpr, GROUP: tl.constexpr):
    """Each element's scale, NaN where it is not valid."""
    own, following = valid_scale(tl.load(scale + at[0])), valid_scale(tl.load(scale + at[1]))
    return spread(own, following, at, ROWS, GROUP)


@triton.jit
def element_zeros(zero_point, at, ROWS: tl.constexpr, GROUP: tl.constexpr):
    """Each element's zero point, 0.0 where there is none."""
    return 0.0 if zero_point is None else element_values(zero_point, at, ROWS, GROUP)


@triton.jit
def reciprocal(s):
    """``(factor, −s·factor, 1/(s·factor))``: a power of two, and what it leaves far from underflow and overflow."""
    factor = tl.where(s < 2.0**-60, 2.0**96, tl.where(s > 2.0**60, 2.0**-96, 1.0))
    return factor, s * -factor, tl.div_rn(1.0, s * factor)


@triton.jit
def divisors(scale, at, ROWS: tl.constexpr, GROUP: tl.constexpr):
    """Each element's scale s, and what :func:`quotient` divides by it with: made once for each channel."""
    own, following = valid_scale(tl.load(scale + at[0])), valid_scale(tl.load(scale + at[1]))
    s = spread(own, following, at, ROWS, GROUP)
    if INTERPRETED or ROWS == "short":
        result = s, s, s, s
    else:
        factor, minus, inverse = reciprocal(own)
        next_factor, next_minus, next_inverse = reciprocal(following)
        result = (
            s,
            spread(factor, next_factor, at, ROWS, GROUP),
            spread(minus, next_minus, at, ROWS, GROUP),
            spread(inverse, next_inverse, at, ROWS, GROUP),
        )
    return result


@triton.jit
def inverses(scale, at, ROWS: tl.constexpr, GROUP: tl.constexpr):
    """Each element's ``1/s``, made once for each channel."""
    own, following = valid_scale(tl.load(scale + at[0])), valid_scale(tl.load(scale + at[1]))
    return spread(tl.div_rn(1.0, own), tl.div_rn(1.0, following), at, ROWS, GROUP)


@triton.jit
def quotient(x, divisor, ROWS: tl.constexpr):
    """``x / s``, rounded as IEEE division rounds it, where ``2⁻⁴⁰ ≤ abs(x / s) ≤ 2⁹²``; infinity and NaN as well.

    With r = 1/s rounded and q = x·r rounded, ``q + (x − q·s)·r`` with two fused operations is the rounded quotient (the
    reason, and every s tried, are in tests/backends/test_quotient.py), if nothing on the way underflows or overflows.
    The factor sees to that for the quotients above. A smaller one may differ in its last bits and in its zero's sign, a
    greater one may be infinite: no op sees that, since the one rounds to 0 and the other lies beyond every range.
    """
    s, factor, minus, inverse = divisor
    if INTERPRETED or ROWS == "short":
        v = tl.div_rn(x, s)
    else:
        x *= factor
        q = x * inverse
        v = tl.fma(tl.fma(q, minus, x), inverse, q)
        v = tl.where(tl.abs(q) <= LARGEST, v, q)  # an infinite one has no remainder
    return v


@triton.jit
def store_row_sums(
    partial, values, start, i, live, numel, inner, slots, ROWS: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr
):
    """The tile's part of each row's sum, to where no other tile writes: the same sums in the same order at every run.

    "one": ``partial[tile]``. "groups": one sum for SPAN neighbours, which are of one row and in one warp.
    "long": ``partial[row, t]``, t counting the row's tiles. "short": the terms themselves.
    """
    if ROWS == "one":
        tl.store(partial + start // BLOCK, tl.sum(values))
    elif ROWS == "groups":
        span = start // SPAN + tl.arange(0, BLOCK // SPAN)
        sums = tl.sum(tl.reshape(values, [BLOCK // SPAN, SPAN]), axis=1)
        tl.store(partial + span, sums, mask=span < numel // SPAN)
    elif ROWS == "long":
        row = start // inner
        end = (row + 1) * inner - start
        slot = start // BLOCK - row * inner // BLOCK
        tl.store(partial + row * slots + slot, tl.sum(tl.where(i < end, values, 0.0)))
        if (end < BLOCK) & (start + end < numel):
            tl.store(partial + (row + 1) * slots, tl.sum(tl.where(i < end, 0.0, values)))
    else:
        tl.store(partial + start + i, values, mask=live)
