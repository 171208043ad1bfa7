"""Merging quantized tensors on their integers, in Triton. Definition: :mod:`hdrq.reference.merge`.

Three launches, whatever the number of draws: Δ*; the sums of every draw's cosines; the codes of the draw kept, made
again from the random stream, so that no draw is stored and its number never leaves the device.
"""

import torch
import triton
import triton.language as tl

from hdrq.kernels import _lang as lang
from hdrq.kernels._launch import BLOCK, launch, tiling

PROGRAMS = 1024  # of one draw, each over its share of the tiles: bounds the sums kept, and the grid


@triton.jit
def _dequantized(codes, scales, k, start, i, live, numel, inner, channels, ROWS: tl.constexpr):
    """``w_k = I_k·Δ_k`` of a tile, and Δ_k."""
    k = tl.cast(k, tl.int64)
    code = tl.load(codes + k * numel + start + i, mask=live, other=0)
    delta = lang.valid_scale(lang.per_element(scales + k * channels, start, i, inner, channels, ROWS))
    return code.to(tl.float32) * delta, delta


@triton.jit
def _merged(
    codes,
    scales,
    merged_scale,
    weights,
    rng,
    draw,
    qmin,
    qmax,
    start,
    i,
    live,
    numel,
    inner,
    channels,
    MODELS: tl.constexpr,
    NOISE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``I*`` as float32, NaN where a scale is invalid, ``Σ λw`` and Δ* of a tile. A sum may start at 0: exact."""
    seed, stream, step = lang.read_state(rng)
    step += draw.to(tl.uint32)
    if NOISE == "odd":
        first = tl.load(codes + start + i, mask=live, other=0)
        second = tl.load(codes + tl.cast(numel, tl.int64) + start + i, mask=live, other=0)
        odd = ((first ^ second) & 1) != 0
    total = tl.zeros([BLOCK], tl.float32)
    midpoint = tl.zeros([BLOCK], tl.float32)
    for k in range(MODELS):
        w, delta = _dequantized(codes, scales, k, start, i, live, numel, inner, channels, ROWS)
        weight = tl.load(weights + k)
        midpoint += weight * w
        if NOISE != "none":
            n = lang.unit_noise(lang.words(seed, stream + tl.cast(k, tl.uint32), step, start, BLOCK), None)
            if NOISE == "odd":
                n = tl.where(odd, n, 0.0)
            w += n * delta
        total += weight * w
    step_size = lang.per_element(merged_scale, start, i, inner, channels, ROWS)
    q = lang.clamp(lang.round_half_even(tl.div_rn(total, step_size)), qmin, qmax)
    return q, midpoint, step_size


@triton.jit
def merged_scale_kernel(merged_scale, scales, weights, channels, MODELS: tl.constexpr, BLOCK: tl.constexpr):
    c = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for k in range(MODELS):
        delta = tl.load(scales + tl.cast(k, tl.int64) * channels + c, mask=c < channels, other=1.0)
        total += tl.load(weights + k) * lang.valid_scale(delta)
    tl.store(merged_scale + c, total, mask=c < channels)


@triton.jit(do_not_specialize=["tiles", "programs", "inner", "channels"])
def merge_score_kernel(
    sums,
    codes,
    scales,
    merged_scale,
    weights,
    rng,
    qmin,
    qmax,
    tiles,
    programs,
    numel,
    inner,
    channels,
    MODELS: tl.constexpr,
    NOISE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``sums[draw, program] = (Σ d², Σ d·r, Σ r²)`` for each model, float64, over the tiles of this program."""
    PADDED: tl.constexpr = triton.next_power_of_2(MODELS)
    draw, tile = tl.program_id(0) // programs, tl.program_id(0) % programs
    i = tl.arange(0, BLOCK)
    model = tl.arange(0, PADDED)
    dd = tl.zeros([PADDED], tl.float64)
    dr = tl.zeros([PADDED], tl.float64)
    rr = tl.zeros([PADDED], tl.float64)
    while tile < tiles:
        start = tile.to(tl.int64) * BLOCK
        live = i < numel - start
        q, midpoint, step_size = _merged(
            codes, scales, merged_scale, weights, rng, draw, qmin, qmax, start, i, live, numel, inner, channels,
            MODELS, NOISE, ROWS, BLOCK,
        )  # fmt: skip
        r = tl.where(live, q * step_size - midpoint, 0.0).to(tl.float64)
        rr += tl.sum(r * r)
        for k in range(MODELS):
            w, _ = _dequantized(codes, scales, k, start, i, live, numel, inner, channels, ROWS)
            d = tl.where(live, midpoint - w, 0.0).to(tl.float64)
            dd += tl.where(model == k, tl.sum(d * d), 0.0)
            dr += tl.where(model == k, tl.sum(d * r), 0.0)
        tile += programs
    sums += tl.program_id(0).to(tl.int64) * 3 * MODELS + model
    tl.store(sums, dd, mask=model < MODELS)
    tl.store(sums + MODELS, dr, mask=model < MODELS)
    tl.store(sums + 2 * MODELS, rr, mask=model < MODELS)


@triton.jit(do_not_specialize=["inner", "channels"])
def merge_codes_kernel(
    merged,
    kept,
    codes,
    scales,
    merged_scale,
    weights,
    rng,
    qmin,
    qmax,
    numel,
    inner,
    channels,
    MODELS: tl.constexpr,
    NOISE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    i = tl.arange(0, BLOCK)
    live = i < numel - start
    q, _, _ = _merged(
        codes, scales, merged_scale, weights, rng, tl.load(kept), qmin, qmax, start, i, live, numel, inner, channels,
        MODELS, NOISE, ROWS, BLOCK,
    )  # fmt: skip
    q = tl.where(q == q, q, qmin)  # a NaN has no code
    tl.store(merged + start + i, q.to(merged.dtype.element_ty), mask=live)


def merge(codes, scales, qmin, qmax, rng, weights, draws, noise, axis) -> tuple[torch.Tensor, ...]:
    first, models, channels = codes[0], len(codes), scales[0].numel()
    merged = torch.empty_like(first, dtype=torch.int8 if qmin >= -128 and qmax <= 127 else torch.int16)
    merged_scale = torch.empty_like(scales[0])
    codes, scales = torch.stack(codes), torch.stack(scales)
    # Filled on the device: a copy of a list from the host would wait for the device, and could not be captured.
    lam = torch.stack([torch.full((), w, dtype=torch.float32, device=first.device) for w in weights])
    if channels > 0:
        args = (merged_scale, scales, lam, channels)
        launch(merged_scale_kernel, triton.cdiv(channels, BLOCK), first, *args, MODELS=models)
    if first.numel() == 0:
        return merged, merged_scale, *_best(lam.new_zeros((draws, 1, 3, models), dtype=torch.float64))
    t = tiling(first, axis)
    programs = min(t.count, PROGRAMS)
    sums = torch.empty((draws, programs, 3, models), dtype=torch.float64, device=first.device)
    inputs = (codes, scales, merged_scale, lam, rng, float(qmin), float(qmax))
    lengths = (t.numel, t.inner, t.channels)
    constants = {"MODELS": models, "NOISE": noise, "ROWS": t.rows, "block": t.block}
    launch(merge_score_kernel, draws * programs, first, sums, *inputs, t.count, programs, *lengths, **constants)
    cosines, kept = _best(sums)
    launch(merge_codes_kernel, t.count, first, merged, kept, *inputs, *lengths, **constants)
    return merged, merged_scale, cosines, kept


def _best(sums: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The cosines, float64 (draws, K), and the first draw whose smaller one is greatest."""
    dd, dr, rr = sums.sum(dim=1).unbind(1)
    length = (dd * (dd + 2 * dr + rr).clamp(min=0)).sqrt()
    cosines = torch.where(length > 0, (dd + dr) / length, 1.0)
    return cosines, cosines.amin(dim=1).argmax()
