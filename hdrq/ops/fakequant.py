"""Family ``fakequant``: fake-quantize with the straight-through gradient; integer codes and back."""

from __future__ import annotations

import torch

from hdrq import checks
from hdrq.backends.dispatch import implementation
from hdrq.ops._library import as_shape, as_type, differentiable, flat, grouped, not_differentiable, register
from hdrq.rng import KEEP_ALL

ROUNDINGS = ("quotient", "reciprocal", "shifted")
GRADIENTS = ("round-first", "clamp-first", "pass-through")
NO_VMAP = "put the batch into x itself and name its channel with axis"


def fake_quantize(
    x: torch.Tensor,
    scale: torch.Tensor,
    qmin: int,
    qmax: int,
    *,
    zero_point: torch.Tensor | None = None,
    axis: int | None = None,
    group_size: int | None = None,
    grad_scale: float = 1.0,
    keep: float = 1.0,
    rng: torch.Tensor | None = None,
    rounding: str = "quotient",
    gradient: str = "round-first",
) -> torch.Tensor:
    """Round to the grid and back, with the straight-through gradient, a learnable scale and a learnable zero point.

    Equation, s and z the element's scale and zero point::

        q = clamp(round_half_even(x/s) + z, qmin, qmax),  y = (q − z)·s

    With ``keep`` under 1, ``y = x`` with probability ``1 − keep`` for each element (QDrop): the same bits as
    :func:`drop_mix` of the result and x, in the same pass.

    ``rounding`` says in which order the integer before the clamp is found, where codes differ by one rounding::

        "quotient"    round_half_even(x/s) + z
        "reciprocal"  round_half_even(x·(1/s)) + z   as torch.ao has it
        "shifted"     round_half_even(x/s + z)       as Brevitas and compressed-tensors have it; z may be any number

    Gradients, upstream g: ``∂x = g`` inside, else 0; ``∂scale = grad_scale · Σ g·((q − z) − [inside]·x/s)``;
    ``∂zero_point = grad_scale · Σ −g·s`` outside. A dropped element passes g on, and adds no term. ``gradient`` says
    where inside is::

        "round-first"   qmin ≤ the integer before the clamp ≤ qmax
        "clamp-first"   qmin ≤ x/s + z ≤ qmax: LSQ's, which clamps before it rounds
        "pass-through"  everywhere

    Args:
        x: float32, bfloat16 or float16, any shape and strides. Half types are computed in float32 and rounded once.
        scale: float32, one element, or ``x.shape[axis]`` elements. Positive and finite: a CPU raises; elsewhere no
            value is read on the host, and a bad scale yields NaN.
        qmin, qmax: the integer range.
        zero_point: integer-valued float32, shaped as ``scale``; None for 0. One that learns is rounded before it comes
            here, by a rounding that passes gradients through.
        axis: the axis along which ``scale`` and ``zero_point`` vary; None for one of each.
        group_size: neighbours along the last axis that share a scale and a zero point, of which there is then one for
            each such group, ``(*x.shape[:-1], x.shape[-1] / group_size)``; None for no groups.
        grad_scale: factor on the gradients of ``scale`` and ``zero_point``; LSQ uses ``1/sqrt(numel·qmax)``.
        keep: probability in [0, 1] that an element is quantized.
        rng: :func:`hdrq.rng_state`, on the device of x; needed where keep < 1.

    Returns:
        A contiguous tensor like x, the same bits from every backend. A NaN stays NaN, at its element alone.

    Raises:
        TypeError, ValueError: "X must be …, got …".

    Source: Esser et al., "Learned Step Size Quantization", ICLR 2020; Bhalgat et al., "LSQ+", CVPR Workshops 2020;
    QDrop (Wei et al., ICLR 2022).

    Example::

        >>> import torch, hdrq
        >>> x = torch.tensor([0.30, 0.75, 5.0], requires_grad=True)
        >>> y = hdrq.ops.fake_quantize(x, torch.tensor(0.5), -4, 3)  # 0.75/0.5 is a tie: to even
        >>> y.sum().backward(); y.detach(), x.grad
        (tensor([0.5000, 1.0000, 1.5000]), tensor([1., 1., 0.]))
    """
    threshold = checks.keep_threshold("keep", keep)
    rows, axis = grouped(x, scale, zero_point, axis, group_size)
    y = _forward_op(rows, scale, qmin, qmax, zero_point, axis, grad_scale, rng, threshold, rounding, gradient)
    return y if rows is x else y.view(x.shape)


