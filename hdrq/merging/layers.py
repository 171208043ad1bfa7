"""Merging one layer: its codes and scales in every model, by noise-sampled rounding or by a fixed rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hdrq import ops
from hdrq.checkpoint.format import packs
from hdrq.merging.assessment import LayerReadiness, examine
from hdrq.merging.rules import RuleMerge, merge_rule
from hdrq.merging.settings import MergeSettings
from hdrq.ops import MergedTensor
from hdrq.rng import rng_state


@dataclass(frozen=True)
class LayerInputs:
    """A layer's quantized weight in every model, and what is the same in all of them."""

    name: str
    index: int  # in the order of names, which chooses the stream of noise
    codes: list[torch.Tensor]  # as a file has them: two to a byte, where the range allows it
    scales: list[torch.Tensor]
    zero_points: list[torch.Tensor] | None
    qmin: int
    qmax: int
    axis: int | None
    shape: Sequence[int]

    @property
    def packed(self) -> bool:
        return packs(self.qmin, self.qmax)


def merge_layer(layer: LayerInputs, weights: Sequence[float], settings: MergeSettings) -> RuleMerge:
    """The merged codes, as a file has them, with their scale and zero point."""
    if settings.rule == "noise":
        return RuleMerge.of(merge_by_noise(layer, weights, settings))
    return merge_by_rule(layer, weights, settings.rule)


def merge_by_noise(layer: LayerInputs, weights: Sequence[float], settings: MergeSettings) -> MergedTensor:
    """The merged weight by noise-sampled rounding, whatever the rule of ``settings``."""
    return ops.merge(
        layer.codes,
        layer.scales,
        layer.qmin,
        layer.qmax,
        rng_state(settings.seed, stream=64 * layer.index, device=layer.codes[0].device),
        weights=weights,
        draws=settings.draws,
        noise=settings.noise,
        axis=layer.axis,
        select=settings.select,
        mode=settings.mode,
        zero_points=layer.zero_points,
        shape=layer.shape,
        packed=layer.packed,
        extrapolate=settings.extrapolate,
    )


def merge_by_rule(layer: LayerInputs, weights: Sequence[float], rule: str) -> RuleMerge:
    """The merged weight by one of :data:`hdrq.merging.rules.RULES`, its codes as a file has them."""
    codes = [
        ops.unpack(stored, layer.shape, signed=layer.qmin < 0) if layer.packed else stored for stored in layer.codes
    ]
    options: dict[str, Any] = {"weights": weights, "zero_points": layer.zero_points, "axis": layer.axis}
    merged = merge_rule(codes, layer.scales, layer.qmin, layer.qmax, rule, **options)
    return merged._replace(codes=ops.pack(merged.codes)) if layer.packed else merged


def layer_readiness(layer: LayerInputs, weights: Sequence[float], merged: MergedTensor) -> LayerReadiness:
    """How well :func:`merge_by_noise` merged a layer."""
    return examine(
        layer.name,
        merged,
        layer.codes,
        layer.scales,
        layer.qmin,
        layer.qmax,
        weights=weights,
        axis=layer.axis,
        zero_points=layer.zero_points,
        shape=layer.shape,
    )
