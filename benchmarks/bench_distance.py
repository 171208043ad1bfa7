"""How far weights have moved from the source, and the pull back."""

from __future__ import annotations

import torch

import hdrq
from hdrq.benchmarks.harness import Bench, Mismatch, Provider, compiled, copies, head, normal

OPS = torch.ops.hdrq


def plain(w: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    return (w - source).norm()


def plain_backward(grad: torch.Tensor, distance: torch.Tensor, w: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    return (w - source) * (grad / distance)


def verify(w: torch.Tensor, source: torch.Tensor) -> None:
    """Distance and gradient are those in float64, of the op to 1e-6, of the formula to 1e-4."""
    w, source = head(w), head(source)
    difference = w.double() - source.double()
    one, exact = torch.ones((), device=w.device), difference.norm()
    distance = exact.float()
    for got, expected, tolerance in (
        (hdrq.ops.source_distance(w, source), exact, 1e-6),
        (OPS.source_distance_backward(one, distance, w, source), difference / exact, 1e-6),
        (plain(w, source), exact, 1e-4),
        (plain_backward(one, distance, w, source), difference / exact, 1e-4),
    ):
        error = float((got - expected).norm() / expected.norm())
        if not error <= tolerance:
            raise Mismatch(f"distance or gradient is off by {error:.1e}, more than {tolerance}")


def forward(w: torch.Tensor, source: torch.Tensor) -> list[Provider]:
    moved = 2 * w.element_size()
    return [
        *copies(w),
        Provider("hdrq", lambda: hdrq.ops.source_distance(w, source), moved, allocates=False),
        Provider("official formula, eager", lambda: plain(w, source), moved, allocates=False),
        Provider("torch.compile", compiled(plain, w, source), moved, allocates=False),
    ]


def backward(w: torch.Tensor, source: torch.Tensor) -> list[Provider]:
    moved = 3 * w.element_size()
    arguments = (torch.ones((), device=w.device), plain(w, source), w, source)
    return [
        *copies(w),
        Provider("hdrq", lambda: OPS.source_distance_backward(*arguments), moved),
        Provider("official, closed form, eager", lambda: plain_backward(*arguments), moved),
        Provider("torch.compile", compiled(plain_backward, *arguments), moved),
    ]


def inputs(shape: tuple[int, ...], device: str, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    w = normal(shape, device, dtype)
    return w, w + 0.01 * normal(shape, device, dtype, seed=1)


BENCH = Bench("source_distance", inputs, verify, {"forward": forward, "backward": backward})
