"""Noise in place of rounding, forward and backward.

The limit is a copy: into memory that exists (``copy_``), or into new memory (``clone``), whose pages the first touch
pays for, as it does for the result of any op. Each provider is compared with the copy of its kind.
"""

from __future__ import annotations

from functools import partial

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


def official(
    x: torch.Tensor, s: torch.Tensor, empirical: bool = True, qmin: int = QMIN, qmax: int = QMAX
) -> torch.Tensor:
    """The eager formula as the method's released code computes it, from its description (METHOD: presets, facts).

    Quantize; take the error of the unclipped elements in steps, by boolean indexing; count it in 256 bins; draw a bin
    for each element with ``multinomial``, and a place inside the bin; add, and set what is clipped to its bound.
    """
    v = x / s
    clipped_high, clipped_low = x >= qmax * s, x <= qmin * s
    inside = ~(clipped_high | clipped_low)
    if empirical:
        error = (v.round().clamp(qmin, qmax) - v)[inside]
        counts = torch.histc(error, 256, -0.5, 0.5)
        bins = torch.multinomial(counts, x.numel(), replacement=True)
        n = ((bins + torch.rand(x.numel(), device=x.device)) / 256 - 0.5).view_as(x)
    else:
        n = torch.rand_like(x) - 0.5
    y = x + n * s
    y[clipped_high] = qmax * s
    y[clipped_low] = qmin * s
    return y.to(x.dtype)


def plain(x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """The uniform formula as one would write it for a compiler."""
    y = x + (torch.rand_like(x) - 0.5) * s
    return torch.where(x >= QMAX * s, QMAX * s, torch.where(x <= QMIN * s, QMIN * s, y)).to(x.dtype)


def plain_backward(grad: torch.Tensor, x: torch.Tensor, s: torch.Tensor, n: torch.Tensor) -> tuple:
    """The closed form of both gradients, with the noise stored."""
    high, low = x >= QMAX * s, x <= QMIN * s
    inside = ~(high | low)
    slope = torch.where(inside, n, torch.where(high, QMAX, QMIN))
    return grad * inside, (grad * slope).sum()


def verify(x: torch.Tensor, s: torch.Tensor, rng: torch.Tensor) -> None:
    """The op's bits are the reference's, and the formulas compared agree with it where noise plays no part."""
    few = head(x)
    for counts in (None, OPS.error_histogram(few, s, QMIN, QMAX)):
        kind, arguments = "uniform" if counts is None else "empirical", (few, s, QMIN, QMAX, rng, counts)
        same_as_reference(f"{kind} noise", partial(OPS.noise_quantize, *arguments))
        same_as_reference(f"the gradient, {kind}", lambda: OPS.noise_quantize_backward(few, *arguments)[0])  # noqa: B023
    clipped = (few >= QMAX * s) | (few <= QMIN * s)
    bound = few.clamp(QMIN * s, QMAX * s).to(few.dtype)
    for formula in (official, plain):
        y = formula(few, s)
        if not torch.equal(y[clipped], bound[clipped]) or ((y - few)[~clipped].abs() > s).any():
            raise Mismatch(f"the formula {formula.__name__} is not noise_quantize")


def uniform(x: torch.Tensor, s: torch.Tensor, rng: torch.Tensor) -> list[Provider]:
    moved = 2 * x.element_size()
    providers = [
        *copies(x),
        Provider("hdrq", lambda: hdrq.ops.noise_quantize(x, s, QMIN, QMAX, rng), moved),
        Provider("official formula, uniform, eager", lambda: official(x, s, empirical=False), moved),
        Provider("torch.where, eager", lambda: plain(x, s), moved),
        Provider("torch.compile", compiled(plain, x, s), moved),
        *kernel_alone(x, s, QMIN, QMAX, rng),
    ]
    if x.dim() > 1:
        each = s.expand(x.shape[0]).contiguous()
        providers.append(
            Provider("hdrq, per channel", lambda: hdrq.ops.noise_quantize(x, each, QMIN, QMAX, rng, axis=0), moved)
        )
    return providers


def empirical(x: torch.Tensor, s: torch.Tensor, rng: torch.Tensor) -> list[Provider]:
    moved = 2 * x.element_size()
    return [
        *copies(x),
        Provider(
            "hdrq, with its histogram",
            lambda: hdrq.ops.noise_quantize(x, s, QMIN, QMAX, rng, noise="empirical"),
            moved + x.element_size(),
        ),
        Provider("official formula, eager", lambda: official(x, s), moved),
        *kernel_alone(x, s, QMIN, QMAX, rng, OPS.error_histogram(x, s, QMIN, QMAX)),
    ]


def backward(x: torch.Tensor, s: torch.Tensor, rng: torch.Tensor) -> list[Provider]:
    grad, n = normal(x.shape, x.device, x.dtype, seed=1), torch.rand_like(x) - 0.5
    moved = 3 * x.element_size()
    return [
        *copies(x),
        Provider("hdrq", lambda: OPS.noise_quantize_backward(grad, x, s, QMIN, QMAX, rng), moved),
        Provider("official, closed form, eager", lambda: plain_backward(grad, x, s, n), moved + n.element_size()),
        Provider("torch.compile", compiled(plain_backward, grad, x, s, n), moved + n.element_size()),
    ]


def inputs(shape: tuple[int, ...], device: str, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return normal(shape, device, dtype), torch.full((1,), 0.3, device=device), hdrq.rng_state(1, device=device)


BENCH = Bench(
    "noise_quantize",
    inputs,
    verify,
    {"forward, uniform": uniform, "forward, empirical": empirical, "backward": backward},
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
)
