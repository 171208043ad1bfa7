"""The integers of a quantized model, as tensors."""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import nn

from hdrq.merging.models import states_of
from hdrq.merging.sources import opened
from hdrq.merging.weights import Weights


class IntegerWeight(NamedTuple):
    """A quantized weight, ``w = (codes − zero_point)·scale``."""

    codes: torch.Tensor  # int8, or int16 beyond 8 bits, in the weight's shape
    scale: torch.Tensor  # float32: one element, one for each index of ``axis``, or one for each group
    zero_point: torch.Tensor | None  # integers in float32, as many as scales; None for 0
    qmin: int
    qmax: int
    axis: int | None  # along which scales vary; None for one scale, or for groups
    group_size: int | None  # neighbours along the last axis that share a scale
    order: torch.Tensor | None  # codes[:, j] is the weight's column order[j]; None where they are in order


def integers(model: nn.Module | str | os.PathLike) -> dict[str, IntegerWeight]:
    """The integers of every quantized weight, by the name of its layer, in the order of names; a weight that layers
    share is there once, under the first.

    :func:`hdrq.ops.dequantize` makes the weight of them: ``w = dequantize(codes, scale, zero_point=…, axis=…,
    group_size=…)``; where there is an ``order``, as GPTQ's act-order leaves it, that is ``weight[:, order]``. All are
    copies on the CPU.

    Args:
        model: a result of :func:`hdrq.quantize` and its like, a file of :func:`hdrq.save`, a folder of GPTQ, AWQ or
            compressed-tensors, or an ONNX file. Of files that are too large for memory, read one layer after another
            with :class:`hdrq.checkpoint.format.Reader`.

    Raises:
        TypeError, ValueError: it is none of these, or broken.
        FileNotFoundError: no such file.
    """
    with ExitStack() as stack:
        source = opened(model, stack) if isinstance(model, str | os.PathLike) else states_of([model])[0]
        weights = Weights(source)
        return {layer: _weight(weights, name) for name, layer in sorted(weights.layers.items())}


def _weight(weights: Weights, name: str) -> IntegerWeight:
    found = weights.quantized(name)
    facts: dict[str, Any] = dict(found.facts)
    (low, high), zero = facts["range"], found.zero_point
    codes, zero = found.codes.view(facts["shape"]).clone(), None if zero is None else zero.float()
    return IntegerWeight(
        codes, found.scale.clone(), zero, low, high, facts["axis"], facts.get("group_size"), found.order
    )
