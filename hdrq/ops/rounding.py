"""Family ``rounding``: AdaRound, which learns whether each weight rounds up or down."""

from __future__ import annotations

import torch

from hdrq import checks
from hdrq.backends.dispatch import implementation
from hdrq.backends.eager import per_element
from hdrq.ops._library import differentiable, flat, grouped, not_differentiable, register
from hdrq.ops.fakequant import NO_VMAP

CLOSEST = 2**-10  # of a starting h to 0 and 1, where its gradient ends


def adaround(
    x: torch.Tensor,
    scale: torch.Tensor,
    alpha: torch.Tensor,
    qmin: int,
    qmax: int,
    *,
    zero_point: torch.Tensor | None = None,
    axis: int | None = None,
    group_size: int | None = None,
    hard: bool = False,
) -> torch.Tensor:
    """Round each element up or down, as α says: softly while α is learned, hard at the end.

    Equation, s and z the element's scale and zero point::

        y = (clamp(floor(x/s) + h(α) + z, qmin, qmax) − z)·s
        h = clamp(1.2·sigmoid(α) − 0.1, 0, 1);  hard: h = [α ≥ 0]

    Gradient, to α alone (all else stays as it is while AdaRound learns, and is given none): ``∂α = g·s·h'``
    where ``qmin ≤ floor(x/s) + h + z ≤ qmax``, else 0, with ``h' = 1.2·σ·(1 − σ)`` where h is not clamped, else 0. Hard
    rounding has none.

    Args:
        x: float32, bfloat16 or float16, any shape and strides. Half types are computed in float32 and rounded once.
        scale: float32, one element, or ``x.shape[axis]`` elements. Positive and finite: a CPU raises; elsewhere no
            value is read on the host, and a bad scale yields NaN.
        alpha: float32, shaped as x.
        qmin, qmax: the integer range.
        zero_point: integer-valued float32, shaped as ``scale``; None for 0.
        axis: the axis along which ``scale`` and ``zero_point`` vary; None for one of each.
        group_size: neighbours along the last axis that share them, as :func:`fake_quantize` has it.
        hard: round by the sign of α.

    Returns:
        A contiguous tensor like x, the same bits from every backend: the sigmoid, within 2 ulp of the true one, is a
        fixed sequence of float32 operations.

    Raises:
        TypeError, ValueError: "X must be …, got …".

    Source: Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", ICML 2020.
    """
    rows, axis = grouped(x, scale, zero_point, axis, group_size)
    alpha = _like(rows, x, alpha)
    _check(rows, scale, alpha, qmin, qmax, None, axis, zero_point)
    hard = checks.choice("hard", hard, (False, True))
    y, _ = _forward_op(rows, scale, alpha, qmin, qmax, None, axis, hard, zero_point)
    return y if rows is x else y.view(x.shape)