def quantize(
    x: torch.Tensor,
    scale: torch.Tensor,
    qmin: int,
    qmax: int,
    *,
    zero_point: torch.Tensor | None = None,
    axis: int | None = None,
    group_size: int | None = None,
) -> torch.Tensor:
    """The integer codes ``q = clamp(round_half_even(x/scale) + z, qmin, qmax)``.

    Arguments as :func:`fake_quantize`; no gradient. A NaN has no code, so this op alone reads one number back from the
    device.

    Returns:
        int8 where ``−128 ≤ qmin`` and ``qmax ≤ 127``, else int16; shaped as x, contiguous.

    Raises:
        ValueError: x holds a NaN, or the range does not fit int16; and as :func:`fake_quantize`.
    """
    rows, axis = grouped(x, scale, zero_point, axis, group_size)
    _check(rows, scale, qmin, qmax, zero_point, axis)
    codes, nan = _quantize_op(rows, scale, qmin, qmax, zero_point, axis)
    if not torch.compiler.is_compiling() and (count := int(nan)):
        raise ValueError(f"x must hold no NaN to be quantized to integers, got {count} of {x.numel()} elements NaN")
    return codes if rows is x else codes.view(x.shape)


def dequantize(
    codes: torch.Tensor,
    scale: torch.Tensor,
    *,
    zero_point: torch.Tensor | None = None,
    axis: int | None = None,
    group_size: int | None = None,
) -> torch.Tensor:
    """The values of integer codes, ``y = (q − z)·scale``, float32. No gradient.

    Args:
        codes: int8 or int16, any shape and strides.
        scale, zero_point, axis, group_size: as :func:`fake_quantize`.

    Raises:
        TypeError, ValueError: "X must be …, got …".
    """
    rows, axis = grouped(codes, scale, zero_point, axis, group_size)
    _check_codes(rows, scale, zero_point, axis)
    y = _dequantize_op(rows, scale, zero_point, axis)
    return y if rows is codes else y.view(codes.shape)


def _check(x, scale, qmin, qmax, zero_point, axis) -> int | None:
    checks.tensor("x", x, checks.FLOATS)
    checks.quant_range(qmin, qmax)
    return _check_grid(x, scale, zero_point, axis)


def _check_forward(
    x, scale, qmin, qmax, zero_point, axis, grad_scale, rng, threshold, rounding, gradient
) -> int | None:
    checks.real("grad_scale", grad_scale)
    checks.choice("rounding", rounding, ROUNDINGS)
    checks.choice("gradient", gradient, GRADIENTS)
    if checks.integer("threshold", threshold, 0, KEEP_ALL) < KEEP_ALL or rng is not None:
        checks.tensor("x", x, checks.FLOATS)
        checks.rng(rng, x.device)
    return _check(x, scale, qmin, qmax, zero_point, axis)


def _check_grid(x, scale, zero_point, axis) -> int | None:
    axis = checks.axis_of(x, axis)
    checks.per_axis("scale", scale, x, axis)
    if zero_point is not None:
        checks.per_axis("zero_point", zero_point, x, axis)
    return axis


def _check_values(scale, zero_point, rounding="quotient") -> None:
    checks.scale_values("scale", scale)
    checks.zero_point_values(zero_point, integers=rounding != "shifted")


def _forward(
    x, scale, qmin, qmax, zero_point=None, axis=None, grad_scale=1.0, rng=None, threshold=KEEP_ALL,
    rounding="quotient", gradient="round-first",
) -> torch.Tensor:  # fmt: skip
    axis = _check_forward(x, scale, qmin, qmax, zero_point, axis, grad_scale, rng, threshold, rounding, gradient)
    _check_values(scale, zero_point, rounding)
    run = implementation("fakequant", "fake_quantize", x)
    args = (flat(scale), qmin, qmax, flat(zero_point), axis, flat(rng), threshold, rounding)
    return as_type(run(x.contiguous(), *args), x.dtype)


def _forward_fake(
    x, scale, qmin, qmax, zero_point=None, axis=None, grad_scale=1.0, rng=None, threshold=KEEP_ALL,
    rounding="quotient", gradient="round-first",
) -> torch.Tensor:  # fmt: skip
    _check_forward(x, scale, qmin, qmax, zero_point, axis, grad_scale, rng, threshold, rounding, gradient)
    return x.new_empty(x.shape)


def _backward(
    grad, x, scale, qmin, qmax, zero_point=None, axis=None, grad_scale=1.0, rng=None, threshold=KEEP_ALL,
    rounding="quotient", gradient="round-first", learns_zero_point=False,
) -> tuple:  # fmt: skip
    _check_forward(x, scale, qmin, qmax, zero_point, axis, grad_scale, rng, threshold, rounding, gradient)
    checks.same_shape("grad", grad, "x", x)
    args = (zero_point, axis, grad_scale, rng, threshold, rounding, gradient, learns_zero_point)
    return _gradients(grad, x, scale, qmin, qmax, *args)


