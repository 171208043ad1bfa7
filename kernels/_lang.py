"""The jitted pieces that the kernels share: the random stream, the arithmetic, and which scale is an element's own.

A tile is BLOCK neighbouring elements, from ``start`` (int64, a multiple of BLOCK) on; ``i`` counts them from 0. Tensors
are passed as pointers to their first element.

Every operation must round by itself: kernels are launched with ``enable_fp_fusion=False``, and divide with
``tl.div_rn``, since ``/`` is an approximation on a GPU.
"""

import triton
import triton.language as tl

from hdrq import rng as stream_constants

M0, M1 = (tl.constexpr(m) for m in stream_constants.MULTIPLIERS)
W0, W1 = (tl.constexpr(w) for w in stream_constants.KEY_STEPS)
ROUNDS = tl.constexpr(stream_constants.ROUNDS)
DROP_STREAM = tl.constexpr(stream_constants.DROP_STREAM)
KEEP_ALL = tl.constexpr(stream_constants.KEEP_ALL)

TO_INTEGER = tl.constexpr(1.5 * 2.0**23)  # in [2²³, 2²⁴) float32 holds the integers and nothing between


@triton.jit
def read_state(rng):
    """``(seed, stream, step)``: int64 and two uint32."""
    return tl.load(rng), tl.load(rng + 1).to(tl.uint32), tl.load(rng + 2).to(tl.uint32)


@triton.jit
def words(seed, stream, step, start, BLOCK: tl.constexpr):
    """The stream's words, uint32, of a tile: one Philox4x32-7 for four neighbours, which one thread keeps.

    The counter's high word is the tile's: a tile has no carry, because ``start`` is a multiple of BLOCK.
    """
    group = start >> 2
    c0 = group.to(tl.uint32) + tl.arange(0, BLOCK // 4).to(tl.uint32)
    c1, c2, c3 = (group >> 32).to(tl.uint32), stream, step
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(ROUNDS):
        h0, h1 = tl.umulhi(c0, M0), tl.umulhi(c2, M1)
        c0, c1, c2, c3 = h1 ^ c1 ^ k0, c2 * M1, h0 ^ c3 ^ k1, c0 * M0
        k0, k1 = k0 + W0, k1 + W1
    return tl.interleave(tl.interleave(c0, c2), tl.interleave(c1, c3))


@triton.jit
def unit_noise(word, cumulative):
    """``n = float(m)·2⁻²⁴ − 0.5``, exact: uniform where ``cumulative`` is None, else from its 256 bins."""
    if cumulative is None:
        n = (word >> 8).to(tl.float32) * 2.0**-24 - 0.5
    else:
        count = tl.load(cumulative + 256).to(tl.uint32)
        t = tl.umulhi(word, count)
        b = tl.zeros_like(word)
        for level in tl.static_range(8):  # the last b with C[b] ≤ t; C[0] = 0 ≤ t < C[256]
            probe = b + (128 >> level)
            b = tl.where(tl.load(cumulative + probe).to(tl.uint32) <= t, probe, b)
        n = ((b << 16) | (word & 0xFFFF)).to(tl.float32) * 2.0**-24 - 0.5
        n = tl.where(count > 0, n, 0.0)
    return n


@triton.jit
def kept(rng, threshold, start, BLOCK: tl.constexpr):
    """Where the element's coin keeps it."""
    seed, stream, step = read_state(rng)
    pair = words(seed, stream ^ DROP_STREAM, step, start >> 1, BLOCK // 2)
    return tl.interleave(pair & 0xFFFF, pair >> 16).to(tl.int32) < threshold


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
    return tl.where((s > 0.0) & (s < float("inf")), s, float("nan"))


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
def nearest_forward(x, s, z, qmin, qmax):
    """``(clamp(round(x/s) + z) − z)·s``. Without a zero point z is 0.0, and still added: it makes −0.0 of 0.0."""
    return (clamp(round_half_even(tl.div_rn(x, s)) + z, qmin, qmax) - z) * s


@triton.jit
def nearest_backward(x, s, z, qmin, qmax):
    """Where the gradient of :func:`nearest_forward` passes to x, and its slope in s."""
    v = tl.div_rn(x, s)
    shifted = round_half_even(v) + z
    inside = (shifted >= qmin) & (shifted <= qmax)
    return inside, (clamp(shifted, qmin, qmax) - z) - tl.where(inside, v, 0.0)


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
def per_element(values, start, i, inner, channels, ROWS: tl.constexpr):
    """Each element's entry of ``values``, which has one for each channel.

    A row is ``inner`` neighbours of one channel; row r is of channel r % channels.

    ROWS says how they lie in a tile: "one" value for all; "long" rows, of which a tile touches two at most; "short".
    """
    if ROWS == "one":
        own = tl.load(values)
    else:
        row = start // inner
        channel = row % channels
        if ROWS == "long":
            following = tl.load(values + tl.where(channel + 1 < channels, channel + 1, 0))
            own = tl.where(i < (row + 1) * inner - start, tl.load(values + channel), following)
        else:
            rows_on = ((start - row * inner).to(tl.uint32) + i.to(tl.uint32)) // tl.cast(inner, tl.uint32)
            own = tl.load(values + (channel.to(tl.uint32) + rows_on) % tl.cast(channels, tl.uint32))
    return own


@triton.jit
def store_row_sums(partial, values, start, i, live, numel, inner, slots, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The tile's part of each row's sum, to where no other tile writes: the same sums in the same order at every run.

    "one": ``partial[tile]``. "long": ``partial[row, t]``, t counting the row's tiles. "short": the terms themselves.
    """
    if ROWS == "one":
        tl.store(partial + start // BLOCK, tl.sum(values))
    elif ROWS == "long":
        row = start // inner
        end = (row + 1) * inner - start
        slot = start // BLOCK - row * inner // BLOCK
        tl.store(partial + row * slots + slot, tl.sum(tl.where(i < end, values, 0.0)))
        if (end < BLOCK) & (start + end < numel):
            tl.store(partial + (row + 1) * slots, tl.sum(tl.where(i < end, 0.0, values)))
    else:
        tl.store(partial + start + i, values, mask=live)