def adaround_regularized(
    x: torch.Tensor,
    scale: torch.Tensor,
    alpha: torch.Tensor,
    qmin: int,
    qmax: int,
    beta: float | torch.Tensor,
    *,
    zero_point: torch.Tensor | None = None,
    axis: int | None = None,
    group_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`adaround`, and in the same pass the penalty that drives every h to 0 or 1, ``Σ (1 − |2h − 1|^β)``.

    The backward pass gives both gradients at once: that of the penalty is ``−2β·|2h − 1|^(β−1)·sign(2h − 1)·h'``.

    Args:
        beta: at least 1; annealed from 20 to 2 as a rule. A float, or a float32 tensor of one element on the device of
            x, whose value is not checked off the CPU: it can be annealed inside a captured CUDA graph.
        x, scale, alpha, qmin, qmax, zero_point, axis, group_size: as :func:`adaround`.

    Returns:
        y, and the penalty: float32, zero-dimensional, within 1e-6 of a float64 sum.
    """
    if not isinstance(beta, torch.Tensor):
        checks.tensor("x", x, checks.FLOATS)
        beta = torch.full((), checks.real("beta", beta, 1.0), dtype=torch.float32, device=x.device)
    rows, axis = grouped(x, scale, zero_point, axis, group_size)
    alpha = _like(rows, x, alpha)
    _check(rows, scale, alpha, qmin, qmax, beta, axis, zero_point)
    y, penalty = _forward_op(rows, scale, alpha, qmin, qmax, beta, axis, False, zero_point)
    return (y if rows is x else y.view(x.shape)), penalty


def adaround_init(
    x: torch.Tensor, scale: torch.Tensor, *, axis: int | None = None, group_size: int | None = None
) -> torch.Tensor:
    """The α with which soft rounding starts at x itself: ``h(α) = x/s − floor(x/s)``, float32, shaped as x.

    h stays 2⁻¹⁰ away from 0 and 1: beyond them α has no gradient, and could never be learned. At a tie h is
    2⁻¹⁰ away from ½, on the side of the even integer: hard rounding at the start is rounding to nearest, ties to even.
    """
    checks.tensor("x", x, checks.FLOATS)
    rows, axis = grouped(x, scale, None, axis, group_size)
    axis = checks.axis_of(rows, axis)
    checks.per_axis("scale", scale, rows, axis)
    checks.scale_values("scale", scale)
    v = rows.detach().float() / per_element(scale.detach().flatten(), rows.ndim, axis)
    h = (v - v.floor()).clamp(CLOSEST, 1 - CLOSEST)
    h = torch.where(h == 0.5, 0.5 + CLOSEST * (v.round() - v).sign(), h)
    return -torch.log(1.2 / (h + 0.1) - 1).view(x.shape)


def _like(rows: torch.Tensor, x: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """α of x as that of its rows."""
    if rows is x or not isinstance(alpha, torch.Tensor):
        return alpha
    checks.same_shape("alpha", alpha, "x", x)
    return alpha.reshape(rows.shape)


def _check(x, scale, alpha, qmin, qmax, beta, axis, zero_point) -> int | None:
    checks.tensor("x", x, checks.FLOATS)
    checks.quant_range(qmin, qmax)
    axis = checks.axis_of(x, axis)
    checks.per_axis("scale", scale, x, axis)
    if zero_point is not None:
        checks.per_axis("zero_point", zero_point, x, axis)
    checks.tensor("alpha", alpha, (torch.float32,), x.device)
    checks.same_shape("alpha", alpha, "x", x)
    if beta is not None:
        checks.per_axis("beta", beta, x, None)
    return axis


def _check_values(scale, beta, zero_point) -> None:
    checks.scale_values("scale", scale)
    checks.zero_point_values(zero_point)
    if beta is not None and beta.device.type == "cpu":
        checks.real("beta", float(beta.detach()), 1.0)


def _forward(x, scale, alpha, qmin, qmax, beta=None, axis=None, hard=False, zero_point=None):
    axis = _check(x, scale, alpha, qmin, qmax, beta, axis, zero_point)
    _check_values(scale, beta, zero_point)
    run = implementation("rounding", "adaround", x)
    tensors = (x.contiguous(), flat(scale), alpha.contiguous())
    y, penalty = run(*tensors, qmin, qmax, beta, axis, hard, flat(zero_point))
    return y.to(x.dtype), penalty


def _forward_fake(x, scale, alpha, qmin, qmax, beta=None, axis=None, hard=False, zero_point=None):
    _check(x, scale, alpha, qmin, qmax, beta, axis, zero_point)
    return x.new_empty(x.shape), alpha.new_empty(())


def _backward(grad, grad_penalty, x, scale, alpha, qmin, qmax, beta=None, axis=None, zero_point=None) -> torch.Tensor:
    axis = _check(x, scale, alpha, qmin, qmax, beta, axis, zero_point)
    checks.same_shape("grad", grad, "x", x)
    run = implementation("rounding", "adaround_backward", x)
    tensors = (grad.to(x.dtype).contiguous(), grad_penalty, x.contiguous(), flat(scale), alpha.contiguous())
    return run(*tensors, qmin, qmax, beta, axis, flat(zero_point))


def _backward_fake(
    grad, grad_penalty, x, scale, alpha, qmin, qmax, beta=None, axis=None, zero_point=None
) -> torch.Tensor:
    return alpha.new_empty(alpha.shape)


def _setup(ctx, inputs, output) -> None:
    x, scale, alpha, ctx.qmin, ctx.qmax, beta, ctx.axis, ctx.hard, zero_point = inputs
    ctx.save_for_backward(x, scale, alpha, beta, zero_point)


def _autograd(ctx, grad, grad_penalty):
    x, scale, alpha, beta, zero_point = ctx.saved_tensors
    if ctx.hard:
        return (None,) * 9
    args = (x, scale, alpha, ctx.qmin, ctx.qmax, beta, ctx.axis, zero_point)
    return None, None, _backward_op(grad, grad_penalty, *args), *(None,) * 6


_ARGS = "Tensor x, Tensor scale, Tensor alpha, int qmin, int qmax, Tensor? beta=None, int? axis=None"
_forward_op = register(
    f"adaround({_ARGS}, bool hard=False, Tensor? zero_point=None) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    no_vmap=NO_VMAP,
)
_backward_op = register(
    f"adaround_backward(Tensor grad, Tensor grad_penalty, {_ARGS}, Tensor? zero_point=None) -> Tensor",
    _backward,
    _backward_fake,
    no_vmap=NO_VMAP,
)
differentiable(_forward_op, _setup, _autograd)
not_differentiable(_backward_op, "second derivatives of a quantizer are not defined")
