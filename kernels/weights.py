"""All weights of a block in one launch, in Triton. Definition: :mod:`hdrq.backends.reference.weights`.

A launch takes a tuple of tensors for each argument, and each program works on one tile of one of them. Tensors whose
tiles are cut alike go together: all of them without an axis.
"""

from itertools import accumulate

import torch
import triton
import triton.language as tl

from hdrq.kernels import _lang as lang
from hdrq.kernels._launch import launch, operand, tiling
from hdrq.kernels.noise import guides

TOGETHER = 8  # tensors of a launch at most: their code is one after the other in the kernel


@triton.jit
def _forward_tile(
    y, squares, x, scale, rng, cumulative, guide, source, qmin, qmax, numel, rows, tile,
    ROWS: tl.constexpr, GROUP: tl.constexpr, NOISE: tl.constexpr, SOURCES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    start = tile.to((tile + numel).dtype) * BLOCK
    i = tl.arange(0, BLOCK)
    live = i < numel - start
    value = tl.load(x + start + i, mask=live, other=0.0).to(tl.float32)
    at = lang.place(start, i, rows, ROWS, GROUP, BLOCK)
    if NOISE:
        seed, stream, step = lang.read_state(rng)
        n = lang.unit_noise(lang.words(seed, stream, step, start, BLOCK, GROUP), cumulative, guide)
        s = lang.element_scales(scale, at, ROWS, GROUP)
        result = lang.noise_forward(value, s, n, qmin, qmax)
    else:
        divisor = lang.divisors(scale, at, ROWS, GROUP)
        result = lang.nearest_forward(
            lang.rounded(lang.quotient(value, divisor, ROWS), 0.0), divisor[0], 0.0, qmin, qmax
        )
    tl.store(y + start + i, result.to(y.dtype.element_ty), mask=live)
    if SOURCES:
        d = lang.difference(x, source, start, i, live)
        tl.store(squares + tile, tl.sum(d * d))


@triton.jit
def _backward_tile(
    grad_x, row_sums, grad, grad_distance, distance, x, scale, rng, cumulative, guide, source, qmin, qmax, numel,
    rows, slots, tile, ROWS: tl.constexpr, GROUP: tl.constexpr, SPAN: tl.constexpr, NOISE: tl.constexpr,
    SOURCES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    start = tile.to((tile + numel).dtype) * BLOCK
    i = tl.arange(0, BLOCK)
    live = i < numel - start
    value = tl.load(x + start + i, mask=live, other=0.0).to(tl.float32)
    g = tl.load(grad + start + i, mask=live, other=0.0).to(tl.float32)
    at = lang.place(start, i, rows, ROWS, GROUP, BLOCK)
    if NOISE:
        seed, stream, step = lang.read_state(rng)
        n = lang.unit_noise(lang.words(seed, stream, step, start, BLOCK, GROUP), cumulative, guide)
        s = lang.element_scales(scale, at, ROWS, GROUP)
        inside, slope = lang.noise_backward(value, s, n, qmin, qmax)
    else:
        v = lang.quotient(value, lang.divisors(scale, at, ROWS, GROUP), ROWS)
        inside, slope = lang.nearest_backward(v, lang.rounded(v, 0.0), 0.0, qmin, qmax, "round-first")
    result = tl.where(inside, g, 0.0)
    if SOURCES:
        result += lang.difference(x, source, start, i, live) * lang.pull(grad_distance, distance)
    tl.store(grad_x + start + i, result.to(grad_x.dtype.element_ty), mask=live)
    lang.store_row_sums(row_sums, g * slope, start, i, live, numel, rows[0], slots, ROWS, SPAN, BLOCK)


@triton.jit(do_not_specialize=["inner", "channels", "over_inner", "over_channels", "first"])
def quantize_weights_kernel(
    y, squares, x, scale, rng, cumulative, guide, source, qmin, qmax, numel, inner, channels, over_inner, over_channels,
    first, COUNT: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr, NOISE: tl.constexpr, SOURCES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    for k in tl.static_range(COUNT):
        if (program >= first[k]) & (program < first[k + 1]):
            _forward_tile(
                y[k], squares[k], x[k], scale[k], rng[k], cumulative[k], guide[k], source[k], qmin[k], qmax[k],
                numel[k], (inner[k], channels[k], over_inner[k], over_channels[k]), program - first[k], ROWS, GROUP,
                NOISE, SOURCES, BLOCK,
            )  # fmt: skip


@triton.jit(do_not_specialize=["inner", "channels", "over_inner", "over_channels", "slots", "first"])
def quantize_weights_backward_kernel(
    grad_x, row_sums, grad, grad_distance, distance, x, scale, rng, cumulative, guide, source, qmin, qmax, numel, inner,
    channels, over_inner, over_channels, slots, first, COUNT: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr,
    SPAN: tl.constexpr, NOISE: tl.constexpr, SOURCES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    for k in tl.static_range(COUNT):
        if (program >= first[k]) & (program < first[k + 1]):
            _backward_tile(
                grad_x[k], row_sums[k], grad[k], grad_distance[k], distance[k], x[k], scale[k], rng[k], cumulative[k],
                guide[k], source[k], qmin[k], qmax[k], numel[k],
                (inner[k], channels[k], over_inner[k], over_channels[k]), slots[k], program - first[k], ROWS, GROUP,
                SPAN, NOISE, SOURCES, BLOCK,
            )  # fmt: skip


def quantize_weights(weights, scales, qmins, qmaxs, sources, rngs, cumulatives, axes) -> tuple:
    weights, sources = [operand(w) for w in weights], [operand(w) for w in sources]
    ys = [torch.empty_like(w) for w in weights]
    tilings = [tiling(w, axis, groups=True) for w, axis in zip(weights, axes, strict=True)]
    squares = weights[0].new_zeros((len(weights), max(t.count for t in tilings)), dtype=torch.float32)
    inputs = _inputs(weights, scales, qmins, qmaxs, sources, rngs, cumulatives)
    _launch(quantize_weights_kernel, [ys, squares, *inputs], [], tilings, sources, rngs)
    return ys, squares.sum(dim=1, dtype=torch.float64).sqrt().float()


def quantize_weights_backward(
    grads, grad_distances, distances, weights, scales, qmins, qmaxs, sources, rngs, cumulatives, axes, grad_scales
) -> tuple:
    grads, weights, sources = ([operand(t) for t in tensors] for tensors in (grads, weights, sources))
    grad_ws = [torch.empty_like(w) for w in weights]
    tilings = [tiling(w, axis, groups=True) for w, axis in zip(weights, axes, strict=True)]
    sums = [t.row_sums(weights[0].device) for t in tilings]
    pulls = [grad_distances.contiguous(), distances]
    inputs = _inputs(weights, scales, qmins, qmaxs, sources, rngs, cumulatives)
    slots = [t.slots for t in tilings]
    _launch(quantize_weights_backward_kernel, [grad_ws, sums, grads, *pulls, *inputs], slots, tilings, sources, rngs)
    return grad_ws, [t.channel_sums(*own) for t, *own in zip(tilings, sums, grad_scales, strict=True)]


def _inputs(weights, scales, qmins, qmaxs, sources, rngs, cumulatives) -> list:
    """One sequence for each argument, of None where there is no such tensor."""
    nothing = [None] * len(weights)
    qmins, qmaxs = [float(q) for q in qmins], [float(q) for q in qmaxs]
    tables = guides(cumulatives) if cumulatives else nothing
    return [weights, scales, rngs or nothing, cumulatives or nothing, tables, sources or nothing, qmins, qmaxs]


def _launch(kernel, inputs: list, slots: list[int], tilings: list, sources: list, rngs: list) -> None:
    """Run a kernel over all tensors: a launch for those whose tiles are cut alike. Rows' sums are cut by backward."""
    alike: dict[tuple, list[int]] = {}
    for k, t in enumerate(tilings):
        if t.numel > 0:
            alike.setdefault((t.rows, t.block, t.span if slots else 1), []).append(k)
    for (_, _, span), members in alike.items():
        for group in (members[i : i + TOGETHER] for i in range(0, len(members), TOGETHER)):
            first = (0, *accumulate(tilings[k].count for k in group))
            args = [tuple(values[k] for k in group) for values in inputs]
            args += zip(*(tilings[k].lengths for k in group), strict=True)
            constants = {"COUNT": len(group), "NOISE": bool(rngs), "SOURCES": bool(sources), **tilings[group[0]].cut}
            if slots:
                args.append(tuple(slots[k] for k in group))
                constants["SPAN"] = span
            launch(kernel, first[-1], inputs[0][0], *args, first, **constants)
