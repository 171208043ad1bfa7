"""The tensors of a merged model, one after another: layers in the order of their names, then everything else."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from hdrq.merging.assessment import LayerReadiness
from hdrq.merging.inputs import Inputs
from hdrq.merging.layers import layer_readiness, merge_by_noise, merge_layer
from hdrq.merging.rules import RuleMerge
from hdrq.merging.settings import MergeSettings

Progress = Callable[[int, int, str], None]  # layers done, of how many, and the name of the next


def no_progress(done: int, total: int, name: str) -> None:
    """Show nothing."""


def merged_tensors(
    inputs: Inputs,
    settings: MergeSettings,
    progress: Progress = no_progress,
    report: list[LayerReadiness] | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the merged model, with its name.

    Args:
        progress: is called before every layer.
        report: a list that gets the readiness of every layer; only with noise-sampled rounding.
    """
    rest = dict.fromkeys(inputs.specs)
    for number, name in enumerate(inputs.layers):
        progress(number, len(inputs.layers), name)
        codes, scale, zero_point = _merged_layer(inputs, settings, name, report)
        for part, value in (("codes", codes), ("scale", scale), ("zero_point", zero_point.to(torch.int32))):
            if f"{name}.weight.{part}" in rest:  # not every layer has zero points
                del rest[f"{name}.weight.{part}"]
                yield f"{name}.weight.{part}", value
    for name in rest:
        yield name, inputs.mean(name)


def _merged_layer(inputs: Inputs, settings: MergeSettings, name: str, report: list[LayerReadiness] | None) -> RuleMerge:
    """The merged weight of a layer; when this returns, the models' own are not held any more."""
    layer = inputs.layer(name)
    if report is None:
        return merge_layer(layer, inputs.weights, settings)
    merged = merge_by_noise(layer, inputs.weights, settings)
    report.append(layer_readiness(layer, inputs.weights, merged))
    return RuleMerge.of(merged)
