"""The mean of models in full precision."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn

from hdrq import checks
from hdrq.checkpoint.states import tensors_of
from hdrq.quantizers.layers import input_quantizers
from hdrq.quantizers.modules import mean_range


@torch.no_grad()
def average(
    models: Sequence[nn.Module], weights: Sequence[float] | None = None, *, extrapolate: bool = False
) -> nn.Module:
    """The plain weighted average of models, parameters and buffers: what a merge aims at, in full precision.

    Raises:
        TypeError, ValueError: "X must be …, got …"; negative weights without ``extrapolate``; models of different
            architectures.
    """
    models = list(models)
    checks.integer("the number of models", len(models), 1, 64)
    lam = checks.mixing_weights(weights, len(models), extrapolate)
    shapes = [{name: tuple(value.shape) for name, value in tensors_of(model).items()} for model in models]
    for k, other in enumerate(shapes):
        if other != shapes[0]:
            wrong = sorted(name for name, _ in other.items() ^ shapes[0].items())
            raise ValueError(f"models must have one architecture, got number {k} different in {checks.listed(wrong)}")
    merged = copy.deepcopy(models[0])
    states = [tensors_of(model) for model in models]
    for name, value in tensors_of(merged).items():
        if value.is_floating_point():
            value.copy_(weighted_mean(lam, [state[name] for state in states]))
    own = [list(input_quantizers(model).values()) for model in models]
    for target, *quantizers in zip(input_quantizers(merged).values(), *own, strict=True):
        scales, ranges = zip(*((float(q.scale), (q.qmin, q.qmax)) for q in quantizers), strict=True)
        target.qmin, target.qmax = mean_range(lam, scales, ranges, ranges[0][1] - ranges[0][0] + 1)
    return merged


def weighted_mean(weights: Sequence[float], values: Sequence[torch.Tensor]) -> torch.Tensor:
    """``Σ λ_k·x_k`` in float64; an x of weight 0 may be anything, infinity too."""
    terms = (w * value.double() for w, value in zip(weights, values, strict=True) if w)
    return sum(terms, torch.zeros_like(values[0], dtype=torch.float64))
