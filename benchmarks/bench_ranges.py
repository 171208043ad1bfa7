"""The search for a scale: per tensor, per channel, and with a zero point at 8 bits (25,600 pairs).

The eager search passes over the tensor once for each candidate. For all pairs that takes minutes where a tensor is not
small, so there it is timed on 100 of them: its speed-up is over 100 passes, not over the 25,600 that would be needed.
"""

from __future__ import annotations

import torch

import hdrq
from hdrq.benchmarks.harness import Bench, Mismatch, Provider, copies, normal

QMIN, QMAX = -8, 7
NORM, CANDIDATES = 2.4, 100
SMALL = 2**12  # elements up to which the eager search tries every pair
LARGE = 2**22  # elements beyond which it is timed per tensor alone: it takes many seconds each time


def official(x: torch.Tensor, qmin: int, qmax: int, extent: torch.Tensor, zeros: range, dims: tuple) -> tuple:
    """The eager search as the released code makes it, from its description: keep what is better, pass by pass."""
    best = torch.full_like(extent, torch.inf)
    scale, zero_point = torch.ones_like(extent), torch.zeros_like(extent)
    for i in range(1, CANDIDATES + 1):
        s = extent * (i / CANDIDATES) / ((qmax - qmin) / 2)
        for z in zeros:
            y = ((x / s).round().add(z).clamp(qmin, qmax) - z) * s
            error = (y - x).abs().pow(NORM).mean(dims, keepdim=True)
            better = error < best
            best, scale = torch.where(better, error, best), torch.where(better, s, scale)
            zero_point = torch.where(better, float(z), zero_point)
    return scale, zero_point


def official_symmetric(x: torch.Tensor) -> torch.Tensor:
    dims = tuple(range(x.ndim))
    return official(x, QMIN, QMAX, x.abs().amax(dims, keepdim=True), range(1), dims)[0].flatten()


def official_channels(x: torch.Tensor) -> torch.Tensor:
    dims = tuple(range(1, x.ndim))
    return official(x, QMIN, QMAX, x.abs().amax(dims, keepdim=True), range(1), dims)[0].flatten()


def official_affine(x: torch.Tensor, zeros: range) -> tuple:
    dims = tuple(range(x.ndim))
    half = (x.amax(dims, keepdim=True).clamp(min=0) - x.amin(dims, keepdim=True).clamp(max=0)) / 2
    return tuple(found.flatten() for found in official(x, 0, 255, half, zeros, dims))


def verify(x: torch.Tensor) -> None:
    """What is found leaves an error within 1e-5 of the least that the eager search finds."""

    def check(what, x, qmin, qmax, found, best, axis=None):
        errors = []
        for scale, zero_point in (found, best):
            y = hdrq.ops.fake_quantize(x, scale, qmin, qmax, zero_point=zero_point, axis=axis)
            terms = (y - x).double().abs() ** NORM
            errors.append(terms.sum() if axis is None else terms.flatten(1).sum(1))
        if not (errors[0] <= errors[1] * (1 + 1e-5)).all():
            raise Mismatch(f"{what} leaves a larger error than the eager search")

    x = x.flatten()[: 2**18]
    few, rows = x[:64], _channels(x)
    check("search_scale", x, QMIN, QMAX, (hdrq.ops.search_scale(x, QMIN, QMAX), None), (official_symmetric(x), None))
    found, best = hdrq.ops.search_scale(rows, QMIN, QMAX, axis=0), official_channels(rows)
    check("search_scale per channel", rows, QMIN, QMAX, (found, None), (best, None), axis=0)
    check("search_affine", few, 0, 255, hdrq.ops.search_affine(few, 0, 255), official_affine(few, range(256)))


def symmetric(x: torch.Tensor) -> list[Provider]:
    return _providers(x, lambda: hdrq.ops.search_scale(x, QMIN, QMAX), lambda: official_symmetric(x))


def per_channel(x: torch.Tensor) -> list[Provider]:
    rows = _channels(x)
    theirs = None if x.numel() > LARGE else lambda: official_channels(rows)
    return _providers(x, lambda: hdrq.ops.search_scale(rows, QMIN, QMAX, axis=0), theirs)


def affine(x: torch.Tensor) -> list[Provider]:
    zeros, passes = (range(256), "25,600") if x.numel() <= SMALL else (range(1), "only 100 of 25,600")
    theirs = None if x.numel() > LARGE else lambda: official_affine(x, zeros)
    return _providers(x, lambda: hdrq.ops.search_affine(x, 0, 255), theirs, passes)


def _providers(x, ours, theirs, passes: str = "100") -> list[Provider]:
    read = x.element_size()
    providers = [*copies(x), Provider("hdrq", ours, read, allocates=False)]
    if theirs is not None:
        providers.append(Provider(f"official, eager, {passes} passes", theirs, read, allocates=False))
    return providers


def _channels(x: torch.Tensor) -> torch.Tensor:
    """A layer's own channels; of a flat tensor 4, so that each is long where it is."""
    return x if x.ndim > 1 else x[: x.numel() // 4 * 4].view(4, -1)


def inputs(shape: tuple[int, ...], device: str, dtype: torch.dtype) -> tuple[torch.Tensor]:
    return (normal(shape, device, dtype),)


BENCH = Bench("search", inputs, verify, {"symmetric": symmetric, "per channel": per_channel, "affine, 8 bits": affine})
