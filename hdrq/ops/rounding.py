"""Family ``rounding``: AdaRound, which learns whether each weight rounds up or down."""

from __future__ import annotations

import torch

from hdrq import checks
from hdrq.backends.dispatch import implementation
from hdrq.backends.eager import per_element
from hdrq.ops._library import differentiable, not_differentiable, register
from hdrq.ops.fakequant import NO_VMAP

CLOSEST = 2**-10  # of a starting h to 0 and 1, where its gradient ends


def adaround(
    x: torch.Tensor,
    scale: torch.Tensor,
    alpha: torch.Tensor,
    qmin: int,
    qmax: int,
    *,
    axis: int | None = None,
    hard: bool = False,
) -> torch.Tensor:
    """Round each element up or down, as α says: softly while α is learned, hard at the end.

    Equation, s the element's scale::

        y = clamp(floor(x/s) + h(α), qmin, qmax)·s,  h = clamp(1.2·sigmoid(α) − 0.1, 0, 1);  hard: h = [α ≥ 0]

    Gradient, to α alone (x and scale stay as they are while AdaRound learns; none is given to them): ``∂α = g·s·h'``
    where ``qmin ≤ floor(x/s) + h ≤ qmax``, else 0, with ``h' = 1.2·σ·(1 − σ)`` where h is not clamped, else 0. Hard
    rounding has none.

    Args:
        x: float32, bfloat16 or float16, any shape and strides. Half types are computed in float32 and rounded once.
        scale: float32, one element, or ``x.shape[axis]`` elements. Positive and finite: a CPU raises; elsewhere no
            value is read on the host, and a bad scale yields NaN.
        alpha: float32, shaped as x.
        qmin, qmax: the integer range.
        axis: the axis along which ``scale`` varies; None for one scale.
        hard: round by the sign of α.

    Returns:
        A contiguous tensor like x, the same bits from every backend: the sigmoid, within 2 ulp of the true one, is a
        fixed sequence of float32 operations.

    Raises:
        TypeError, ValueError: "X must be …, got …".

    Source: Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", ICML 2020.
    """
    _check(x, scale, alpha, qmin, qmax, None, axis)
    return _forward_op(x, scale, alpha, qmin, qmax, None, axis, checks.choice("hard", hard, (False, True)))[0]


