"""Which calibration samples a unit learns from, in what order, and which it is judged by."""

from __future__ import annotations

from dataclasses import replace

import torch

from hdrq.calibrate.ranks import Ranks
from hdrq.methods.loss import MEASURED
from hdrq.rng import words


def split(count: int, judged: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The samples that a unit learns from, and those that it is judged by: evenly spaced, at most one in eight.

    Where that is none, it is judged by the first of all.
    """
    judged = min(judged, count // 8)
    every = torch.arange(count)
    if judged == 0:
        return every, every[:MEASURED]
    apart = torch.zeros(count, dtype=torch.bool)
    apart[torch.arange(judged) * count // judged] = True
    return every[~apart], every[apart]


def part(learned_from: torch.Tensor, count: int, batch_size: int, ranks: Ranks) -> int:
    """How many samples of a batch each rank has: as many as any other, and no more than any has to learn from."""
    own = (replace(ranks, rank=rank).own(learned_from, count) for rank in range(ranks.size))
    return min(batch_size // ranks.size, *(len(numbers) for numbers in own))


def order(samples: int, count: int, rng: torch.Tensor) -> torch.Tensor:
    """Which sample is read when, ``count`` in all: pass after pass over the samples, each in an order of its own.

    Args:
        rng: :func:`hdrq.rng_state`, of whose stream the first two words are the seed.
    """
    low, high = (int(word) for word in words(rng.numpy(), 2))
    generator = torch.Generator().manual_seed(high << 32 | low)
    passes = -(-count // samples)
    orders = [torch.randperm(samples, generator=generator) for _ in range(passes)]
    return torch.cat([torch.empty(0, dtype=torch.int64), *orders])[:count]