def _gradients(grad, x, scale, qmin, qmax, zero_point, axis, grad_scale, rng, *rest) -> tuple:
    """Of arguments that the forward pass has checked."""
    run = implementation("fakequant", "fake_quantize_backward", x)
    args = (flat(scale), qmin, qmax, flat(zero_point), checks.axis_of(x, axis), grad_scale, flat(rng), *rest)
    grad_x, grad_s, grad_z = run(as_type(grad, x.dtype).contiguous(), x.contiguous(), *args)
    if rest[-1]:
        grad_z = as_shape(grad_z, zero_point.shape)
    return as_type(grad_x, x.dtype), as_shape(grad_s, scale.shape), grad_z


def _backward_fake(
    grad, x, scale, qmin, qmax, zero_point=None, axis=None, grad_scale=1.0, rng=None, threshold=KEEP_ALL,
    rounding="quotient", gradient="round-first", learns_zero_point=False,
) -> tuple:  # fmt: skip
    grad_z = scale.new_empty(zero_point.shape if learns_zero_point else 0)
    return x.new_empty(x.shape), scale.new_empty(scale.shape), grad_z


def _quantize(x, scale, qmin, qmax, zero_point=None, axis=None):
    axis = _check(x, scale, qmin, qmax, zero_point, axis)
    checks.code_range(qmin, qmax)
    _check_values(scale, zero_point)
    run = implementation("fakequant", "quantize", x)
    return run(x.contiguous(), flat(scale), qmin, qmax, flat(zero_point), axis)


def _quantize_fake(x, scale, qmin, qmax, zero_point=None, axis=None):
    _check(x, scale, qmin, qmax, zero_point, axis)
    return x.new_empty(x.shape, dtype=checks.code_range(qmin, qmax)), x.new_empty(1, dtype=torch.int64)


def _dequantize(codes, scale, zero_point=None, axis=None) -> torch.Tensor:
    axis = _check_codes(codes, scale, zero_point, axis)
    _check_values(scale, zero_point)
    run = implementation("fakequant", "dequantize", codes)
    return run(codes.contiguous(), flat(scale), flat(zero_point), axis)


def _dequantize_fake(codes, scale, zero_point=None, axis=None) -> torch.Tensor:
    _check_codes(codes, scale, zero_point, axis)
    return codes.new_empty(codes.shape, dtype=torch.float32)


def _check_codes(codes, scale, zero_point, axis) -> int | None:
    checks.tensor("codes", codes, checks.CODES)
    return _check_grid(codes, scale, zero_point, axis)


def _setup(ctx, inputs, output) -> None:
    x, scale, ctx.qmin, ctx.qmax, zero_point, ctx.axis, ctx.grad_scale, rng, ctx.threshold, *ctx.forms = inputs
    ctx.learns_zero_point = zero_point is not None and zero_point.requires_grad
    ctx.save_for_backward(x, scale, zero_point, rng)


def _autograd(ctx, grad):
    x, scale, zero_point, rng = ctx.saved_tensors
    args = (ctx.qmin, ctx.qmax, zero_point, ctx.axis, ctx.grad_scale, rng, ctx.threshold, *ctx.forms)
    grad_x, grad_s, grad_z = _backward_op(grad, x, scale, *args, ctx.learns_zero_point)
    return grad_x, grad_s, None, None, grad_z if ctx.learns_zero_point else None, *(None,) * 6


_GRID = "Tensor? zero_point=None, int? axis=None"
_ARGS = f"Tensor x, Tensor scale, int qmin, int qmax, {_GRID}"
_TRAINED = f"{_ARGS}, float grad_scale=1.0, Tensor? rng=None, int threshold={KEEP_ALL}"
_FORMS = 'str rounding="quotient", str gradient="round-first"'
_forward_op = register(
    f"fake_quantize({_TRAINED}, {_FORMS}) -> Tensor", _forward, _forward_fake, check=_check_forward, no_vmap=NO_VMAP
)
_backward_op = register(
    f"fake_quantize_backward(Tensor grad, {_TRAINED}, {_FORMS}, bool learns_zero_point=False)"
    " -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
    checked=_gradients,
    no_vmap=NO_VMAP,
)
_quantize_op = register(f"quantize({_ARGS}) -> (Tensor, Tensor)", _quantize, _quantize_fake, no_vmap=NO_VMAP)
_dequantize_op = register(
    f"dequantize(Tensor codes, Tensor scale, {_GRID}) -> Tensor", _dequantize, _dequantize_fake, no_vmap=NO_VMAP
)
differentiable(_forward_op, _setup, _autograd)
not_differentiable(_backward_op, "second derivatives of a quantizer are not defined")
not_differentiable(_quantize_op, "codes are integers; fake_quantize has the straight-through gradient")
not_differentiable(_dequantize_op, "train through fake_quantize, whose gradient reaches the scale")
