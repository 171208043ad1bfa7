"""The reconstruction loss of a unit."""

from __future__ import annotations

import torch

from hdrq.calibrate.sequential import Unit

MEASURED = 256  # samples on which the losses of the report are taken


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """``mean over batch and positions of Σ_channels (output − target)²``; tokens (B, N, C) have their channels last.

    Half types are widened to float32 first.
    """
    difference = output.float() - target.float()
    return difference.square().sum(dim=-1 if output.ndim == 3 else 1).mean()


def unit_loss(unit: Unit, inputs: list[torch.Tensor], target: torch.Tensor) -> torch.Tensor:
    """The loss of a unit as it is, on rows of its inputs and of its target."""
    args, kwargs = unit.node.inputs.build(inputs)
    outputs = unit.node.outputs
    leaf, output = outputs.batched[outputs.main], outputs.split(unit.module(*args, **kwargs))[outputs.main]
    return reconstruction_loss(leaf.tensor(output), leaf.tensor(target))


@torch.no_grad()
def measured_loss(unit: Unit, batch_size: int) -> float:
    """The loss of a unit as it is, on the first samples, in batches."""
    samples, total = min(MEASURED, unit.count), 0.0
    for start in range(0, samples, batch_size):
        span = start, min(start + batch_size, samples)
        error = unit_loss(unit, [rows.read(*span) for rows in unit.quantized], unit.target.read(*span))
        total += float(error) * (span[1] - span[0])
    return total / samples
