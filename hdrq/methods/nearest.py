"""Round to nearest: every weight goes to the nearest point of its grid, whatever its unit reads."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from hdrq.calibrate.sequential import PARTS, Fitted, Journal, Unit
from hdrq.methods.loss import AT_ONCE, UnitLoss, channel_axis, reported_samples
from hdrq.quantizers.layers import quantized_layers


def round_to_nearest(model: nn.Module) -> nn.Module:
    """Round every quantized weight of a model, in place; a weight on its grid stays. Nothing is learned after this."""
    for layer in quantized_layers(model).values():
        layer.settle()
    return model.requires_grad_(False)


class Nearest:
    """The method that learns nothing; :func:`round_to_nearest` gives the same bits without a walk."""

    fits = PARTS

    def fit(self, unit: Unit, journal: Journal) -> Fitted:
        """Round the weights of a unit. Its quantizers round them while it runs, so its loss is the same before."""
        for layer in unit.layers:
            layer.settle()
        loss = UnitLoss(unit, channel_axis(unit)).measured(reported_samples(unit.count), AT_ONCE)
        tensors = {layer.name: layer.latent.detach() for layer in unit.layers}
        return Fitted(tensors, {"loss_before": loss, "loss_after": loss})

    def restore(self, unit: Unit, tensors: Mapping[str, torch.Tensor]) -> None:
        """Round again, to the same bits."""
        for layer in unit.layers:
            layer.settle()
