"""The merge of two quantized tensors, systematic and by draws; and of more.

The official loop merges float weights: per draw, noise for both models where the sum of integers is odd, weighted
mean, divide, round, clamp, two cosines, and a comparison in Python. Each draw repeats the same work, so only one is
timed, in the table of one draw: multiply it by the number of draws to compare it with the other tables.
"""

from __future__ import annotations

import torch

import hdrq
from hdrq.benchmarks.harness import Bench, Mismatch, Provider, copies, head, same_as_reference
from hdrq.ops.merging import FEW

QMIN, QMAX = -8, 7


def official(first: torch.Tensor, second: torch.Tensor, scales: list[torch.Tensor], draws: int) -> torch.Tensor:
    """The released code's loop, from its description; the weights are floats, as there."""
    step, midpoint = (scales[0] + scales[1]) / 2, (first + second) / 2
    best = None
    for _ in range(draws):
        odd = (first / scales[0] + second / scales[1]) % 2 == 1
        noisy = [
            w + torch.where(odd, (torch.rand_like(w) - 0.5) * s, 0.0)
            for w, s in zip((first, second), scales, strict=True)
        ]
        merged = ((0.5 * noisy[0] + 0.5 * noisy[1]) / step).round().clamp(QMIN, QMAX) * step
        cosines = [
            torch.cosine_similarity((merged - w).flatten(), (midpoint - w).flatten(), dim=0).item()
            for w in (first, second)
        ]
        if best is None or (cosines[0] > best[0][0] and cosines[1] > best[0][1]):
            best = cosines, merged
    return best[1]


def verify(codes: torch.Tensor, others: list[torch.Tensor], rng: torch.Tensor) -> None:
    """The op's bits are the reference's, and no outcome of the official loop is further than one step from the mean."""
    first, second = head(codes), head(others[0])
    scales = [torch.full((1,), s, device=codes.device) for s in (0.1, 0.13)]
    for mode in ("exact", "fast"):
        same_as_reference(
            f"merge, {mode}",
            lambda mode=mode: hdrq.ops.merge([first, second], scales, QMIN, QMAX, rng, draws=1, mode=mode).codes,
        )
    same_as_reference(
        "merge, systematic", lambda: hdrq.ops.merge([first, second], scales, QMIN, QMAX, rng, rule="systematic").codes
    )
    floats = [c.float() * s for c, s in zip((first, second), scales, strict=True)]
    step = (scales[0] + scales[1]) / 2
    away = official(*floats, scales, 1) / step - ((floats[0] + floats[1]) / 2 / step).clamp(QMIN, QMAX)
    if away.abs().max() > 1 + 1e-5:
        raise Mismatch("the official loop is not a rounding of the mean")


def of_draws(draws: int):
    """The providers for two tensors and so many draws."""

    def providers(codes: torch.Tensor, others: list[torch.Tensor], rng: torch.Tensor) -> list[Provider]:
        pair, scales = [codes, others[0]], [torch.full((1,), s, device=codes.device) for s in (0.1, 0.13)]
        packed, shape = [hdrq.ops.pack(c) for c in pair], codes.shape
        floats = [c.float() * s for c, s in zip(pair, scales, strict=True)]

        def merge(codes=pair, **options) -> torch.Tensor:
            return hdrq.ops.merge(codes, scales, QMIN, QMAX, rng, rule="noise", draws=draws, **options).codes

        return [
            *copies(codes),
            Provider("hdrq, fast", lambda: merge(mode="fast"), 3),
            Provider("hdrq, fast, packed", lambda: merge(packed, mode="fast", packed=True, shape=shape), 1.5),
            Provider("hdrq, exact", merge, 3),
            *([Provider("official loop, eager", lambda: official(*floats, scales, 1), 12)] if draws == 1 else []),
        ]

    return providers


def systematic(codes: torch.Tensor, others: list[torch.Tensor], rng: torch.Tensor) -> list[Provider]:
    """The providers for two tensors and systematic rounding; a copy of packed codes is the limit of the packed one."""
    pair, scales = [codes, others[0]], [torch.full((1,), s, device=codes.device) for s in (0.1, 0.103)]
    packed, shape = [hdrq.ops.pack(c) for c in pair], codes.shape
    to = torch.empty_like(packed[0])

    def merge(codes, **options) -> torch.Tensor:
        return hdrq.ops.merge(codes, scales, QMIN, QMAX, rng, rule="systematic", **options).codes

    return [
        *copies(codes),
        Provider("copy of one model's packed codes", lambda: to.copy_(packed[0]), 1),
        Provider("hdrq, packed", lambda: merge(packed, packed=True, shape=shape), 1.5),
        Provider("hdrq", lambda: merge(pair), 3),
    ]


def of_models(count: int):
    """The providers for so many tensors and 30 draws."""

    def providers(codes: torch.Tensor, others: list[torch.Tensor], rng: torch.Tensor) -> list[Provider]:
        every = ([codes, *others] * count)[:count]
        scales = [torch.full((1,), 0.1 + 0.01 * k, device=codes.device) for k in range(count)]

        def merge(**options) -> torch.Tensor:
            return hdrq.ops.merge(every, scales, QMIN, QMAX, rng, draws=30, **options).codes

        fast = [Provider("hdrq, fast", lambda: merge(mode="fast"), count + 1)] if count <= FEW else []
        return [*copies(codes), *fast, Provider("hdrq, exact", merge, count + 1)]

    return providers


def inputs(shape: tuple[int, ...], device: str, dtype: torch.dtype) -> tuple:
    generator = torch.Generator().manual_seed(0)
    codes = [torch.randint(QMIN, QMAX + 1, shape, generator=generator).to(device, torch.int8) for _ in range(4)]
    return codes[0], codes[1:], hdrq.rng_state(1, device=device)


BENCH = Bench(
    "merge",
    inputs,
    verify,
    {"systematic": systematic}
    | {f"{draws} draws": of_draws(draws) for draws in (1, 10, 30, 100)}
    | {f"{count} models": of_models(count) for count in (2, 3, 4, 16)},
)
