"""Family ``distance``: how far weights have moved from the source, and the pull back."""

from __future__ import annotations

import torch

from hdrq import checks
from hdrq.backends.dispatch import implementation
from hdrq.ops._library import differentiable, not_differentiable, register

NO_VMAP = "it is a norm over the whole tensor"


def source_distance(w: torch.Tensor, w_src: torch.Tensor) -> torch.Tensor:
    """``‖w − w_src‖₂``, not squared, with the gradient ``(w − w_src)/‖w − w_src‖₂``, 0 where the distance is 0.

    Args:
        w, w_src: float32, bfloat16 or float16, of one shape and dtype. ``w_src`` takes no gradient.

    Returns:
        float32, zero-dimensional; within 1e-6 of the float64 norm, the same from run to run on a device.

    Raises:
        TypeError, ValueError: "X must be …, got …".

    Source: HDRQ (Shin et al., ICML 2025), Section 4.2.
    """
    _check(w, w_src)
    return _forward_op(w, w_src)


def _check(w, w_src) -> None:
    checks.tensor("w", w, checks.FLOATS)
    checks.tensor("w_src", w_src, (w.dtype,), w.device)
    checks.same_shape("w_src", w_src, "w", w)


def _forward(w, w_src) -> torch.Tensor:
    _check(w, w_src)
    return implementation("distance", "source_distance", w)(w.contiguous(), w_src.contiguous())


def _forward_fake(w, w_src) -> torch.Tensor:
    _check(w, w_src)
    return w.new_empty((), dtype=torch.float32)


def _backward(grad, distance, w, w_src) -> torch.Tensor:
    run = implementation("distance", "source_distance_backward", w)
    return run(grad, distance, w.contiguous(), w_src.contiguous()).to(w.dtype)


def _backward_fake(grad, distance, w, w_src) -> torch.Tensor:
    return w.new_empty(w.shape)


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(output, *inputs)


def _autograd(ctx, grad):
    return _backward_op(grad, *ctx.saved_tensors), None


_forward_op = register("source_distance(Tensor w, Tensor w_src) -> Tensor", _forward, _forward_fake, no_vmap=NO_VMAP)
_backward_op = register(
    "source_distance_backward(Tensor grad, Tensor distance, Tensor w, Tensor w_src) -> Tensor",
    _backward,
    _backward_fake,
    no_vmap=NO_VMAP,
)
differentiable(_forward_op, _setup, _autograd)
not_differentiable(_backward_op, "second derivatives of the distance are not needed by any recipe")
