"""How a quantized model was made, and what its layers read: facts that stay with it and go into its file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn


class Statistics(NamedTuple):
    """The second moments of what a layer reads, as a file holds them: facts for its manifest, and float32 tensors.

    ``sums`` has those of the inputs, (groups, K). ``scatter`` has the lower triangles of ``S = H − sums·sumsᵀ/rows``,
    the second moments about the mean, (groups, K·(K + 1)/2). In its place a sketch of rank r has ``factor``,
    (groups, K, r), and ``diagonal``, (groups, K): ``S ≈ F·Fᵀ + diag(d)``, whose diagonal is that of S.
    """

    facts: dict[str, Any]
    tensors: dict[str, torch.Tensor]


def origin(model: nn.Module) -> dict:
    """How a quantized model was made, as its checkpoint's manifest says it."""
    return model.__dict__.get("hdrq_origin", {})


def set_origin(model: nn.Module, facts: dict) -> None:
    """Say how a model was made."""
    model.__dict__["hdrq_origin"] = facts


def statistics_of(model: nn.Module) -> Mapping[str, Statistics]:
    """What the layers of a model read, by the layer that has the weight; empty where it was not asked for."""
    return model.__dict__.get("hdrq_statistics", {})


def set_statistics(model: nn.Module, statistics: Mapping[str, Statistics]) -> None:
    """Keep what the layers of a model read; nothing, where it is not the model any more of which that was measured."""
    model.__dict__["hdrq_statistics"] = statistics
