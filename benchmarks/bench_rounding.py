"""AdaRound with its penalty, forward and backward."""

from __future__ import annotations

import torch

import hdrq
from hdrq.benchmarks.harness import Bench, Mismatch, Provider, compiled, copies, head, normal, same_as_reference

QMIN, QMAX, BETA = -8, 7, 8.0
OPS = torch.ops.hdrq


def plain(x: torch.Tensor, s: torch.Tensor, alpha: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    h = (1.2 * torch.sigmoid(alpha) - 0.1).clamp(0, 1)
    y = (torch.floor(x / s) + h).clamp(QMIN, QMAX) * s
    return y, (1 - (2 * h - 1).abs().pow(BETA)).sum()


def verify(x: torch.Tensor, s: torch.Tensor, alpha: torch.Tensor) -> None:
    """The op's bits are the reference's; the formula is the same function."""
    few, own = head(x), head(alpha)
    same_as_reference("adaround", lambda: hdrq.ops.adaround(few, s, own, QMIN, QMAX))
    y, penalty = hdrq.ops.adaround_regularized(few, s, own, QMIN, QMAX, BETA)
    other, theirs = plain(few, s, own)
    if not (torch.allclose(y, other, atol=1e-5) and torch.allclose(penalty, theirs, rtol=1e-4)):
        raise Mismatch("the formula is not adaround_regularized")


def forward(x: torch.Tensor, s: torch.Tensor, alpha: torch.Tensor) -> list[Provider]:
    moved = 3 * x.element_size()
    return [
        *copies(x),
        Provider("hdrq", lambda: hdrq.ops.adaround_regularized(x, s, alpha, QMIN, QMAX, BETA), moved),
        Provider("hdrq, without the penalty", lambda: hdrq.ops.adaround(x, s, alpha, QMIN, QMAX), moved),
        Provider("official formula, eager", lambda: plain(x, s, alpha), moved),
        Provider("torch.compile", compiled(plain, x, s, alpha), moved),
    ]


def step(x: torch.Tensor, s: torch.Tensor, alpha: torch.Tensor) -> list[Provider]:
    """Forward and backward, with the gradient of what the block does with the weight given."""
    grad, one = normal(x.shape, x.device, seed=2), torch.ones((), device=x.device)
    learned = alpha.clone().requires_grad_()

    def run(function) -> None:
        learned.grad = None
        y, penalty = function()
        torch.autograd.backward([y, penalty], [grad, one])

    fast, moved = torch.compile(plain, dynamic=False), 7 * x.element_size()
    return [
        *copies(x),
        Provider("hdrq", lambda: run(lambda: hdrq.ops.adaround_regularized(x, s, learned, QMIN, QMAX, BETA)), moved),
        Provider("official formula, eager", lambda: run(lambda: plain(x, s, learned)), moved),
        Provider("torch.compile", lambda: run(lambda: fast(x, s, learned)), moved),
    ]


def inputs(shape: tuple[int, ...], device: str, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return normal(shape, device, dtype), torch.full((1,), 0.3, device=device), 2 * normal(shape, device, seed=1)


BENCH = Bench("adaround", inputs, verify, {"forward": forward, "forward and backward": step})
