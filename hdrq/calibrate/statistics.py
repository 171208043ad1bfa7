"""Second moments of what layers read, kept with a quantized model: what a later merge needs in place of data."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from hdrq import checks
from hdrq.calibrate.data import Call
from hdrq.calibrate.moments import Moments, MomentsInTurn
from hdrq.calibrate.ranks import ALONE, Ranks
from hdrq.quantizers.layers import quantized_layers
from hdrq.quantizers.provenance import Statistics

ITERATIONS, MORE = 4, 8  # of subspace iteration, and vectors beyond the rank that it is done with


def check_rank(value: Any) -> int | None:
    """The rank that ``statistics`` asks for; None for whole moments.

    Raises:
        TypeError, ValueError: it is neither True nor a rank.
    """
    return None if value is True else checks.integer("statistics", value, 1, 2**16)


def collect(model: nn.Module, calls: list[Call], rank: int | None, ranks: Ranks = ALONE) -> dict[str, Statistics]:
    """The statistics of each weight of a quantized model, by the layer that has it: behind all that is quantized.

    Layers that share a weight have the sum of their moments. A weight of which one of them has none has none.
    ``calls`` are this rank's; ``rank`` is that of a sketch.
    """
    readers: dict[int, list[str]] = {}
    for name, layer in quantized_layers(model).items():
        readers.setdefault(id(layer.latent), []).append(name)
    turns = MomentsInTurn(model, calls, [name for names in readers.values() for name in names], ranks)
    found = {}
    for names in readers.values():
        parts = [turns.of(name) for name in names]
        if all(part is not None for part in parts):
            first, *others = cast(list[Moments], parts)
            for other in others:
                first.add(other)
            found[names[0]] = compact(first, rank)
    return found


def compact(moments: Moments, rank: int | None) -> Statistics:
    """Moments as a file holds them; a sketch where that is smaller."""
    sums = cast(torch.Tensor, moments.sums)
    scatter = moments.hessian - sums[..., None] * sums[:, None] / moments.rows
    inputs = scatter.shape[-1]
    facts = {"rows": moments.rows, "groups": len(scatter), "inputs": inputs, "transposed": moments.transposed}
    tensors = {"sums": sums}
    if rank is None or 2 * (rank + 1) > inputs:
        rows, columns = torch.tril_indices(inputs, inputs)
        tensors["scatter"] = scatter[:, rows, columns]
    else:
        factor = _factor(scatter, rank)
        facts["rank"] = rank
        tensors["factor"] = factor
        tensors["diagonal"] = (scatter.diagonal(dim1=1, dim2=2) - factor.square().sum(2)).clamp(min=0)
    return Statistics(facts, {name: value.float().cpu().contiguous() for name, value in tensors.items()})


def expanded(statistics: Statistics) -> Moments:
    """The inverse of :func:`compact`, to its rounding and its rank; in float64."""
    facts, tensors = statistics
    wide = {name: value.double() for name, value in tensors.items()}
    if "factor" in wide:
        scatter = wide["factor"] @ wide["factor"].mT + torch.diag_embed(wide["diagonal"])
    else:
        inputs = facts["inputs"]
        rows, columns = torch.tril_indices(inputs, inputs)
        scatter = wide["scatter"].new_zeros(facts["groups"], inputs, inputs)
        scatter[:, rows, columns] = wide["scatter"]
        scatter = scatter + scatter.tril(-1).mT
    sums = wide["sums"]
    hessian = scatter + sums[..., None] * sums[:, None] / facts["rows"]
    return Moments(hessian, facts["transposed"], facts["rows"], sums)


def _factor(scatter: torch.Tensor, rank: int) -> torch.Tensor:
    """F of the best ``F·Fᵀ`` of a rank, up to subspace iteration: (groups, K, rank)."""
    inputs = scatter.shape[-1]
    shape = (inputs, min(rank + MORE, inputs))
    start = torch.randn(shape, dtype=scatter.dtype, generator=torch.Generator().manual_seed(0))
    basis = start.to(scatter.device).expand(len(scatter), -1, -1)
    for _ in range(ITERATIONS):
        basis, _ = torch.linalg.qr(scatter @ basis)
    inside = basis.mT @ scatter @ basis
    values, vectors = torch.linalg.eigh((inside + inside.mT) / 2)
    return basis @ (vectors * values.clamp(min=0).sqrt()[:, None])[..., -rank:]
