"""Family ``noise``: quantize, inject noise and clamp in one pass, forward and backward."""

from __future__ import annotations

import torch

from hdrq import checks
from hdrq.backends.dispatch import implementation
from hdrq.ops._library import as_shape, as_type, differentiable, flat, grouped, not_differentiable, register
from hdrq.rng import KEEP_ALL

NO_VMAP = "an element's place in the whole tensor decides its noise; pass the whole batch as one tensor"


def noise_quantize(
    x: torch.Tensor,
    scale: torch.Tensor,
    qmin: int,
    qmax: int,
    rng: torch.Tensor,
    *,
    noise: str = "uniform",
    axis: int | None = None,
    group_size: int | None = None,
    grad_scale: float = 1.0,
    keep: float = 1.0,
) -> torch.Tensor:
    """Noise in place of rounding: what a quantizer looks like to a reconstruction that should find flat minima.

    Equation, n drawn anew for each element from ``rng``, s the element's scale::

        y = x + n·s,  then qmax·s where x ≥ qmax·s, qmin·s where x ≤ qmin·s
        n ~ U[−½, ½)                       noise="uniform"
        n ~ histogram of round(x/s) − x/s  noise="empirical": 256 bins over the unclipped elements of x

    With ``keep`` under 1, ``y = x`` with probability ``1 − keep`` for each element (QDrop): the same bits as
    :func:`drop_mix` of the result and x, in the same pass.

    Gradients, upstream g: ``∂x = g`` strictly inside the range, else 0; ``∂scale = grad_scale · Σ g·(n inside, qmax
    above, qmin below)``; a dropped element passes g on, and adds no term. The backward pass draws the same noise again
    from ``rng``; it stores none, so ``rng`` must not advance between forward and backward (autograd refuses if it did).

    Args:
        x: float32, bfloat16 or float16, any shape and strides. Half types are computed in float32 and rounded once.
        scale: float32, one element, or ``x.shape[axis]`` elements; in units of x per integer step. Positive and finite:
            a CPU raises; elsewhere no value is read on the host, and a bad scale yields NaN.
        qmin, qmax: the integer range.
        rng: :func:`hdrq.rng_state`, on the device of x.
        axis: the axis along which ``scale`` varies; None for one scale. An empirical histogram is one for the tensor.
        group_size: neighbours along the last axis that share a scale, as :func:`fake_quantize` has it.
        grad_scale: factor on the gradient of ``scale``; LSQ uses ``1/sqrt(numel·qmax)``.
        keep: probability in [0, 1] that an element is quantized.

    Returns:
        A contiguous tensor like x, the same bits from every backend. A NaN stays NaN, at its element alone.

    Raises:
        TypeError, ValueError: "X must be …, got …". Empirical noise takes fewer than 2³² elements.

    Source: HDRQ (Shin et al., ICML 2025), Eq. 8-9; the empirical noise is that of its released code.

    Example, the step that the noise hides is at most half a scale::

        >>> import torch, hdrq
        >>> x = torch.tensor([0.30, -0.10, 5.0])
        >>> y = hdrq.ops.noise_quantize(x, torch.tensor(0.5), -4, 3, hdrq.rng_state(0))
        >>> (y - x).abs()[:2] <= 0.25, y[2]
        (tensor([True, True]), tensor(1.5000))
    """
    checks.choice("noise", noise, ("uniform", "empirical"))
    threshold = checks.keep_threshold("keep", keep)
    rows, axis = grouped(x, scale, None, axis, group_size)
    cumulative = None
    if noise == "empirical":
        _check_random(rows, scale, qmin, qmax, rng, None, axis, grad_scale, threshold)
        cumulative = _error_histogram_op(rows.detach(), scale.detach(), qmin, qmax, axis)
    y = _forward_op(rows, scale, qmin, qmax, rng, cumulative, axis, grad_scale, threshold)
    return y if rows is x else y.view(x.shape)


def _check(x, scale, qmin, qmax, axis) -> int | None:
    checks.tensor("x", x, checks.FLOATS)
    checks.quant_range(qmin, qmax)
    axis = checks.axis_of(x, axis)
    checks.per_axis("scale", scale, x, axis)
    return axis


def _check_random(x, scale, qmin, qmax, rng, cumulative, axis, grad_scale, threshold) -> int | None:
    axis = _check(x, scale, qmin, qmax, axis)
    checks.rng(rng, x.device)
    checks.real("grad_scale", grad_scale)
    checks.integer("threshold", threshold, 0, KEEP_ALL)
    if cumulative is not None:
        checks.tensor("cumulative", cumulative, (torch.int64,), x.device)
        if cumulative.shape != (257,):
            raise ValueError(f"cumulative must have shape (257,), got {tuple(cumulative.shape)}")
    return axis


