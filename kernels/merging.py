"""Merging quantized tensors on their integers, in Triton. Definition: :mod:`hdrq.backends.reference.merging`.

Three launches, whatever the number of draws: Δ* and z*; the sums of every draw's cosines; the codes of the draw kept,
made again from the random stream, so that no draw is stored and its number never leaves the device.
"""

import torch
import triton
import triton.language as tl

from hdrq.backends.eager.merging import cosines, kept
from hdrq.kernels import _lang as lang
from hdrq.kernels._codes import alike, input_tile, store_code
from hdrq.kernels._launch import launch, tiling

PROGRAMS = 1024  # of one draw, each over its share of the tiles: bounds the sums kept, and the grid
GROUP = 32  # fast draws that one program scores: their sums stay in its registers


@triton.jit
def _midpoint(
    inputs, weights, start, i, live,
    MODELS: tl.constexpr, NOISE: tl.constexpr, ROWS: tl.constexpr, PACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``Σ λw`` of a tile, and where there is noise. A sum may start at 0: exact."""
    midpoint = tl.zeros([BLOCK], tl.float32)
    mean = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(MODELS):
        integer, delta = input_tile(inputs, k, start, i, live, ROWS, PACKED)
        weight = tl.load(weights + k)
        midpoint += weight * (integer * delta)
        mean += weight * integer
    noisy = tl.full([BLOCK], NOISE == "all", tl.int1)
    if NOISE == "odd":
        noisy = tl.abs(mean - lang.floor(mean) - 0.5) < 0.25
    return midpoint, noisy


@triton.jit
def _exact(
    inputs, weights, rng, draw, step_size, noisy, start, i, live,
    MODELS: tl.constexpr, NOISE: tl.constexpr, ROWS: tl.constexpr, PACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A draw's ``round_half_even(Σ λ_k·(J_k·Δ_k + n_k·Δ_k) / Δ*)``: before the zero point and the clamp."""
    seed, stream, step = lang.read_state(rng)
    step += draw.to(tl.uint32)
    total = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(MODELS):
        integer, delta = input_tile(inputs, k, start, i, live, ROWS, PACKED)
        w = integer * delta
        if NOISE != "none":
            n = lang.unit_noise(lang.words(seed, stream + tl.cast(k, tl.uint32), step, start, BLOCK), None)
            w += tl.where(noisy, n, 0.0) * delta
        total += tl.load(weights + k) * w
    return lang.round_half_even(tl.div_rn(total, step_size))


@triton.jit
def _share(inputs, weights, step_size, k: tl.constexpr, start, i, live, ROWS: tl.constexpr, PACKED: tl.constexpr):
    """``a_k = λ_k·Δ_k / Δ*``, float64."""
    _, delta = input_tile(inputs, k, start, i, live, ROWS, PACKED)
    return tl.maximum(tl.div_rn(tl.load(weights + k) * delta, step_size).to(tl.float64), 6.103515625e-05)


@triton.jit
def _fast(
    inputs, weights, rng, midpoint, step_size, noisy, start, i, live,
    MODELS: tl.constexpr, ROWS: tl.constexpr, PACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The lower outcome of each element, the threshold below which a draw takes the next one, and A and B."""
    v = tl.div_rn(midpoint, step_size)
    low = tl.where(noisy, lang.floor(v), lang.round_half_even(v))
    y = v - low
    h = tl.minimum(y, 1.0 - y).to(tl.float64)
    below = tl.zeros([BLOCK], tl.float64)
    for subset in tl.static_range(2**MODELS):
        total = tl.zeros([BLOCK], tl.float64)
        for k in tl.static_range(MODELS):
            if subset >> k & 1:
                total += _share(inputs, weights, step_size, k, start, i, live, ROWS, PACKED)
        part = tl.maximum(h - total, 0.0)
        power = part
        for _ in tl.static_range(MODELS - 1):
            power *= part
        if (subset ^ subset >> 1 ^ subset >> 2 ^ subset >> 3) & 1:  # an odd number of models
            below -= power
        else:
            below += power
    volume = tl.full([BLOCK], 2.0 if MODELS == 2 else 6.0 if MODELS == 3 else 24.0, tl.float64)
    for k in tl.static_range(MODELS):
        volume *= _share(inputs, weights, step_size, k, start, i, live, ROWS, PACKED)
    p = tl.minimum(tl.maximum(below * (1.0 / volume), 0.0), 1.0)
    p = tl.where(y <= 0.5, p, 1.0 - p)
    threshold = tl.where(noisy, p * 16777216.0, 0.0).to(tl.int32)
    seed, stream, step = lang.read_state(rng)
    word = lang.words(seed, stream, step, start, BLOCK)
    stride = lang.words(seed, stream + tl.cast(1, tl.uint32), step, start, BLOCK)
    return low, threshold, word, stride


@triton.jit
def _up(word, threshold):
    return (word >> 8).to(tl.int32) < threshold


@triton.jit
def _residue(q, zero, step_size, midpoint, qmin, qmax, live):
    """``r = (I* − z*)Δ* − Σ λw``, 0 where ``live`` is false."""
    return tl.where(live, (lang.clamp(q + zero, qmin, qmax) - zero) * step_size - midpoint, 0.0)


@triton.jit
def merged_grid_kernel(
    merged_scale, merged_zero, scales, zeros, weights, channels, MODELS: tl.constexpr, BLOCK: tl.constexpr
):
    c = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    step = tl.zeros([BLOCK], tl.float32)
    zero = tl.zeros([BLOCK], tl.float32)
    for k in range(MODELS):
        at = tl.cast(k, tl.int64) * channels + c
        delta = tl.load(weights + k) * lang.valid_scale(tl.load(scales + at, mask=c < channels, other=1.0))
        step += delta
        zero += delta * tl.load(zeros + at, mask=c < channels, other=0.0)
    tl.store(merged_scale + c, step, mask=c < channels)
    tl.store(merged_zero + c, lang.round_half_even(tl.div_rn(zero, step)), mask=c < channels)


@triton.jit(do_not_specialize=["tiles", "programs", "inner", "channels"])
def merge_score_kernel(
    sums, codes, scales, zeros, merged_scale, merged_zero, weights, rng, qmin, qmax,
    tiles, programs, numel, inner, channels,
    MODELS: tl.constexpr, NOISE: tl.constexpr, ROWS: tl.constexpr, PACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``sums[draw, program] = (Σ d², Σ d·r, Σ r²)`` for each model, float64, over the tiles of this program."""
    PADDED: tl.constexpr = triton.next_power_of_2(MODELS)
    inputs = codes, scales, zeros, inner, channels
    draw, tile = tl.program_id(0) // programs, tl.program_id(0) % programs
    i = tl.arange(0, BLOCK)
    model = tl.arange(0, PADDED)
    dd = tl.zeros([PADDED], tl.float64)
    dr = tl.zeros([PADDED], tl.float64)
    rr = tl.zeros([PADDED], tl.float64)
    while tile < tiles:
        start = tile.to(tl.int64) * BLOCK
        live = i < numel - start
        step_size = lang.per_element(merged_scale, start, i, inner, channels, ROWS)
        zero = lang.per_element(merged_zero, start, i, inner, channels, ROWS)
        midpoint, noisy = _midpoint(inputs, weights, start, i, live, MODELS, NOISE, ROWS, PACKED, BLOCK)
        q = _exact(inputs, weights, rng, draw, step_size, noisy, start, i, live, MODELS, NOISE, ROWS, PACKED, BLOCK)
        r = _residue(q, zero, step_size, midpoint, qmin, qmax, live).to(tl.float64)
        rr += tl.sum(r * r)
        for k in tl.static_range(MODELS):
            integer, delta = input_tile(inputs, k, start, i, live, ROWS, PACKED)
            d = tl.where(live, midpoint - integer * delta, 0.0).to(tl.float64)
            dd += tl.where(model == k, tl.sum(d * d), 0.0)
            dr += tl.where(model == k, tl.sum(d * r), 0.0)
        tile += programs
    sums += tl.program_id(0).to(tl.int64) * 3 * MODELS + model
    tl.store(sums, dd, mask=model < MODELS)
    tl.store(sums + MODELS, dr, mask=model < MODELS)
    tl.store(sums + 2 * MODELS, rr, mask=model < MODELS)


@triton.jit(do_not_specialize=["tiles", "programs", "draws", "inner", "channels"])
def merge_fast_score_kernel(
    sums, codes, scales, zeros, merged_scale, merged_zero, weights, rng, qmin, qmax,
    tiles, programs, draws, numel, inner, channels,
    MODELS: tl.constexpr, NOISE: tl.constexpr, ROWS: tl.constexpr, PACKED: tl.constexpr, GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """``sums[draw, program]`` as above, for GROUP draws, which share their two words."""
    PADDED: tl.constexpr = triton.next_power_of_2(MODELS)
    inputs = codes, scales, zeros, inner, channels
    group, tile = tl.program_id(0) // programs, tl.program_id(0) % programs
    program = tile
    i = tl.arange(0, BLOCK)
    member = tl.arange(0, GROUP)
    model = tl.arange(0, PADDED)
    dd = tl.zeros([PADDED], tl.float64)
    dr = tl.zeros([GROUP, PADDED], tl.float64)
    rr = tl.zeros([GROUP], tl.float64)
    while tile < tiles:
        start = tile.to(tl.int64) * BLOCK
        live = i < numel - start
        step_size = lang.per_element(merged_scale, start, i, inner, channels, ROWS)
        zero = lang.per_element(merged_zero, start, i, inner, channels, ROWS)
        midpoint, noisy = _midpoint(inputs, weights, start, i, live, MODELS, NOISE, ROWS, PACKED, BLOCK)
        low, threshold, word, gap = _fast(
            inputs, weights, rng, midpoint, step_size, noisy, start, i, live, MODELS, ROWS, PACKED, BLOCK
        )
        lower = _residue(low, zero, step_size, midpoint, qmin, qmax, live)
        upper = _residue(low + 1.0, zero, step_size, midpoint, qmin, qmax, live)
        first = word + (group * GROUP).to(tl.uint32) * gap
        word = first
        for d in range(GROUP):
            r = tl.where(_up(word, threshold), upper, lower)
            rr += tl.where(member == d, tl.sum(r * r), 0.0)
            word += gap
        for k in tl.static_range(MODELS):
            integer, delta = input_tile(inputs, k, start, i, live, ROWS, PACKED)
            distance = tl.where(live, midpoint - integer * delta, 0.0)
            dd += tl.where(model == k, tl.sum(distance * distance), 0.0)
            word = first
            for d in range(GROUP):
                r = tl.where(_up(word, threshold), upper, lower)
                dr += tl.where((member == d)[:, None] & (model == k)[None, :], tl.sum(distance * r), 0.0)
                word += gap
        tile += programs
    draw = group * GROUP + member
    sums += (draw.to(tl.int64) * programs + program)[:, None] * 3 * MODELS + model[None, :]
    every = (draw < draws)[:, None] & (model < MODELS)[None, :]
    tl.store(sums, tl.broadcast_to(dd[None, :], [GROUP, PADDED]), mask=every)
    tl.store(sums + MODELS, dr, mask=every)
    tl.store(sums + 2 * MODELS, tl.broadcast_to(rr[:, None], [GROUP, PADDED]), mask=every)


@triton.jit(do_not_specialize=["inner", "channels"])
def merge_codes_kernel(
    merged, best, codes, scales, zeros, merged_scale, merged_zero, weights, rng, qmin, qmax,
    numel, inner, channels,
    MODELS: tl.constexpr, NOISE: tl.constexpr, FAST: tl.constexpr, ROWS: tl.constexpr, PACKED: tl.constexpr,
    PACK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    inputs = codes, scales, zeros, inner, channels
    start = tl.program_id(0).to(tl.int64) * BLOCK
    i = tl.arange(0, BLOCK)
    live = i < numel - start
    draw = tl.load(best)
    step_size = lang.per_element(merged_scale, start, i, inner, channels, ROWS)
    zero = lang.per_element(merged_zero, start, i, inner, channels, ROWS)
    midpoint, noisy = _midpoint(inputs, weights, start, i, live, MODELS, NOISE, ROWS, PACKED, BLOCK)
    if FAST:
        low, threshold, word, gap = _fast(
            inputs, weights, rng, midpoint, step_size, noisy, start, i, live, MODELS, ROWS, PACKED, BLOCK
        )
        q = tl.where(_up(word + draw.to(tl.uint32) * gap, threshold), low + 1.0, low)
    else:
        q = _exact(inputs, weights, rng, draw, step_size, noisy, start, i, live, MODELS, NOISE, ROWS, PACKED, BLOCK)
    q = lang.clamp(q + zero, qmin, qmax)
    q = tl.where(q == q, q, qmin)  # a NaN has no code
    store_code(merged, q.to(tl.int32), start, i, numel, PACK, BLOCK)


def merge(
    codes, scales, zero_points, qmin, qmax, rng, weights, draws, noise, axis, select, mode, shape, signed, packed
) -> tuple[torch.Tensor, ...]:
    models = len(codes)
    result = rng.new_empty(shape, dtype=torch.int8 if packed or (qmin >= -128 and qmax <= 127) else torch.int16)
    merged = rng.new_empty((result.numel() + 1) // 2, dtype=torch.uint8) if packed else result
    codes, layout = alike(codes, shape, signed)
    scales, zeros, lam = torch.stack(scales), torch.stack(zero_points), on_device(weights, rng.device)
    merged_scale, merged_zero = merged_grid(scales, zeros, lam)
    if result.numel() == 0:
        similarity = _cosines(lam.new_zeros((draws, 1, 3, models), dtype=torch.float64))
        return merged, merged_scale, merged_zero, similarity, kept(similarity, select)
    t = tiling(result, axis)
    programs = min(t.count, PROGRAMS)
    sums = torch.empty((draws, programs, 3, models), dtype=torch.float64, device=rng.device)
    inputs = (codes, scales, zeros, merged_scale, merged_zero, lam, rng, float(qmin), float(qmax))
    lengths = (t.numel, t.inner, t.channels)
    constants = {"NOISE": noise, "ROWS": t.rows, "PACKED": layout, "block": t.block}
    if mode == "fast":
        group = min(GROUP, triton.next_power_of_2(draws))
        args = (sums, *inputs, t.count, programs, draws, *lengths)
        grid = triton.cdiv(draws, group) * programs
        launch(merge_fast_score_kernel, grid, rng, *args, MODELS=models, GROUP=group, **constants)
    else:
        args = (sums, *inputs, t.count, programs, *lengths)
        launch(merge_score_kernel, draws * programs, rng, *args, MODELS=models, **constants)
    similarity = _cosines(sums)
    best = kept(similarity, select)
    constants |= {"MODELS": models, "FAST": mode == "fast", "PACK": packed}
    launch(merge_codes_kernel, t.count, rng, merged, best, *inputs, *lengths, **constants)
    return merged, merged_scale, merged_zero, similarity, best


def on_device(weights, device: torch.device) -> torch.Tensor:
    """λ, filled on the device: a copy of a list from the host would wait for the device, and could not be captured."""
    return torch.stack([torch.full((), w, dtype=torch.float32, device=device) for w in weights])


def merged_grid(scales: torch.Tensor, zeros: torch.Tensor, lam: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Δ* and z*, from those of all models, (K, channels)."""
    merged_scale, merged_zero = torch.empty_like(scales[0]), torch.empty_like(scales[0])
    models, channels = scales.shape
    if channels > 0:
        t = tiling(merged_scale, None)
        args = (merged_scale, merged_zero, scales, zeros, lam, channels)
        launch(merged_grid_kernel, t.count, lam, *args, MODELS=models, block=t.block)
    return merged_scale, merged_zero


def _cosines(sums: torch.Tensor) -> torch.Tensor:
    return cosines(*sums.sum(dim=1).unbind(1))
