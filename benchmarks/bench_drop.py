"""QDrop's mixing of two tensors, forward and backward."""

from __future__ import annotations

import torch

import hdrq
from hdrq.benchmarks.harness import Bench, Mismatch, Provider, compiled, copies, head, normal, same_as_reference

P = 0.5
THRESHOLD = round(P * 2**16)  # what the op makes of p
OPS = torch.ops.hdrq


def plain(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.where(torch.rand_like(a) < P, a, b)


def plain_backward(grad: torch.Tensor, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient goes where the value came from, which a mask has stored."""
    return torch.where(kept, grad, 0), torch.where(kept, 0, grad)


def verify(a: torch.Tensor, b: torch.Tensor, rng: torch.Tensor) -> None:
    """The op's bits are the reference's; the formula takes as many elements of ``a`` as p says, and else of ``b``."""
    a, b = head(a), head(b)
    same_as_reference("drop_mix", lambda: hdrq.ops.drop_mix(a, b, P, rng))
    s = torch.full((1,), 0.3, device=a.device)
    same_as_reference("the fused drop", lambda: hdrq.ops.fake_quantize(a, s, -8, 7, keep=P, rng=rng))
    same_as_reference("the gradient", lambda: torch.stack(OPS.drop_mix_backward(a, THRESHOLD, rng)))
    y = plain(a, b)
    kept, deviation = (y == a), (P * (1 - P) / a.numel()) ** 0.5
    if not torch.equal(y[~kept], b[~kept]) or abs(kept.double().mean() - P) > 6 * deviation + (a == b).double().mean():
        raise Mismatch("the formula is not drop_mix")


def forward(a: torch.Tensor, b: torch.Tensor, rng: torch.Tensor) -> list[Provider]:
    moved = 3 * a.element_size()
    return [
        *copies(a),
        Provider("hdrq", lambda: hdrq.ops.drop_mix(a, b, P, rng), moved),
        Provider("official formula, eager", lambda: plain(a, b), moved),
        Provider("torch.compile", compiled(plain, a, b), moved),
    ]


def backward(a: torch.Tensor, b: torch.Tensor, rng: torch.Tensor) -> list[Provider]:
    grad, kept, moved = b, torch.rand_like(a) < P, 3 * a.element_size()
    return [
        *copies(a),
        Provider("hdrq", lambda: OPS.drop_mix_backward(grad, THRESHOLD, rng), moved),
        Provider("official, closed form, eager", lambda: plain_backward(grad, kept), moved + 1),
        Provider("torch.compile", compiled(plain_backward, grad, kept), moved + 1),
    ]


def fused(a: torch.Tensor, b: torch.Tensor, rng: torch.Tensor) -> list[Provider]:
    """Drawn and mixed by the pass that fake-quantizes."""
    moved, s = 2 * a.element_size(), torch.full((1,), 0.3, device=a.device)

    def apart() -> torch.Tensor:
        return hdrq.ops.drop_mix(hdrq.ops.fake_quantize(a, s, -8, 7), a, P, rng)

    return [
        *copies(a),
        Provider("hdrq", lambda: hdrq.ops.fake_quantize(a, s, -8, 7, keep=P, rng=rng), moved),
        Provider("two ops of hdrq", apart, moved),
        Provider("official formula, eager", lambda: plain((a / s).round().clamp(-8, 7) * s, a), moved),
    ]


def inputs(shape: tuple[int, ...], device: str, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    a, b = (normal(shape, device, dtype, seed) for seed in (0, 1))
    return a, b, hdrq.rng_state(1, device=device)


BENCH = Bench(
    "drop_mix",
    inputs,
    verify,
    {"forward": forward, "backward": backward, "fused into fake_quantize": fused},
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
)
