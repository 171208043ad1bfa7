"""The tensors of a merged model, one after another: layers in the order of their names, then everything else."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import torch

from hdrq.merging.assessment import CLIPPED, LayerReadiness
from hdrq.merging.inputs import Inputs
from hdrq.merging.layers import layer_readiness, merge_layer
from hdrq.merging.settings import MergeSettings
from hdrq.ops import MergedTensor

Progress = Callable[[int, int, str], None]  # layers done, of how many, and the name of the next
Refine = Callable[[str, MergedTensor], tuple[MergedTensor, dict[str, torch.Tensor]]]


def no_progress(done: int, total: int, name: str) -> None:
    """Show nothing."""


def merged_tensors(
    inputs: Inputs,
    settings: MergeSettings,
    progress: Progress = no_progress,
    report: list[LayerReadiness] | None = None,
    at_most: int | None = None,
    refine: Refine | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the merged model, with its name.

    Args:
        progress: is called before every layer.
        report: a list that gets the readiness of every layer, by about ``at_most`` of its weights.
        refine: has the last word on a layer; of the rest it may give those tensors that it has another value for.
    """
    rest = dict.fromkeys(inputs.specs)
    replaced: dict[str, torch.Tensor] = {}
    for number, name in enumerate(inputs.layers):
        progress(number, len(inputs.layers), name)
        merged = _merged_layer(inputs, settings, name, report, at_most)
        if refine is not None:
            merged, more = refine(name, merged)
            replaced |= more
        parts = {"codes": merged.codes, "scale": merged.scale, "zero_point": merged.zero_point.to(torch.int32)}
        for part, value in parts.items():
            if f"{name}.weight.{part}" in rest:  # not every layer has zero points
                del rest[f"{name}.weight.{part}"]
                yield f"{name}.weight.{part}", value.view(inputs.specs[f"{name}.weight.{part}"][1])
    for name in rest:
        yield name, replaced[name] if name in replaced else inputs.mean(name)


def _merged_layer(
    inputs: Inputs, settings: MergeSettings, name: str, report: list[LayerReadiness] | None, at_most: int | None
) -> MergedTensor:
    """The merged weight of a layer; when this returns, the models' own are not held any more."""
    layer = inputs.layer(name)
    merged = merge_layer(layer, settings)
    may_clip = len(set(layer.ranges)) > 1 or min(layer.weights) < 0
    if report is not None or may_clip:
        found = layer_readiness(layer, merged, at_most if not may_clip else None)
        if may_clip and found.clipped > CLIPPED:
            warnings.warn(
                f"{name}: {found.clipped:.0%} of the merged weights are clipped to [{layer.qmin}, {layer.qmax}]; more "
                'bits or rule="requantize", which searches a range anew, may help',
                stacklevel=2,
            )
        if report is not None:
            report.append(found)
    return merged
