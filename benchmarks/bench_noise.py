"""Noise in place of rounding, forward and backward: ``python benchmarks/bench_noise.py --out benchmarks/results/NAME``.

The limit is a copy: into memory that exists (``copy_``), or into new memory (``clone``), whose pages the first touch
pays for, as it does for the result of any op. Each provider is compared with the copy of its kind.
"""

from __future__ import annotations

from functools import partial

import torch
from harness import Provider, bench, compiled, normal

import hdrq

QMIN, QMAX = -8, 7
OPS = torch.ops.hdrq


def official(x: torch.Tensor, s: torch.Tensor, empirical: bool = True) -> torch.Tensor:
    """The eager formula as the method's released code computes it, from its description (METHOD: presets, facts).

    Quantize; take the error of the unclipped elements in steps, by boolean indexing; count it in 256 bins; draw a bin
    for each element with ``multinomial``, and a place inside the bin; add, and set what is clipped to its bound.
    """
    v = x / s
    clipped_high, clipped_low = x >= QMAX * s, x <= QMIN * s
    inside = ~(clipped_high | clipped_low)
    if empirical:
        error = (v.round().clamp(QMIN, QMAX) - v)[inside]
        counts = torch.histc(error, 256, -0.5, 0.5)
        bins = torch.multinomial(counts, x.numel(), replacement=True)
        n = ((bins + torch.rand(x.numel(), device=x.device)) / 256 - 0.5).view_as(x)
    else:
        n = torch.rand_like(x) - 0.5
    y = x + n * s
    y[clipped_high] = (QMAX * s).item()
    y[clipped_low] = (QMIN * s).item()
    return y


def plain(x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """The uniform formula as one would write it for a compiler."""
    y = x + (torch.rand_like(x) - 0.5) * s
    return torch.where(x >= QMAX * s, QMAX * s, torch.where(x <= QMIN * s, QMIN * s, y))


def plain_backward(grad: torch.Tensor, x: torch.Tensor, s: torch.Tensor, n: torch.Tensor) -> tuple:
    """The closed form of both gradients, with the noise stored."""
    high, low = x >= QMAX * s, x <= QMIN * s
    inside = ~(high | low)
    slope = torch.where(inside, n, torch.where(high, QMAX, QMIN))
    return grad * inside, (grad * slope).sum()


def verify(x: torch.Tensor, s: torch.Tensor, rng: torch.Tensor) -> None:
    """The op's bits are the reference's, and the formulas compared agree with it where noise plays no part."""
    few = x[: 2**14]
    for noise in ("uniform", "empirical"):
        y = hdrq.ops.noise_quantize(few, s, QMIN, QMAX, rng, noise=noise)
        with hdrq.use_backend("reference"):
            expected = hdrq.ops.noise_quantize(few, s, QMIN, QMAX, rng, noise=noise)
        if not torch.equal(y, expected):
            raise SystemExit(f"{noise} noise differs from the reference: not timed")
    for formula in (official, plain):
        y = formula(few, s)
        clipped = (few >= QMAX * s) | (few <= QMIN * s)
        if not torch.equal(y[clipped], few.clamp(QMIN * s, QMAX * s)[clipped]) or (y - few)[~clipped].abs().max() > s:
            raise SystemExit(f"the formula {formula.__name__} is not noise_quantize: not timed")


def forward(x: torch.Tensor, s: torch.Tensor, rng: torch.Tensor) -> list[Provider]:
    y = torch.empty_like(x).copy_(x)
    providers = [
        Provider("copy into existing memory", lambda: y.copy_(x), 8, allocates=False),
        Provider("clone", x.clone, 8),
        Provider("hdrq uniform", lambda: hdrq.ops.noise_quantize(x, s, QMIN, QMAX, rng), 8),
        Provider(
            "hdrq empirical, with its histogram",
            lambda: hdrq.ops.noise_quantize(x, s, QMIN, QMAX, rng, noise="empirical"),
            12,
        ),
        Provider("official empirical, eager", lambda: official(x, s), 8),
        Provider("uniform, eager", lambda: official(x, s, empirical=False), 8),
        Provider("uniform, torch.where", lambda: plain(x, s), 8),
    ]
    if fast := compiled(plain, x, s):
        providers.append(Provider("uniform, torch.compile", lambda: fast(x, s), 8))
    if x.device.type == "cpu" and hdrq.backends()["cpp"] is None:
        from hdrq import native

        on, job = native.grid(x, s, None, QMIN, QMAX, None), native.job(x)
        cumulative = OPS.error_histogram(x, s, QMIN, QMAX)
        for name, counts in (("uniform", None), ("empirical", cumulative)):
            args = (job, 0, x.data_ptr(), y.data_ptr(), on, rng.data_ptr(), native.address(counts))
            providers.append(
                Provider(f"hdrq {name}, kernel alone", partial(_kernel_alone, args, counts), 8, allocates=False)
            )
    return providers


def _kernel_alone(args: tuple, counts: torch.Tensor | None) -> None:
    """The kernel into memory that exists; ``counts`` is here to outlive the addresses in ``args``."""
    from hdrq import _C

    _C.noise_quantize(*args)


def backward(x: torch.Tensor, s: torch.Tensor, rng: torch.Tensor) -> list[Provider]:
    y, grad, n = torch.empty_like(x).copy_(x), torch.randn_like(x), torch.rand_like(x) - 0.5
    providers = [
        Provider("copy into existing memory", lambda: y.copy_(x), 8, allocates=False),
        Provider("clone", x.clone, 8),
        Provider("hdrq", lambda: OPS.noise_quantize_backward(grad, x, s, QMIN, QMAX, rng), 12),
        Provider("official, eager closed form", lambda: plain_backward(grad, x, s, n), 16),
    ]
    if fast := compiled(plain_backward, grad, x, s, n):
        providers.append(Provider("torch.compile", lambda: fast(grad, x, s, n), 16))
    return providers


if __name__ == "__main__":
    bench(
        "noise_quantize",
        lambda size, device: (
            normal(size, device),
            torch.full((1,), 0.3, device=device),
            hdrq.rng_state(1, device=device),
        ),
        verify,
        {"forward": forward, "backward": backward},
    )
