"""How far models are from one another: their weights, whole and layer by layer, as integers and as real numbers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import torch
from torch import nn

from hdrq import checks
from hdrq.evaluate.weights import Weight, weights_of

ALL = "all layers"


class Distance(NamedTuple):
    """How far apart two models' weights are, in one layer or in all."""

    first: int  # which models, by their place
    second: int
    layer: str  # "all layers" for the whole
    distance: float  # ‖w_i − w_j‖₂ of the dequantized weights
    relative: float  # the same, over ½·(‖w_i‖₂ + ‖w_j‖₂)
    integers: float | None  # root mean square of the difference of integers, zero points subtracted
    changed: float | None  # share of the integers that differ


@torch.no_grad()
def distances(models: Sequence[nn.Module]) -> list[Distance]:
    """Distances between the weights of every pair of models: of each layer, then of all layers together.

    ``relative`` of a layer of two quantized models is what :func:`hdrq.merging.files.readiness` calls distance.
    Integers are compared where both models have them, in layers that have them: the steps of one are not those of the
    other unless their scales are equal. Sums are float64.

    Args:
        models: two or more with the same layers, quantized or in full precision, such as a source whose BatchNorm is
            folded.

    Raises:
        ValueError: "X must be …, got …".
    """
    if len(models) < 2:
        raise ValueError(f"models must be two or more, got {len(models)}")
    own = [weights_of(model) for model in models]
    shapes = [{name: tuple(weight.value.shape) for name, weight in each.items()} for each in own]
    for k, other in enumerate(shapes):
        if wrong := sorted({name for name, _ in other.items() ^ shapes[0].items()}):
            raise ValueError(f"models must have the same layers, got number {k} different in {checks.listed(wrong)}")
    found = []
    for i, j in combinations(range(len(models)), 2):
        sums = {name: _sums(own[i][name], own[j][name]) for name in own[0]}
        found += [_distance(i, j, name, each) for name, each in sums.items()]
        found.append(_distance(i, j, ALL, torch.stack([*sums.values()]).sum(0)))
    return found


def _sums(a: Weight, b: Weight) -> torch.Tensor:
    """``‖w_a − w_b‖², ‖w_a‖², ‖w_b‖², ‖I_a − I_b‖²``, how many integers differ, and how many there are."""
    (x, i), (y, j) = _values(a), _values(b)
    squares = [v.square().sum() for v in (x - y.to(x.device), x, y)]
    none = torch.zeros((), dtype=torch.float64)
    apart = [none] * 3
    if i is not None and j is not None:
        j = j.to(i.device)
        apart = [(i - j).square().sum(), (i != j).sum(), torch.tensor(i.numel())]
    return torch.stack([v.double().cpu() for v in (*squares, *apart)])


def _values(weight: Weight) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The dequantized weight, and the integers less their zero points: float64."""
    quantizer = weight.quantizer
    if quantizer is None:
        return weight.value.double(), None
    codes = quantizer.codes(quantizer.rounded(weight.value))
    zero = 0 if quantizer.zero_point is None else quantizer.broadcast(quantizer.zero_point, weight.value).double()
    return quantizer.values(codes).double(), codes.double() - zero


def _distance(first: int, second: int, layer: str, sums: torch.Tensor) -> Distance:
    apart, x, y, integers, changed, count = sums.tolist()
    norms = (x**0.5 + y**0.5) / 2
    integer = ((integers / count) ** 0.5, changed / count) if count else (None, None)
    return Distance(first, second, layer, apart**0.5, apart**0.5 / norms if norms else 0.0, *integer)
