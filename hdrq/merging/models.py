"""Merging quantized models in memory."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from hdrq.checkpoint.loading import assign
from hdrq.checkpoint.saving import state_of
from hdrq.merging.assessment import LOOKED_AT, LayerReadiness, Readiness, check_ready
from hdrq.merging.inputs import Inputs
from hdrq.merging.manifest import merged_manifest
from hdrq.merging.settings import MergeSettings
from hdrq.merging.sources import Source, State
from hdrq.merging.tensors import merged_tensors
from hdrq.quantizers.layers import quantized_layers
from hdrq.quantizers.provenance import origin


@torch.no_grad()
def merge(models: Sequence[nn.Module], **options: Any) -> nn.Module:
    """Average quantized models into one, with no data and no training; only integers, scales and biases are read.

    Each weight is merged by :func:`hdrq.ops.merge`, layer by layer. Scales of activations, biases and every other
    floating-point parameter and buffer are averaged with the same weights λ, in float64, and rounded once. A range with
    a zero point lies where the merged values do. Integer buffers must agree; BatchNorm's count of batches need not.

    Args:
        models: two or more results of :func:`hdrq.quantize`, of one architecture; left as they are. They may differ
            in bits if ``bits`` says those of the result.
        options: ``preset``, and the fields of :class:`hdrq.merging.settings.MergeSettings`: ``weights``, ``rule``,
            ``tau``, ``draws``, ``seed``, ``noise``, ``select``, ``mode``, ``extrapolate``, ``bits``. Without any,
            equal weights and systematic rounding. ``preset="paper"`` is what the paper does: rule ``"noise"`` for two
            models, rounding to nearest for more; ``"official"`` what its released code does, for two models: noise
            where the integers' sum is odd, 100 draws, its own choice among them; ``docs/official-merge.md`` says what
            it does not copy. Options given besides a preset win.

    Returns:
        A model of the class of the first. A warning says where the models are too far apart to be averaged
        (:func:`hdrq.merging.readiness`).

    Raises:
        TypeError, ValueError: "X must be …, got …"; models that differ are refused with what differs.
    """
    if isinstance(models, nn.Module) or not isinstance(models, Iterable):
        raise TypeError(f"models must be a list of quantized models, got {type(models).__name__}")
    models = list(models)
    states = states_of(models)
    settings = MergeSettings.of(len(models), **options)
    inputs = Inputs(states, settings)
    merged = copy.deepcopy(models[0])
    check_ready(fill(merged, inputs, settings), "warn")
    return merged


@torch.no_grad()
def fill(model: nn.Module, inputs: Inputs, settings: MergeSettings) -> Readiness:
    """Put a merge into a model of that structure, in place of all that it holds; how ready the models were for it."""
    manifest = merged_manifest(inputs, settings)
    layers: list[LayerReadiness] = []
    tensors = dict(merged_tensors(inputs, settings, report=layers, at_most=LOOKED_AT))
    assign(model, manifest, tensors, tensors.__getitem__)
    return Readiness(tuple(layers))


def states_of(models: Sequence[Any]) -> list[Source]:
    """Quantized models as their files would be.

    Raises:
        TypeError: something is no module.
        ValueError: a model is not quantized, or a weight of it is broken.
    """
    for k, model in enumerate(models):
        if not isinstance(model, nn.Module):
            raise TypeError(f"models must be torch.nn.Modules, got {type(model).__name__} as number {k}")
        if not quantized_layers(model) or not origin(model):
            raise ValueError(
                f"models must be results of hdrq.quantize, got a plain {type(model).__name__} as number {k}"
            )
    states: list[Source] = []
    for k, model in enumerate(models):
        try:
            states.append(State(*state_of(model)))
        except ValueError as error:
            raise ValueError(f"{error}, in number {k}") from error
    return states