def _check_countable(x) -> None:
    if x.numel() >= 2**32:
        raise ValueError(f"x must have fewer than 2**32 elements for empirical noise, got {x.numel()}")


def _forward(x, scale, qmin, qmax, rng, cumulative=None, axis=None, grad_scale=1.0, threshold=KEEP_ALL) -> torch.Tensor:
    axis = _check_random(x, scale, qmin, qmax, rng, cumulative, axis, grad_scale, threshold)
    checks.scale_values("scale", scale)
    run = implementation("noise", "noise_quantize", x)
    return as_type(run(x.contiguous(), flat(scale), qmin, qmax, flat(rng), flat(cumulative), axis, threshold), x.dtype)


def _forward_fake(
    x, scale, qmin, qmax, rng, cumulative=None, axis=None, grad_scale=1.0, threshold=KEEP_ALL
) -> torch.Tensor:
    _check_random(x, scale, qmin, qmax, rng, cumulative, axis, grad_scale, threshold)
    return x.new_empty(x.shape)


def _backward(grad, x, scale, qmin, qmax, rng, cumulative=None, axis=None, grad_scale=1.0, threshold=KEEP_ALL):
    _check_random(x, scale, qmin, qmax, rng, cumulative, axis, grad_scale, threshold)
    checks.same_shape("grad", grad, "x", x)
    return _gradients(grad, x, scale, qmin, qmax, rng, cumulative, axis, grad_scale, threshold)


def _gradients(grad, x, scale, qmin, qmax, rng, cumulative, axis, grad_scale, threshold):
    """Of arguments that the forward pass has checked."""
    run = implementation("noise", "noise_quantize_backward", x)
    axis = checks.axis_of(x, axis)
    args = (flat(scale), qmin, qmax, flat(rng), flat(cumulative), axis, grad_scale, threshold)
    grad_x, grad_s = run(as_type(grad, x.dtype).contiguous(), x.contiguous(), *args)
    return as_type(grad_x, x.dtype), as_shape(grad_s, scale.shape)


def _backward_fake(grad, x, scale, qmin, qmax, rng, cumulative=None, axis=None, grad_scale=1.0, threshold=KEEP_ALL):
    return x.new_empty(x.shape), scale.new_empty(scale.shape)


def _error_histogram(x, scale, qmin, qmax, axis=None) -> torch.Tensor:
    axis = _check(x, scale, qmin, qmax, axis)
    _check_countable(x)
    checks.scale_values("scale", scale)
    return implementation("noise", "error_histogram", x)(x.contiguous(), flat(scale), qmin, qmax, axis)


def _error_histogram_fake(x, scale, qmin, qmax, axis=None) -> torch.Tensor:
    _check(x, scale, qmin, qmax, axis)
    _check_countable(x)
    return x.new_empty(257, dtype=torch.int64)


def _setup(ctx, inputs, output) -> None:
    x, scale, ctx.qmin, ctx.qmax, rng, cumulative, ctx.axis, ctx.grad_scale, ctx.threshold = inputs
    ctx.save_for_backward(x, scale, rng, cumulative)


def _autograd(ctx, grad):
    x, scale, rng, cumulative = ctx.saved_tensors
    args = (ctx.qmin, ctx.qmax, rng, cumulative, ctx.axis, ctx.grad_scale, ctx.threshold)
    grad_x, grad_s = _backward_op(grad, x, scale, *args)
    return grad_x, grad_s, None, None, None, None, None, None, None


_ARGS = "Tensor x, Tensor scale, int qmin, int qmax"
_DRAW = f"Tensor rng, Tensor? cumulative=None, int? axis=None, float grad_scale=1.0, int threshold={KEEP_ALL}"
_forward_op = register(
    f"noise_quantize({_ARGS}, {_DRAW}) -> Tensor", _forward, _forward_fake, check=_check_random, no_vmap=NO_VMAP
)
_backward_op = register(
    f"noise_quantize_backward(Tensor grad, {_ARGS}, {_DRAW}) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
    checked=_gradients,
    no_vmap=NO_VMAP,
)
_error_histogram_op = register(
    f"error_histogram({_ARGS}, int? axis=None) -> Tensor", _error_histogram, _error_histogram_fake, no_vmap=NO_VMAP
)
differentiable(_forward_op, _setup, _autograd)
not_differentiable(_backward_op, "second derivatives of a quantizer are not defined")
not_differentiable(_error_histogram_op, "counts are integers")
