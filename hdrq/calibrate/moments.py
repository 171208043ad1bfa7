"""Second moments of what layers read, on calibration data."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import nn

from hdrq.calibrate.data import Call, run_all
from hdrq.calibrate.ranks import ALONE, Ranks
from hdrq.prepare.observe import observe
from hdrq.quantizers.attach import first_tensor

AT_ONCE = 2**24  # elements of X in float64
TOGETHER = 2**28  # elements of all H that are gathered in one run of the data: 2 GiB
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass
class Moments:
    """``H = XᵀX`` of a layer's inputs, over all samples and positions, in float64.

    X has a row for each output that a weight's row gives: of a convolution, the window that it reads.
    """

    hessian: torch.Tensor  # (groups, K, K)
    transposed: bool = False  # whether the weight has its inputs along its first axis
    rows: int = 0  # of X
    sums: torch.Tensor | None = None  # of X, (groups, K)
    magnitudes: torch.Tensor | None = None  # sums of |X|

    def matrices(self, weight: torch.Tensor) -> torch.Tensor:
        """A weight as (groups, N / groups, K), a view if it can be."""
        flat = weight.flatten(1).T if self.transposed else weight.flatten(1)
        return flat.reshape(len(self.hessian), -1, self.hessian.shape[-1])

    def add(self, other: Moments) -> None:
        """Count what another layer with the same weight reads, too."""
        self.hessian += other.hessian
        self.rows += other.rows
        for mine, more in ((self.sums, other.sums), (self.magnitudes, other.magnitudes)):
            if mine is not None and more is not None:
                mine += more

    def with_ones(self) -> torch.Tensor:
        """H of the inputs and one more that is always 1, as a bias has it: (groups, K + 1, K + 1)."""
        sums, count = (
            cast(torch.Tensor, self.sums)[..., None],
            self.hessian.new_full((len(self.hessian), 1, 1), float(self.rows)),
        )
        return torch.cat([torch.cat([self.hessian, sums], 2), torch.cat([sums.mT, count], 2)], 1)

    def weight(self, matrices: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        """What :meth:`matrices` took apart."""
        flat = matrices.flatten(0, 1)
        return (flat.T if self.transposed else flat).reshape(shape)


def second_moments(
    model: nn.Module, calls: list[Call], names: Iterable[str], ranks: Ranks = ALONE
) -> dict[str, Moments]:
    """:func:`moments_of_run` of a model that is run on calibration data, this rank's part of it."""
    return moments_of_run(model, run_all(calls, "model must run on calibration"), names, ranks)


@torch.no_grad()
def moments_of_run(
    model: nn.Module, run: Callable[[nn.Module], Any], names: Iterable[str], ranks: Ranks = ALONE
) -> dict[str, Moments]:
    """The moments of those of the named layers that have any: a layer that never ran, or is of another kind, has none.

    Kinds are ``nn.Linear``, ``nn.Conv1d`` to ``3d`` and ``Conv1D`` of transformers, with the forward of their class.
    Inputs are taken as the weight meets them, behind the layer's own quantizer. Sums go over what all ``ranks`` run.
    """
    found, sums = {}, {}
    for name in names:
        layer: Any = model.get_submodule(name)
        if (form := _form(layer)) is not None:
            hessian = torch.zeros(
                form.groups, form.inputs, form.inputs, dtype=torch.float64, device=layer.weight.device
            )
            sums[name] = hessian.new_zeros(2, form.groups, form.inputs)
            found[name] = Moments(hessian, form.transposed, 0, *sums[name])

    def add(name: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        moments = found[name]
        for x in _rows(module, first_tensor(args, kwargs, name), len(moments.hessian)):
            moments.hessian += x.mT @ x
            moments.rows += x.shape[1]
            sums[name] += torch.stack([x.sum(1), x.abs().sum(1)])

    observe(model, run, before=add, names=found)
    for name, moments in found.items():
        ranks.add([moments.hessian, sums[name]])
        moments.rows = int(ranks.total(moments.rows)[0])
    return {name: moments for name, moments in found.items() if moments.rows}


class MomentsInTurn:
    """The moments of many layers, asked for in the order of ``names``: so many are held as ``TOGETHER`` allows.

    ``calls`` are this rank's.

    The data is run through the model once for each part of the layers.
    """

    def __init__(self, model: nn.Module, calls: list[Call], names: Iterable[str], ranks: Ranks = ALONE) -> None:
        self.model, self.calls, self.names, self.ranks = model, calls, list(names), ranks
        self._held: dict[str, Moments] = {}
        self._next = 0

    def of(self, name: str) -> Moments | None:
        """A layer's moments; None for one that has none."""
        place = self.names.index(name)
        if place >= self._next:
            self._held = {}
            size, self._next = 0, place
            while self._next < len(self.names):
                form = _form(self.model.get_submodule(self.names[self._next]))
                size += 0 if form is None else form.groups * form.inputs**2
                if self._next > place and size > TOGETHER:
                    break
                self._next += 1
            self._held = second_moments(self.model, self.calls, self.names[place : self._next], self.ranks)
        return self._held.pop(name, None)


class _Form(NamedTuple):
    """How a layer's weight is a matrix for each group."""

    groups: int
    inputs: int  # of a group: K
    transposed: bool


def _form(layer: Any) -> _Form | None:
    kind: Any = next((k for k in (nn.Linear, *CONVOLUTIONS, *_conv1d()) if isinstance(layer, k)), None)
    if kind is None or "forward" in vars(layer) or type(layer).forward is not kind.forward:
        return None
    if kind not in CONVOLUTIONS:
        transposed = kind in _conv1d()
        return _Form(1, layer.weight.shape[0 if transposed else 1], transposed)
    if type(layer)._conv_forward is not kind._conv_forward:
        return None
    return _Form(layer.groups, layer.in_channels // layer.groups * prod(layer.kernel_size), False)


def _conv1d() -> tuple[type[nn.Module], ...]:
    kind = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    return () if kind is None else (kind,)


def _rows(layer: Any, x: torch.Tensor, groups: int) -> Iterable[torch.Tensor]:
    """X in parts, (groups, rows, K) in float64."""
    if not isinstance(layer, CONVOLUTIONS):
        flat = x.reshape(1, -1, x.shape[-1])
        for part in flat.split(max(1, AT_ONCE // flat.shape[-1]), 1):
            yield part.double()
        return
    dimensions = len(layer.kernel_size)
    x = x if x.ndim == dimensions + 2 else x[None]  # one image without a batch
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    for axis, (size, stride, dilation) in enumerate(
        zip(layer.kernel_size, layer.stride, layer.dilation, strict=True), start=2
    ):
        x = x.unfold(axis, (size - 1) * dilation + 1, stride)[..., ::dilation]
    # Group, sample, places, channels of the group, window.
    windows = x.unflatten(1, (groups, -1)).movedim(1, 0).movedim(2, 2 + dimensions)
    each = prod(windows.shape[2:])
    for part in windows.split(max(1, AT_ONCE // max(each * groups, 1)), 1):
        yield part.flatten(1, 1 + dimensions).flatten(2).double()
