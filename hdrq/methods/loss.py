"""The reconstruction loss of a unit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from hdrq.calibrate.sequential import Unit
from hdrq.calibrate.trace import Leaf
from hdrq.prepare.observe import observe
from hdrq.quantizers.layers import CONVOLUTIONS, weighted_layers

MEASURED, AT_ONCE = 256, 32  # samples that a unit's losses are reported on, at most, and how many are run together


def reported_samples(count: int) -> torch.Tensor:
    """The numbers of the samples, of so many, that the losses in a report are measured on: evenly spaced over all."""
    measured = min(MEASURED, count)
    return torch.arange(measured) * count // max(measured, 1)


def reconstruction_loss(
    output: torch.Tensor, target: torch.Tensor, axis: int | None, norm: float = 2.0
) -> torch.Tensor:
    """``mean over batch and positions of Σ_channels |output − target|^norm``, the channels along ``axis``, if any.

    Half types are widened to float32 first.
    """
    difference = output.float() - target.float()
    powers = difference.square() if norm == 2 else difference.abs().pow(norm)
    return (powers if axis is None else powers.sum(dim=axis)).mean()


@dataclass(frozen=True)
class UnitLoss:
    """The loss of a unit as it is, its output behind ``unit.output`` if that is there.

    Args:
        axis: of the channels of its output (:func:`channel_axis`).
        norm: the exponent.
    """

    unit: Unit
    axis: int | None
    norm: float = 2.0

    def __call__(self, inputs: list[torch.Tensor], target: torch.Tensor) -> torch.Tensor:
        """On rows of its inputs and of its target."""
        leaf, output = _main_output(self.unit, inputs)
        if self.unit.output is not None:
            output = self.unit.output(output)
        return reconstruction_loss(output, leaf.tensor(target), self.axis, self.norm)

    @torch.no_grad()
    def measured(self, samples: torch.Tensor, batch_size: int) -> float:
        """Behind the quantized prefix, on the samples of these numbers: of all ranks, of which each runs its own."""
        total, ranks = 0.0, self.unit.ranks
        own = ranks.own(samples, self.unit.count)
        for index in own.split(batch_size) if len(own) else ():
            rows = (*self.unit.quantized, self.unit.target)
            *inputs, target = (each.gather(index).to(each.device) for each in rows)
            total += float(self(inputs, target)) * len(index)
        return ranks.total(total)[0] / len(samples)


@torch.no_grad()
def channel_axis(unit: Unit) -> int | None:
    """The axis of a unit's output along which its channels lie; None where there is none besides the batch.

    They are those of the layer that runs last in it: the axis that is as long as that layer's channels, and of several
    the one where the layer has them. Where no axis is as long, as behind a pooling that flattens, it is the axis where
    the layer has them, else the last.
    """
    found: list[tuple[int, int]] = []  # of each layer that ran: the axis of its channels from the end, and how many

    def note(name, module, args, kwargs, output) -> None:
        axis = 1 - module.weight.ndim if isinstance(module, CONVOLUTIONS) else -1
        if isinstance(output, torch.Tensor):
            found.append((axis, output.shape[axis]))

    def run(module: nn.Module) -> tuple[Leaf, torch.Tensor]:
        return _main_output(unit, [rows.read(0, 1) for rows in unit.quantized])

    leaf, output = observe(unit.module, run, after=note, names=weighted_layers(unit.module))
    axes = [axis for axis in range(output.ndim) if axis != leaf.axis]
    if not axes or not found:
        return None
    own, channels = found[-1][0] + output.ndim, found[-1][1]
    alike = [axis for axis in axes if output.shape[axis] == channels]
    return own if own in (alike or axes) else (alike or axes)[-1]


def _main_output(unit: Unit, inputs: list[torch.Tensor]) -> tuple[Leaf, torch.Tensor]:
    """What a unit as it is returns for rows of its inputs, and how that is made of rows."""
    args, kwargs = unit.node.inputs.build(inputs)
    outputs = unit.node.outputs
    leaf = outputs.batched[outputs.main]
    return leaf, leaf.tensor(outputs.split(unit.module(*args, **kwargs))[outputs.main])
