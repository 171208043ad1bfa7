"""Merging quantized tensors on their integers, in Triton. Definition: :mod:`hdrq.backends.reference.merging`.

Three launches, whatever the number of draws: Δ* and z*; the sums of every draw's cosines; the codes of the draw kept,
made again from the random stream, so that no draw is stored and its number never leaves the device.
"""

import torch
import triton
import triton.language as tl

from hdrq.backends.eager.merging import cosines, kept
from hdrq.kernels import _lang as lang
from hdrq.kernels._codes import alike, input_tile, on_device, store_code
from hdrq.kernels._launch import launch, tiling

PROGRAMS = 1024  # of one draw, each over its share of the tiles: bounds the sums kept, and the grid
TOGETHER = 32  # fast draws that one program scores: their sums stay in its registers


@triton.jit
def _midpoint(
    inputs, weights, tile,
    MODELS: tl.constexpr, NOISE: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr, LAYOUT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """``Σ λw`` of a tile, and where there is noise. A sum may start at 0: exact."""
    midpoint = tl.zeros([BLOCK], tl.float32)
    mean = tl.zeros([BLOCK], tl.float32)
    for k in range(MODELS):
        integer, delta = input_tile(inputs, k, tile, ROWS, GROUP, LAYOUT, BLOCK)
        weight = tl.load(weights + k)
        midpoint += weight * (integer * delta)
        mean += weight * integer
    noisy = tl.full([BLOCK], NOISE == "all", tl.int1)
    if NOISE == "odd":
        noisy = tl.abs(mean - lang.floor(mean) - 0.5) < 0.25
    return midpoint, noisy


@triton.jit
def _exact(
    inputs, weights, rng, draw, divisor, noisy, tile,
    MODELS: tl.constexpr, NOISE: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr, LAYOUT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A draw's ``round_half_even(Σ λ_k·(J_k·Δ_k + n_k·Δ_k) / Δ*)``: before the zero point and the clamp."""
    seed, stream, step = lang.read_state(rng)
    step += draw.to(tl.uint32)
    total = tl.zeros([BLOCK], tl.float32)
    for k in range(MODELS):
        integer, delta = input_tile(inputs, k, tile, ROWS, GROUP, LAYOUT, BLOCK)
        w = integer * delta
        if NOISE != "none":
            n = lang.unit_noise(lang.words(seed, stream + tl.cast(k, tl.uint32), step, tile[0], BLOCK, GROUP), None)
            w += tl.where(noisy, n, 0.0) * delta
        total += tl.load(weights + k) * w
    return lang.round_half_even(lang.quotient(total, divisor, ROWS))


@triton.jit
def _share(inputs, weights, step_size, k: tl.constexpr, at, ROWS: tl.constexpr, GROUP: tl.constexpr):
    """``a_k = λ_k·Δ_k / Δ*``, float64."""
    _, scales, _, _, channels = inputs
    delta = lang.element_scales(scales + tl.cast(k, tl.int64) * channels, at, ROWS, GROUP)
    return tl.maximum(tl.div_rn(tl.load(weights + k) * delta, step_size).to(tl.float64), 6.103515625e-05)


@triton.jit
def _fast(
    inputs, weights, rng, midpoint, divisor, noisy, tile,
    MODELS: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The lower outcome of each element, the threshold below which a draw takes the next one, and A and B."""
    start, at = tile
    step_size = divisor[0]
    v = lang.quotient(midpoint, divisor, ROWS)
    low = tl.where(noisy, lang.floor(v), lang.round_half_even(v))
    y = v - low
    h = tl.minimum(y, 1.0 - y).to(tl.float64)
    below = tl.zeros([BLOCK], tl.float64)
    for subset in tl.static_range(2**MODELS):
        total = tl.zeros([BLOCK], tl.float64)
        for k in tl.static_range(MODELS):
            if subset >> k & 1:
                total += _share(inputs, weights, step_size, k, at, ROWS, GROUP)
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
        volume *= _share(inputs, weights, step_size, k, at, ROWS, GROUP)
    p = tl.minimum(tl.maximum(below * (1.0 / volume), 0.0), 1.0)
    p = tl.where(y <= 0.5, p, 1.0 - p)
    threshold = tl.where(noisy, p * 16777216.0, 0.0).to(tl.int32)
    seed, stream, step = lang.read_state(rng)
    word = lang.words(seed, stream, step, start, BLOCK, GROUP)
    stride = lang.words(seed, stream + tl.cast(1, tl.uint32), step, start, BLOCK, GROUP)
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


@triton.jit
def _share_of_threads(values, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of each thread's neighbours: a tile's sum costs more than its terms, and is taken once, at the end."""
    return tl.sum(tl.reshape(values, [BLOCK // GROUP, GROUP]), axis=1)


@triton.jit(do_not_specialize=["tiles", "programs", "inner", "channels", "over_inner", "over_channels"])
def merge_score_kernel(
    sums, codes, scales, zeros, merged_scale, merged_zero, weights, rng, qmin, qmax,
    tiles, programs, numel, inner, channels, over_inner, over_channels,
    MODELS: tl.constexpr, NOISE: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr, LAYOUT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """``sums[draw, program] = (Σ d², Σ d·r, Σ r²)`` for each model, float64, over the tiles of this program."""
    inputs = codes, scales, zeros, numel, channels
    draw, tile = tl.program_id(0) // programs, tl.program_id(0) % programs
    i = tl.arange(0, BLOCK)
    model = tl.arange(0, triton.next_power_of_2(MODELS))
    dd = tl.zeros([model.shape[0], BLOCK // GROUP], tl.float64)
    dr = tl.zeros([model.shape[0], BLOCK // GROUP], tl.float64)
    rr = tl.zeros([BLOCK // GROUP], tl.float64)
    while tile < tiles:
        start = tile.to((tile + numel).dtype) * BLOCK
        live = i < numel - start
        at = lang.place(start, i, (inner, channels, over_inner, over_channels), ROWS, GROUP, BLOCK)
        place = start, at
        divisor = lang.divisors(merged_scale, at, ROWS, GROUP)
        zero = lang.element_values(merged_zero, at, ROWS, GROUP)
        midpoint, noisy = _midpoint(inputs, weights, place, MODELS, NOISE, ROWS, GROUP, LAYOUT, BLOCK)
        q = _exact(inputs, weights, rng, draw, divisor, noisy, place, MODELS, NOISE, ROWS, GROUP, LAYOUT, BLOCK)
        r = _residue(q, zero, divisor[0], midpoint, qmin, qmax, live).to(tl.float64)
        rr += _share_of_threads(r * r, GROUP, BLOCK)
        for k in range(MODELS):
            integer, delta = input_tile(inputs, k, place, ROWS, GROUP, LAYOUT, BLOCK)
            d = tl.where(live, midpoint - integer * delta, 0.0).to(tl.float64)
            own = (model == k)[:, None]
            dd += tl.where(own, _share_of_threads(d * d, GROUP, BLOCK)[None, :], 0.0)
            dr += tl.where(own, _share_of_threads(d * r, GROUP, BLOCK)[None, :], 0.0)
        tile += programs
    sums += tl.program_id(0).to(tl.int64) * 3 * MODELS + model
    tl.store(sums, tl.sum(dd, axis=1), mask=model < MODELS)
    tl.store(sums + MODELS, tl.sum(dr, axis=1), mask=model < MODELS)
    tl.store(sums + 2 * MODELS, tl.sum(rr), mask=model < MODELS)


@triton.jit(do_not_specialize=["tiles", "programs", "draws", "inner", "channels", "over_inner", "over_channels"])
def merge_fast_score_kernel(
    sums, codes, scales, zeros, merged_scale, merged_zero, weights, rng, qmin, qmax,
    tiles, programs, draws, numel, inner, channels, over_inner, over_channels,
    MODELS: tl.constexpr, NOISE: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr, LAYOUT: tl.constexpr,
    DRAWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``sums[draw, program]`` as above, for DRAWS draws, which share their two words."""
    PADDED: tl.constexpr = triton.next_power_of_2(MODELS)
    inputs = codes, scales, zeros, numel, channels
    group, tile = tl.program_id(0) // programs, tl.program_id(0) % programs
    program = tile
    i = tl.arange(0, BLOCK)
    member = tl.arange(0, DRAWS)
    model = tl.arange(0, PADDED)
    dd = tl.zeros([PADDED], tl.float64)
    dr = tl.zeros([DRAWS, PADDED], tl.float64)
    rr = tl.zeros([DRAWS], tl.float64)
    while tile < tiles:
        start = tile.to((tile + numel).dtype) * BLOCK
        live = i < numel - start
        at = lang.place(start, i, (inner, channels, over_inner, over_channels), ROWS, GROUP, BLOCK)
        place = start, at
        divisor = lang.divisors(merged_scale, at, ROWS, GROUP)
        step_size = divisor[0]
        zero = lang.element_values(merged_zero, at, ROWS, GROUP)
        midpoint, noisy = _midpoint(inputs, weights, place, MODELS, NOISE, ROWS, GROUP, LAYOUT, BLOCK)
        low, threshold, word, gap = _fast(
            inputs, weights, rng, midpoint, divisor, noisy, place, MODELS, ROWS, GROUP, BLOCK
        )
        lower = _residue(low, zero, step_size, midpoint, qmin, qmax, live)
        upper = _residue(low + 1.0, zero, step_size, midpoint, qmin, qmax, live)
        first = word + (group * DRAWS).to(tl.uint32) * gap
        word = first
        for d in range(DRAWS):
            r = tl.where(_up(word, threshold), upper, lower)
            rr += tl.where(member == d, tl.sum(r * r), 0.0)
            word += gap
        for k in range(MODELS):
            integer, delta = input_tile(inputs, k, place, ROWS, GROUP, LAYOUT, BLOCK)
            distance = tl.where(live, midpoint - integer * delta, 0.0)
            dd += tl.where(model == k, tl.sum(distance * distance), 0.0)
            word = first
            for d in range(DRAWS):
                r = tl.where(_up(word, threshold), upper, lower)
                dr += tl.where((member == d)[:, None] & (model == k)[None, :], tl.sum(distance * r), 0.0)
                word += gap
        tile += programs
    draw = group * DRAWS + member
    sums += (draw.to(tl.int64) * programs + program)[:, None] * 3 * MODELS + model[None, :]
    every = (draw < draws)[:, None] & (model < MODELS)[None, :]
    tl.store(sums, tl.broadcast_to(dd[None, :], [DRAWS, PADDED]), mask=every)
    tl.store(sums + MODELS, dr, mask=every)
    tl.store(sums + 2 * MODELS, tl.broadcast_to(rr[:, None], [DRAWS, PADDED]), mask=every)


@triton.jit(do_not_specialize=["inner", "channels", "over_inner", "over_channels"])
def merge_codes_kernel(
    merged, best, codes, scales, zeros, merged_scale, merged_zero, weights, rng, qmin, qmax,
    numel, inner, channels, over_inner, over_channels,
    MODELS: tl.constexpr, NOISE: tl.constexpr, FAST: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr,
    LAYOUT: tl.constexpr, PACK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    inputs = codes, scales, zeros, numel, channels
    start = lang.first_element(numel, BLOCK)
    i = tl.arange(0, BLOCK)
    at = lang.place(start, i, (inner, channels, over_inner, over_channels), ROWS, GROUP, BLOCK)
    tile = start, at
    draw = tl.load(best)
    divisor = lang.divisors(merged_scale, at, ROWS, GROUP)
    zero = lang.element_values(merged_zero, at, ROWS, GROUP)
    midpoint, noisy = _midpoint(inputs, weights, tile, MODELS, NOISE, ROWS, GROUP, LAYOUT, BLOCK)
    if FAST:
        low, threshold, word, gap = _fast(
            inputs, weights, rng, midpoint, divisor, noisy, tile, MODELS, ROWS, GROUP, BLOCK
        )
        q = tl.where(_up(word + draw.to(tl.uint32) * gap, threshold), low + 1.0, low)
    else:
        q = _exact(inputs, weights, rng, draw, divisor, noisy, tile, MODELS, NOISE, ROWS, GROUP, LAYOUT, BLOCK)
    q = lang.clamp(q + zero, qmin, qmax)
    q = tl.where(q == q, q, qmin)  # a NaN has no code
    store_code(merged, q.to(tl.int32), start, i, numel, PACK, BLOCK)


def merge(
    codes, scales, zero_points, qmin, qmax, rng, weights, draws, noise, axis, select, mode, shape, signed, packed
) -> tuple[torch.Tensor, ...]:
    models = len(codes)
    result = rng.new_empty(shape, dtype=torch.int8 if packed or (qmin >= -128 and qmax <= 127) else torch.int16)
    merged = rng.new_empty((result.numel() + 1) // 2, dtype=torch.uint8) if packed else result
    codes = alike(codes, shape, signed)
    scales, zeros, lam = torch.stack(scales), torch.stack(zero_points), on_device(weights, torch.float32, rng.device)
    merged_scale, merged_zero = merged_grid(scales, zeros, lam)
    if result.numel() == 0:
        similarity = _cosines(lam.new_zeros((draws, 1, 3, models), dtype=torch.float64))
        return merged, merged_scale, merged_zero, similarity, kept(similarity, select)
    t = tiling(result, axis, groups=True)
    if mode == "fast":
        t = t._replace(group=4)  # more would not stay in registers
    programs = min(t.count, PROGRAMS)
    sums = torch.empty((draws, programs, 3, models), dtype=torch.float64, device=rng.device)
    inputs = (codes.addresses, scales, zeros, merged_scale, merged_zero, lam, rng, float(qmin), float(qmax))
    constants = {"NOISE": noise, "LAYOUT": codes.layout, "per_thread": t.group, **t.cut}
    if mode == "fast":
        group = min(TOGETHER, triton.next_power_of_2(draws))
        args = (sums, *inputs, t.count, programs, draws, *t.lengths)
        grid = triton.cdiv(draws, group) * programs
        launch(merge_fast_score_kernel, grid, rng, *args, MODELS=models, DRAWS=group, **constants)
    else:
        args = (sums, *inputs, t.count, programs, *t.lengths)
        launch(merge_score_kernel, draws * programs, rng, *args, MODELS=models, **constants)
    similarity = _cosines(sums)
    best = kept(similarity, select)
    constants |= {"MODELS": models, "FAST": mode == "fast", "PACK": packed}
    launch(merge_codes_kernel, t.count, rng, merged, best, *inputs, *t.lengths, **constants)
    return merged, merged_scale, merged_zero, similarity, best


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
