"""Family ``drop``: QDrop's mixing of two tensors."""

from __future__ import annotations

import torch

from hdrq import checks
from hdrq.backends.dispatch import implementation
from hdrq.ops._library import differentiable, flat, not_differentiable, register
from hdrq.ops.noise import NO_VMAP
from hdrq.rng import KEEP_ALL


def drop_mix(a: torch.Tensor, b: torch.Tensor, p: float, rng: torch.Tensor) -> torch.Tensor:
    """``a`` with probability p, else ``b``, element by element.

    An element takes a where its 16-bit coin is below ``round(p·2¹⁶)``; the coin comes from ``stream ^ 0x80000000``, so
    it is independent of the noise that the same ``rng`` gives. The gradient goes where the value came from.

    Args:
        a, b: float32, bfloat16 or float16, of one shape and dtype.
        p: probability of a, in [0, 1].
        rng: :func:`hdrq.rng_state`, on the device of a.

    Returns:
        A contiguous tensor like a.

    Raises:
        TypeError, ValueError: "X must be …, got …".

    Source: QDrop (Wei et al., ICLR 2022).
    """
    threshold = checks.keep_threshold("p", p)
    _check(a, b, threshold, rng)
    return _forward_op(a, b, threshold, rng)


def _check(a, b, threshold, rng) -> None:
    checks.tensor("a", a, checks.FLOATS)
    checks.tensor("b", b, (a.dtype,), a.device)
    checks.same_shape("b", b, "a", a)
    checks.integer("threshold", threshold, 0, KEEP_ALL)
    checks.rng(rng, a.device)


def _forward(a, b, threshold, rng) -> torch.Tensor:
    _check(a, b, threshold, rng)
    run = implementation("drop", "drop_mix", a)
    return run(a.contiguous(), b.contiguous(), threshold, flat(rng)).to(a.dtype)


def _forward_fake(a, b, threshold, rng) -> torch.Tensor:
    _check(a, b, threshold, rng)
    return a.new_empty(a.shape)


def _backward(grad, threshold, rng):
    run = implementation("drop", "drop_mix_backward", grad)
    grad_a, grad_b = run(grad.contiguous(), threshold, flat(rng))
    return grad_a.to(grad.dtype), grad_b.to(grad.dtype)


def _backward_fake(grad, threshold, rng):
    return grad.new_empty(grad.shape), grad.new_empty(grad.shape)


def _setup(ctx, inputs, output) -> None:
    *_, ctx.threshold, rng = inputs
    ctx.save_for_backward(rng)


def _autograd(ctx, grad):
    (rng,) = ctx.saved_tensors
    return (*_backward_op(grad, ctx.threshold, rng), None, None)


_forward_op = register(
    "drop_mix(Tensor a, Tensor b, int threshold, Tensor rng) -> Tensor", _forward, _forward_fake, no_vmap=NO_VMAP
)
_backward_op = register(
    "drop_mix_backward(Tensor grad, int threshold, Tensor rng) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
    no_vmap=NO_VMAP,
)
differentiable(_forward_op, _setup, _autograd)
not_differentiable(_backward_op, "a choice between two tensors has no second derivative")
