"""The parts of the search for a scale, in Triton. Definition: :mod:`hdrq.backends.reference.ranges`."""

import torch
import triton
import triton.language as tl

from hdrq.kernels import _lang as lang
from hdrq.kernels._launch import launch, operand, row_block

CANDIDATES = 64  # that are scored on a tile while it is in registers
COPIES = 2**17  # words of the copies of a table: its middle bins take most elements, and each takes one at a time


@triton.jit
def _power(x, p):
    """``x^p`` of x ≥ 0, within about 1e-6: ``2^(p·log2 x)``, by the polynomials of csrc/ranges.h."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23  # of x over √½: the rest is in [√½, √2)
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    ff = f * f
    odd = ((0.23610973 * ff + 0.28684822) * ff + 0.48093262) * ff + 1.4426948
    even = (((-0.14199515 * ff - 0.25111422) * ff - 0.35998312) * ff - 0.72136116) * ff + 4.1276955e-08
    t = lang.clamp((exponent.to(tl.float32) + (even + odd * f)) * p, -126.0, 128.0)
    shifted = t + lang.TO_INTEGER  # its low bits are the integer
    g = t - (shifted - lang.TO_INTEGER)
    gg = g * g
    odd = (0.0013400433 * gg + 0.055503272) * gg + 0.69314718
    even = (0.0096760374 * gg + 0.24022107) * gg + 1.0000001
    y = (even + odd * g).to(tl.int32, bitcast=True) + (shifted.to(tl.int32, bitcast=True) << 23)
    return tl.where(x < 2.0**-126, 0.0, y.to(tl.float32, bitcast=True))


@triton.jit(do_not_specialize=["candidates", "parts"])
def range_errors_kernel(
    sums,
    x,
    weights,
    scale,
    low,
    high,
    unit,
    norm,
    length,
    candidates,
    parts,
    CANDIDATES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``sums[row, part, candidate]``: the part of a row is one tile of it."""
    blocks = tl.cdiv(candidates, CANDIDATES)
    program = tl.program_id(0)
    row, part = program // blocks // parts, program // blocks % parts
    first = program % blocks * CANDIDATES
    at = tl.cast(row, tl.int64) * length + tl.cast(part, tl.int64) * BLOCK
    i = tl.arange(0, BLOCK)
    live = i < length - tl.cast(part, tl.int64) * BLOCK
    value = tl.load(x + at + i, mask=live, other=0.0).to(tl.float32)
    weight = tl.where(live, 1.0, 0.0)
    if weights is not None:
        weight = tl.load(weights + at + i, mask=live, other=0.0)
    over_unit = tl.div_rn(1.0, tl.load(unit + row))
    candidate = tl.cast(row, tl.int64) * candidates
    sums += (tl.cast(row, tl.int64) * parts + part) * candidates
    for c in range(first, tl.minimum(first + CANDIDATES, candidates)):
        s = tl.load(scale + candidate + c)
        v = lang.clamp(tl.div_rn(value, s), tl.load(low + candidate + c), tl.load(high + candidate + c))
        e = tl.abs(value - lang.round_half_even(v) * s) * over_unit  # bounds are integers: they may come first
        tl.store(sums + c, tl.sum(_power(e, norm) * weight))


@triton.jit(do_not_specialize=["parts", "copies"])
def range_table_kernel(
    table, x, origin, factor, length, parts, copies, BINS: tl.constexpr, ONCE: tl.constexpr, BLOCK: tl.constexpr
):
    """Counts of each bin and sums of what its positions are beyond its start: in one word if ONCE.

    ``table[row, copy]``, whose copies the tiles of a row take in turn.
    """
    row, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    start = tl.cast(part, tl.int64) * BLOCK
    i = tl.arange(0, BLOCK)
    live = i < length - start
    value = tl.load(x + tl.cast(row, tl.int64) * length + start + i, mask=live, other=0.0).to(tl.float32)
    v = (value * 0.5 - tl.load(origin + row)) * tl.load(factor + row)
    position = tl.minimum(tl.maximum(v, 0.0), 2.0**24 - 1.0).to(tl.int32)
    WIDTH: tl.constexpr = 2**24 // BINS
    cell = (tl.cast(row, tl.int64) * copies + part % copies) * BINS + position // WIDTH
    beyond = (position % WIDTH).to(tl.int64)
    if ONCE:
        tl.atomic_add(table + cell, beyond + 2**32, mask=live, sem="relaxed")
    else:
        tl.atomic_add(table + 2 * cell, tl.full([BLOCK], 1, tl.int64), mask=live, sem="relaxed")
        tl.atomic_add(table + 2 * cell + 1, beyond, mask=live, sem="relaxed")


def range_errors(x, weights, scale, low, high, unit, norm) -> torch.Tensor:
    x = operand(x)
    (rows, length), candidates, block = x.shape, scale.shape[1], row_block(x.shape[1])
    parts = triton.cdiv(length, block)
    sums = torch.empty((rows, parts, candidates), dtype=torch.float32, device=x.device)
    programs = rows * parts * triton.cdiv(candidates, CANDIDATES)
    args = (sums, x, weights, scale, low, high, unit, float(norm), length, candidates, parts)
    launch(range_errors_kernel, programs, x, *args, CANDIDATES=CANDIDATES, block=block)
    return sums.sum(dim=1, dtype=torch.float64)


def range_table(x, origin, factor, bins) -> torch.Tensor:
    x = operand(x)
    (rows, length), block = x.shape, row_block(x.shape[1])
    once = length < 2**31 and length * (2**24 // bins) < 2**32  # so that neither sum leaves its half of a word
    parts, words = triton.cdiv(length, block), 1 if once else 2
    copies = max(1, min(parts, COPIES // (rows * bins * words)))
    table = torch.zeros((rows, copies, bins, words), dtype=torch.int64, device=x.device)
    args = (table, x, origin, factor, length, parts, copies)
    launch(range_table_kernel, rows * parts, x, *args, BINS=bins, ONCE=once, block=block)
    table = table.sum(dim=1)
    return torch.cat((table >> 32, table & 0xFFFFFFFF), 2) if once else table
