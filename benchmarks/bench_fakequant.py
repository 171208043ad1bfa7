"""Fake-quantize, forward and backward: ``python benchmarks/bench_fakequant.py --out benchmarks/results/NAME``.

Beside the copies and the eager formula: torch's own fused ops, where they do the same job.
"""

from __future__ import annotations

import torch
from harness import Provider, bench, compiled, normal

import hdrq

QMIN, QMAX = -8, 7
OPS = torch.ops.hdrq


def plain(x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    return (x / s).round().clamp(QMIN, QMAX) * s


def plain_backward(grad: torch.Tensor, x: torch.Tensor, s: torch.Tensor) -> tuple:
    v = x / s
    rounded = v.round()
    inside = (rounded >= QMIN) & (rounded <= QMAX)
    return grad * inside, (grad * (rounded.clamp(QMIN, QMAX) - v * inside)).sum()


def verify(x: torch.Tensor, s: torch.Tensor, zero: torch.Tensor) -> None:
    """The op's bits are the reference's; the others agree to float32's rounding (theirs multiply by 1/s)."""
    few = x[: 2**14]
    y = hdrq.ops.fake_quantize(few, s, QMIN, QMAX)
    with hdrq.use_backend("reference"):
        if not torch.equal(y, hdrq.ops.fake_quantize(few, s, QMIN, QMAX)):
            raise SystemExit("fake_quantize differs from the reference: not timed")
    for other in (plain(few, s), torch.fake_quantize_per_tensor_affine(few, s, zero.int(), QMIN, QMAX)):
        if ((other - y).abs() > 1e-6).double().mean() > 1e-3:
            raise SystemExit("a provider does not fake-quantize: not timed")


def forward(x: torch.Tensor, s: torch.Tensor, zero: torch.Tensor) -> list[Provider]:
    y, z = torch.empty_like(x).copy_(x), zero.int()
    providers = [
        Provider("copy into existing memory", lambda: y.copy_(x), 8, allocates=False),
        Provider("clone", x.clone, 8),
        Provider("hdrq", lambda: hdrq.ops.fake_quantize(x, s, QMIN, QMAX), 8),
        Provider("official formula, eager", lambda: plain(x, s), 8),
        Provider(
            "torch.fake_quantize_per_tensor_affine",
            lambda: torch.fake_quantize_per_tensor_affine(x, s, z, QMIN, QMAX),
            9,
        ),
        Provider(
            "torch._fake_quantize_learnable",
            lambda: torch._fake_quantize_learnable_per_tensor_affine(x, s, zero, QMIN, QMAX, 1.0),
            8,
        ),
    ]
    if fast := compiled(plain, x, s):
        providers.append(Provider("torch.compile", lambda: fast(x, s), 8))
    if x.device.type == "cpu" and hdrq.backends()["cpp"] is None:
        from hdrq import _C, native

        args = (native.job(x), 0, x.data_ptr(), y.data_ptr(), native.grid(x, s, None, QMIN, QMAX, None))
        providers.append(Provider("hdrq, kernel alone", lambda: _C.fake_quantize(*args), 8, allocates=False))
    return providers


def backward(x: torch.Tensor, s: torch.Tensor, zero: torch.Tensor) -> list[Provider]:
    y, grad = torch.empty_like(x).copy_(x), torch.randn_like(x)
    learnable = torch.ops.aten._fake_quantize_learnable_per_tensor_affine_backward
    providers = [
        Provider("copy into existing memory", lambda: y.copy_(x), 8, allocates=False),
        Provider("clone", x.clone, 8),
        Provider("hdrq", lambda: OPS.fake_quantize_backward(grad, x, s, QMIN, QMAX), 12),
        Provider("official, eager closed form", lambda: plain_backward(grad, x, s), 12),
        Provider("torch._fake_quantize_learnable", lambda: learnable(grad, x, s, zero, QMIN, QMAX, 1.0), 12),
    ]
    if fast := compiled(plain_backward, grad, x, s):
        providers.append(Provider("torch.compile", lambda: fast(grad, x, s), 12))
    return providers


if __name__ == "__main__":
    bench(
        "fake_quantize",
        lambda size, device: (
            normal(size, device),
            torch.full((1,), 0.3, device=device),
            torch.zeros(1, device=device),
        ),
        verify,
        {"forward": forward, "backward": backward},
    )
