"""Merging one layer: its codes and scales in every model, by one of the rules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch

from hdrq import ops
from hdrq.checkpoint.format import packs
from hdrq.merging import rules
from hdrq.merging.assessment import LayerReadiness, examine
from hdrq.merging.settings import MergeSettings
from hdrq.ops import MergedTensor
from hdrq.rng import rng_state


@dataclass(frozen=True)
class LayerInputs:
    """A layer's quantized weight in every model, and the merged range; groups that share a scale are rows."""

    name: str
    index: int  # in the order of names, which chooses the random stream
    codes: list[torch.Tensor]  # as a file has them: two to a byte, where the range allows it
    scales: list[torch.Tensor]
    zero_points: list[torch.Tensor] | None
    ranges: list[tuple[int, int]]
    qmin: int
    qmax: int
    axis: int | None
    shape: Sequence[int]
    weights: Sequence[float]  # λ of each model

    @property
    def packed(self) -> bool:
        return packs(self.qmin, self.qmax)


def merge_layer(layer: LayerInputs, settings: MergeSettings) -> MergedTensor:
    """The merged codes, as a file has them, with their scale and zero point."""
    grid = (layer.scales, layer.qmin, layer.qmax)
    options: dict[str, Any] = {"weights": layer.weights, "zero_points": layer.zero_points, "ranges": layer.ranges}
    options |= {"axis": layer.axis, "extrapolate": settings.extrapolate}
    if settings.rule in rules.RULES:
        merged = rules.merge_rule(_plain(layer), *grid, settings.rule, **options)
        return merged._replace(codes=ops.pack(merged.codes)) if layer.packed else merged
    names = ("rule", "tau", "draws", "noise", "select", "mode")
    options |= {name: getattr(settings, name) for name in names}
    rng = rng_state(settings.seed, stream=64 * layer.index, device=layer.codes[0].device)
    return ops.merge(layer.codes, *grid, rng, shape=layer.shape, packed=layer.packed, **options)


def _plain(layer: LayerInputs) -> list[torch.Tensor]:
    """Codes that are not packed."""
    return [
        ops.unpack(codes, layer.shape, signed=low < 0) if codes.dtype == torch.uint8 else codes
        for codes, (low, _) in zip(layer.codes, layer.ranges, strict=True)
    ]


def layer_readiness(layer: LayerInputs, merged: MergedTensor, at_most: int | None = None) -> LayerReadiness:
    """How well :func:`merge_layer` merged a layer, as about ``at_most`` of its weights say: rows, evenly spaced."""
    elements = prod(layer.shape)
    if at_most is not None and elements >= 2 * at_most:
        layer, merged = _some_rows(layer, merged, elements // at_most)
    found = examine(
        layer.name,
        merged,
        layer.codes,
        layer.scales,
        layer.qmin,
        layer.qmax,
        weights=layer.weights,
        axis=layer.axis,
        zero_points=layer.zero_points,
        ranges=layer.ranges,
        shape=layer.shape,
    )
    return replace(found, elements=elements)


def _some_rows(layer: LayerInputs, merged: MergedTensor, every: int) -> tuple[LayerInputs, MergedTensor]:
    """Every so many rows of a layer and of its merge, before anything is unpacked.

    All of them where channels do not lie along the first axis, or a row ends within a byte.
    """
    rows, columns = layer.shape[0], prod(layer.shape[1:])
    by_row = layer.axis is not None and layer.axis % len(layer.shape) == 0
    if not (by_row or layer.axis is None) or columns % 2:
        return layer, merged
    chosen = slice(every // 2 % rows, None, every)

    def codes(value: torch.Tensor) -> torch.Tensor:
        found = value.reshape(rows, -1)[chosen]
        return found.flatten() if value.dtype == torch.uint8 else found

    def grid(value: torch.Tensor) -> torch.Tensor:
        return value[chosen] if by_row else value

    zeros = layer.zero_points
    part = replace(
        layer,
        codes=[codes(each) for each in layer.codes],
        scales=[grid(each.flatten()) for each in layer.scales],
        zero_points=None if zeros is None else [grid(each.flatten()) for each in zeros],
        axis=0 if by_row else None,
        shape=(len(range(rows)[chosen]), columns),
    )
    own = {"scale": grid(merged.scale), "zero_point": grid(merged.zero_point)}
    return part, merged._replace(codes=codes(merged.codes), **own)