def adaround_regularized(
    x: torch.Tensor,
    scale: torch.Tensor,
    alpha: torch.Tensor,
    qmin: int,
    qmax: int,
    beta: float | torch.Tensor,
    *,
    axis: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`adaround`, and in the same pass the penalty that drives every h to 0 or 1, ``Σ (1 − |2h − 1|^β)``.

    The backward pass gives both gradients at once: that of the penalty is ``−2β·|2h − 1|^(β−1)·sign(2h − 1)·h'``.

    Args:
        beta: at least 1; annealed from 20 to 2 as a rule. A float, or a float32 tensor of one element on the device of
            x, whose value is not checked off the CPU: it can be annealed inside a captured CUDA graph.
        x, scale, alpha, qmin, qmax, axis: as :func:`adaround`.

    Returns:
        y, and the penalty: float32, zero-dimensional, within 1e-6 of a float64 sum.
    """
    if not isinstance(beta, torch.Tensor):
        checks.tensor("x", x, checks.FLOATS)
        beta = torch.full((), checks.real("beta", beta, 1.0), dtype=torch.float32, device=x.device)
    _check(x, scale, alpha, qmin, qmax, beta, axis)
    y, penalty = _forward_op(x, scale, alpha, qmin, qmax, beta, axis, False)
    return y, penalty


def adaround_init(x: torch.Tensor, scale: torch.Tensor, *, axis: int | None = None) -> torch.Tensor:
    """The α with which soft rounding starts at x itself: ``h(α) = x/s − floor(x/s)``, float32, shaped as x.

    h stays 2⁻¹⁰ away from 0 and 1: beyond them α has no gradient, and could never be learned. At a tie h is
    2⁻¹⁰ away from ½, on the side of the even integer: hard rounding at the start is rounding to nearest, ties to even.
    """
    checks.tensor("x", x, checks.FLOATS)
    axis = checks.axis_of(x, axis)
    checks.per_axis("scale", scale, x, axis)
    checks.scale_values("scale", scale)
    v = x.detach().float() / per_element(scale.detach(), x.ndim, axis)
    h = (v - v.floor()).clamp(CLOSEST, 1 - CLOSEST)
    h = torch.where(h == 0.5, 0.5 + CLOSEST * (v.round() - v).sign(), h)
    return -torch.log(1.2 / (h + 0.1) - 1)


def _check(x, scale, alpha, qmin, qmax, beta, axis) -> int | None:
    checks.tensor("x", x, checks.FLOATS)
    checks.quant_range(qmin, qmax)
    axis = checks.axis_of(x, axis)
    checks.per_axis("scale", scale, x, axis)
    checks.tensor("alpha", alpha, (torch.float32,), x.device)
    checks.same_shape("alpha", alpha, "x", x)
    if beta is not None:
        checks.per_axis("beta", beta, x, None)
    return axis


def _check_values(scale, beta) -> None:
    checks.scale_values("scale", scale)
    if beta is not None and beta.device.type == "cpu":
        checks.real("beta", float(beta.detach()), 1.0)


def _forward(x, scale, alpha, qmin, qmax, beta=None, axis=None, hard=False):
    axis = _check(x, scale, alpha, qmin, qmax, beta, axis)
    _check_values(scale, beta)
    run = implementation("rounding", "adaround", x)
    y, penalty = run(x.contiguous(), scale.flatten(), alpha.contiguous(), qmin, qmax, beta, axis, hard)
    return y.to(x.dtype), penalty


def _forward_fake(x, scale, alpha, qmin, qmax, beta=None, axis=None, hard=False):
    _check(x, scale, alpha, qmin, qmax, beta, axis)
    return x.new_empty(x.shape), alpha.new_empty(())


def _backward(grad, grad_penalty, x, scale, alpha, qmin, qmax, beta=None, axis=None) -> torch.Tensor:
    axis = _check(x, scale, alpha, qmin, qmax, beta, axis)
    checks.same_shape("grad", grad, "x", x)
    run = implementation("rounding", "adaround_backward", x)
    tensors = (grad.to(x.dtype).contiguous(), grad_penalty, x.contiguous(), scale.flatten(), alpha.contiguous())
    return run(*tensors, qmin, qmax, beta, axis)


def _backward_fake(grad, grad_penalty, x, scale, alpha, qmin, qmax, beta=None, axis=None) -> torch.Tensor:
    return alpha.new_empty(alpha.shape)


def _setup(ctx, inputs, output) -> None:
    x, scale, alpha, ctx.qmin, ctx.qmax, beta, ctx.axis, ctx.hard = inputs
    ctx.save_for_backward(x, scale, alpha, beta)


def _autograd(ctx, grad, grad_penalty):
    x, scale, alpha, beta = ctx.saved_tensors
    if ctx.hard:
        return (None,) * 8
    args = (x, scale, alpha, ctx.qmin, ctx.qmax, beta, ctx.axis)
    return None, None, _backward_op(grad, grad_penalty, *args), None, None, None, None, None


_ARGS = "Tensor x, Tensor scale, Tensor alpha, int qmin, int qmax, Tensor? beta=None, int? axis=None"
_forward_op = register(
    f"adaround({_ARGS}, bool hard=False) -> (Tensor, Tensor)", _forward, _forward_fake, no_vmap=NO_VMAP
)
_backward_op = register(
    f"adaround_backward(Tensor grad, Tensor grad_penalty, {_ARGS}) -> Tensor",
    _backward,
    _backward_fake,
    no_vmap=NO_VMAP,
)
differentiable(_forward_op, _setup, _autograd)
not_differentiable(_backward_op, "second derivatives of a quantizer are not defined")
