"""Fake-quantize, forward and backward.

Beside the copies and the eager formula: torch's own fused ops, where they do the same job.
"""

from __future__ import annotations

import torch

import hdrq
from hdrq.benchmarks.harness import (
    Bench,
    Mismatch,
    Provider,
    compiled,
    copies,
    head,
    kernel_alone,
    normal,
    same_as_reference,
)

QMIN, QMAX = -8, 7
OPS = torch.ops.hdrq


def plain(x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    return ((x / s).round().clamp(QMIN, QMAX) * s).to(x.dtype)


def plain_backward(grad: torch.Tensor, x: torch.Tensor, s: torch.Tensor) -> tuple:
    v = x / s
    rounded = v.round()
    inside = (rounded >= QMIN) & (rounded <= QMAX)
    return grad * inside, (grad * (rounded.clamp(QMIN, QMAX) - v * inside)).sum()


def verify(x: torch.Tensor, s: torch.Tensor, zero: torch.Tensor) -> None:
    """The op's bits are the reference's; the others agree to float32's rounding (theirs multiply by 1/s)."""
    few = head(x)
    same_as_reference("fake_quantize", lambda: hdrq.ops.fake_quantize(few, s, QMIN, QMAX))
    same_as_reference("the gradient", lambda: OPS.fake_quantize_backward(few, few, s, QMIN, QMAX)[0])
    wide = few.float()
    y = hdrq.ops.fake_quantize(wide, s, QMIN, QMAX)
    for other in (plain(wide, s), torch.fake_quantize_per_tensor_affine(wide, s, zero.int(), QMIN, QMAX)):
        if ((other - y).abs() > 1e-6).double().mean() > 1e-3:
            raise Mismatch("a provider does not fake-quantize")


def forward(x: torch.Tensor, s: torch.Tensor, zero: torch.Tensor) -> list[Provider]:
    z, moved = zero.int(), 2 * x.element_size()
    providers = [
        *copies(x),
        Provider("hdrq", lambda: hdrq.ops.fake_quantize(x, s, QMIN, QMAX), moved),
        Provider("official formula, eager", lambda: plain(x, s), moved),
        Provider(
            "torch.fake_quantize_per_tensor_affine",
            lambda: torch.fake_quantize_per_tensor_affine(x, s, z, QMIN, QMAX),
            moved + 1,  # and a mask
        ),
        Provider(
            "torch._fake_quantize_learnable",
            lambda: torch._fake_quantize_learnable_per_tensor_affine(x, s, zero, QMIN, QMAX, 1.0),
            moved,
        ),
        Provider("torch.compile", compiled(plain, x, s), moved),
    ]
    providers += kernel_alone(x, s, QMIN, QMAX)
    if x.dim() > 1:
        each = s.expand(x.shape[0]).contiguous()
        run = lambda: hdrq.ops.fake_quantize(x, each, QMIN, QMAX, axis=0)  # noqa: E731
        providers.append(Provider("hdrq, per channel", run, moved))
    return providers


def backward(x: torch.Tensor, s: torch.Tensor, zero: torch.Tensor) -> list[Provider]:
    grad, moved = normal(x.shape, x.device, x.dtype, seed=1), 3 * x.element_size()
    learnable = torch.ops.aten._fake_quantize_learnable_per_tensor_affine_backward
    return [
        *copies(x),
        Provider("hdrq", lambda: OPS.fake_quantize_backward(grad, x, s, QMIN, QMAX), moved),
        Provider("official, closed form, eager", lambda: plain_backward(grad, x, s), moved),
        Provider("torch._fake_quantize_learnable", lambda: learnable(grad, x, s, zero, QMIN, QMAX, 1.0), moved),
        Provider("torch.compile", compiled(plain_backward, grad, x, s), moved),
    ]


def step(x: torch.Tensor, s: torch.Tensor, zero: torch.Tensor) -> list[Provider]:
    """Forward and backward as a training loop runs them, through autograd: on small tensors its way is the price."""
    grad, rng = normal(x.shape, x.device, x.dtype, seed=1), hdrq.rng_state(1, device=x.device)
    learned, scale = x.clone().requires_grad_(), s.clone().requires_grad_()

    def run(function) -> None:
        learned.grad = scale.grad = None
        function().backward(grad)

    learnable, moved = torch._fake_quantize_learnable_per_tensor_affine, 5 * x.element_size()
    noisy = lambda: hdrq.ops.noise_quantize(learned, scale, QMIN, QMAX, rng)  # noqa: E731
    return [
        *copies(x),
        Provider("hdrq", lambda: run(lambda: hdrq.ops.fake_quantize(learned, scale, QMIN, QMAX)), moved),
        Provider("hdrq, noise", lambda: run(noisy), moved),
        Provider(
            "torch._fake_quantize_learnable",
            lambda: run(lambda: learnable(learned, scale, zero, QMIN, QMAX, 1.0)),
            moved,
        ),
    ]


def inputs(shape: tuple[int, ...], device: str, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return normal(shape, device, dtype), torch.full((1,), 0.3, device=device), torch.zeros(1, device=device)


BENCH = Bench(
    "fake_quantize",
    inputs,
    verify,
    {"forward": forward, "backward": backward, "forward and backward": step},
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
)
