"""Family ``weights``: all weights of a block, quantized and measured against their source, in one pass each way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from hdrq import checks
from hdrq.backends.dispatch import implementation
from hdrq.ops._library import differentiable, flat, grouped, not_differentiable, register
from hdrq.ops.noise import NO_VMAP, _error_histogram_op


def quantize_weights(
    weights: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor],
    ranges: Sequence[tuple[int, int]],
    *,
    sources: Sequence[torch.Tensor] | None = None,
    rngs: Sequence[torch.Tensor] | None = None,
    noise: str = "uniform",
    axis: int | None = None,
    group_size: int | None = None,
    grad_scales: Sequence[float] | None = None,
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """What one step of a reconstruction does with its weights: quantize each, and say how far each is from its source.

    Equation, for each weight W with its scale, range and source::

        Ŵ = noise_quantize(W, …)  where rngs are given, else fake_quantize(W, …);  d = ‖W − W_src‖₂

    The bits of Ŵ are those of :func:`noise_quantize` and :func:`fake_quantize`. One pass reads W and W_src and writes Ŵ
    and the parts of d; one pass back writes the whole gradient, ``∂W = (straight-through of Ŵ) + ∂d·(W − W_src)/d``.
    All tensors go in one launch.

    Args:
        weights: one or more tensors of float32, bfloat16 or float16: one dtype, one device, any shapes.
        scales: as many float32 tensors, of one element, or ``W.shape[axis]`` elements each.
        ranges: as many pairs (qmin, qmax).
        sources: as many tensors shaped and typed as the weights, which take no gradient; None for no distance.
        rngs: as many random states, :func:`hdrq.rng_state`; None to round.
        noise: ``"uniform"`` or ``"empirical"``, where rngs are given.
        axis: the axis along which every scale varies.
        group_size: neighbours along the last axis that share a scale, as :func:`fake_quantize` has it.
        grad_scales: as many factors on the gradients of the scales; None for LSQ's ``1/sqrt(numel·qmax)``.

    Returns:
        The quantized weights, like ``weights``, and the distances, float32 (K,), or None without sources.

    Raises:
        TypeError, ValueError: "X must be …, got …".

    Source: HDRQ (Shin et al., ICML 2025), Eq. 8-9 and Section 4.2; LSQ (Esser et al., ICLR 2020).
    """
    checks.choice("noise", noise, ("uniform", "empirical"))
    if group_size is not None and len(scales) == len(weights):
        given: dict[str, Any] = {"rngs": rngs, "noise": noise, "grad_scales": grad_scales}
        rows = [grouped(w, s, None, axis, group_size)[0] for w, s in zip(weights, scales, strict=True)]
        if sources is not None:
            pairs = zip(sources, weights, strict=False)
            sources = [s.reshape(-1, group_size) if s.shape == w.shape else s for s, w in pairs]
        results, distances = quantize_weights(rows, scales, ranges, sources=sources, axis=0, **given)
        return [y.view(w.shape) for y, w in zip(results, weights, strict=True)], distances
    qmins, qmaxs = [low for low, _ in ranges], [high for _, high in ranges]
    if grad_scales is None:
        sizes = zip(weights, qmaxs, strict=False)
        grad_scales = [1 / math.sqrt(max(w.numel() * qmax, 1)) for w, qmax in sizes]
    weights, scales, grad_scales = list(weights), list(scales), list(grad_scales)
    theirs, states = list(sources or ()), list(rngs or ())
    _check(weights, scales, qmins, qmaxs, theirs, states, [], axis, grad_scales)
    cumulatives = []
    if rngs is not None and noise == "empirical":
        grids = zip(weights, scales, qmins, qmaxs, strict=True)
        cumulatives = [_error_histogram_op(w.detach(), s.detach(), low, high, axis) for w, s, low, high in grids]
    args = (weights, scales, qmins, qmaxs, theirs, states, cumulatives, axis, grad_scales)
    results, distances = _forward_op(*args)
    return results, distances if sources is not None else None


def _check(weights, scales, qmins, qmaxs, sources, rngs, cumulatives, axis, grad_scales) -> None:
    count = len(weights)
    if count == 0:
        raise ValueError("weights must be one or more tensors, got none")
    given = {"scales": scales, "ranges": qmins, "grad_scales": grad_scales}
    given |= {n: v for n, v in (("sources", sources), ("rngs", rngs), ("cumulatives", cumulatives)) if v}
    for name, values in given.items():
        if len(values) != count:
            raise ValueError(f"{name} must be as many as weights, {count}, got {len(values)}")
    first = checks.tensor("weights[0]", weights[0], checks.FLOATS)
    for k in range(count):
        w = checks.tensor(f"weights[{k}]", weights[k], (first.dtype,), first.device)
        own = checks.axis_of(w, axis)
        checks.per_axis(f"scales[{k}]", scales[k], w, own)
        checks.quant_range(qmins[k], qmaxs[k])
        checks.real(f"grad_scales[{k}]", grad_scales[k])
        if sources:
            checks.tensor(f"sources[{k}]", sources[k], (w.dtype,), w.device)
            checks.same_shape(f"sources[{k}]", sources[k], f"weights[{k}]", w)
        if rngs:
            checks.rng(rngs[k], w.device)


def _prepared(weights, scales, qmins, qmaxs, sources, rngs, cumulatives, axis) -> tuple:
    """The arguments as backends take them."""
    for k, scale in enumerate(scales):
        checks.scale_values(f"scales[{k}]", scale)
    dense = [[t.contiguous() for t in tensors] for tensors in (weights, sources)]
    small = [[flat(t) for t in tensors] for tensors in (scales, rngs, cumulatives)]
    axes = [checks.axis_of(w, axis) for w in weights]
    return dense[0], small[0], qmins, qmaxs, dense[1], *small[1:], axes


def _forward(weights, scales, qmins, qmaxs, sources, rngs, cumulatives, axis, grad_scales):
    _check(weights, scales, qmins, qmaxs, sources, rngs, cumulatives, axis, grad_scales)
    run = implementation("weights", "quantize_weights", weights[0])
    results, distances = run(*_prepared(weights, scales, qmins, qmaxs, sources, rngs, cumulatives, axis))
    return [y.to(w.dtype) for y, w in zip(results, weights, strict=True)], distances


def _forward_fake(weights, scales, qmins, qmaxs, sources, rngs, cumulatives, axis, grad_scales):
    _check(weights, scales, qmins, qmaxs, sources, rngs, cumulatives, axis, grad_scales)
    return [w.new_empty(w.shape) for w in weights], weights[0].new_empty(len(weights), dtype=torch.float32)


def _backward(
    grads, grad_distances, distances, weights, scales, qmins, qmaxs, sources, rngs, cumulatives, axis, grad_scales
):
    for k, (grad, w) in enumerate(zip(grads, weights, strict=True)):
        checks.same_shape(f"grads[{k}]", grad, f"weights[{k}]", w)
    run = implementation("weights", "quantize_weights_backward", weights[0])
    prepared = _prepared(weights, scales, qmins, qmaxs, sources, rngs, cumulatives, axis)
    grads = [grad.to(w.dtype).contiguous() for grad, w in zip(grads, weights, strict=True)]
    grad_ws, grad_ss = run(grads, grad_distances, distances, *prepared, grad_scales)
    return (
        [g.to(w.dtype) for g, w in zip(grad_ws, weights, strict=True)],
        [g.reshape(s.shape) for g, s in zip(grad_ss, scales, strict=True)],
    )


def _backward_fake(grads, grad_distances, distances, weights, scales, *rest):
    return [w.new_empty(w.shape) for w in weights], [s.new_empty(s.shape) for s in scales]


def _setup(ctx, inputs, output) -> None:
    weights, scales, ctx.qmins, ctx.qmaxs, sources, rngs, cumulatives, ctx.axis, ctx.grad_scales = inputs
    lists = (weights, scales, sources, rngs, cumulatives)
    ctx.lengths = [len(tensors) for tensors in lists]
    ctx.save_for_backward(output[1], *(t for tensors in lists for t in tensors))


def _autograd(ctx, grads, grad_distances):
    distances, *saved = ctx.saved_tensors
    rest = iter(saved)
    weights, scales, sources, rngs, cumulatives = ([next(rest) for _ in range(n)] for n in ctx.lengths)
    if grad_distances is None:
        grad_distances = torch.zeros_like(distances)
    grads = [torch.zeros_like(w) if g is None else g for g, w in zip(grads, weights, strict=True)]
    args = (weights, scales, ctx.qmins, ctx.qmaxs, sources, rngs, cumulatives, ctx.axis, ctx.grad_scales)
    grad_ws, grad_ss = _backward_op(grads, grad_distances, distances, *args)
    nothing = ([None] * length for length in ctx.lengths[2:])
    return grad_ws, grad_ss, None, None, *nothing, None, None


_ARGS = (
    "Tensor[] weights, Tensor[] scales, int[] qmins, int[] qmaxs, Tensor[] sources, Tensor[] rngs, "
    "Tensor[] cumulatives, int? axis, float[] grad_scales"
)
_forward_op = register(f"quantize_weights({_ARGS}) -> (Tensor[], Tensor)", _forward, _forward_fake, no_vmap=NO_VMAP)
_backward_op = register(
    f"quantize_weights_backward(Tensor[] grads, Tensor grad_distances, Tensor distances, {_ARGS}) "
    "-> (Tensor[], Tensor[])",
    _backward,
    _backward_fake,
    no_vmap=NO_VMAP,
)
differentiable(_forward_op, _setup, _autograd)
not_differentiable(_backward_op, "second derivatives of a quantizer are not defined")
