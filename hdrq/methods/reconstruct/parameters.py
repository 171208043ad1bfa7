"""What is learned of a unit: its tensors, the optimizer over them, and the bounds on their rates."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from hdrq import ops
from hdrq.calibrate.sequential import Unit
from hdrq.methods.reconstruct.biases import learned_bias, settle_bias
from hdrq.methods.reconstruct.schedule import ACTIVATION_RATE, BETA, BIAS_RATE, WEIGHT_RATE
from hdrq.quantizers.layers import QuantizedLayer
from hdrq.recipes import Recipe

LEAVE = 1e3  # a scale stays within this factor of where it starts
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # Adam's state of a parameter


class Parameters:
    """The learned tensors of a unit, by name.

    Args:
        row: this iteration's row of the schedule, on the device: the optimizer reads its rates there.
    """

    def __init__(self, unit: Unit, recipe: Recipe, row: torch.Tensor) -> None:
        self.unit, self.recipe, self.device = unit, recipe, row.device
        activation_scales = {f"{name}.scale": quantizer.scale for name, quantizer in unit.activations.items()}
        weights = {
            f"{layer.name}.{part}": tensor
            for layer in unit.weights
            for part, tensor in self._of_weight(layer, row).items()
        }
        biases = self._of_biases()
        self.by_name: dict[str, torch.Tensor] = {**activation_scales, **weights, **biases}
        self._bound_rates(list(weights.values()))
        groups = ((weights, WEIGHT_RATE), (activation_scales, ACTIVATION_RATE), (biases, BIAS_RATE))
        self.optimizer = torch.optim.Adam(
            [{"params": list(tensors.values()), "lr": row[rate]} for tensors, rate in groups if tensors],
            fused=True,
            capturable=self.device.type == "cuda",
        )
        for p in self.by_name.values():
            p.requires_grad_(True)

    def _of_weight(self, layer: QuantizedLayer, row: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors that are learned of a layer's weight. A latent is float32 while it is learned."""
        quantizer, latent = layer.weight_quantizer, layer.latent
        quantizer.dtype, quantizer.noise = latent.dtype, self.recipe.noise
        latent.data = latent.data.float()
        if self.recipe.learns == "weights":
            return {"weight": latent, "weight_scale": quantizer.scale}
        quantizer.alpha = ops.adaround_init(latent.detach(), quantizer.scale.detach(), **quantizer.where)
        quantizer.beta = row[BETA : BETA + 1]
        return {"alpha": quantizer.alpha}

    def _of_biases(self) -> dict[str, torch.Tensor]:
        if self.recipe.bias_lr <= 0:
            return {}
        biased: dict[int, QuantizedLayer] = {}  # layers may share a bias
        for layer in self.unit.layers:
            if getattr(layer.module, "bias", None) is not None:
                biased.setdefault(id(layer.module.bias), layer)
        return {f"{layer.name}.bias": learned_bias(layer) for layer in biased.values()}

    def _bound_rates(self, weights: list[torch.Tensor]) -> None:
        """Put all scales into one tensor, and say what share of its rate each bounded tensor learns at.

        A scale has the bound ``scale_step``, a weight ``weight_step``, both in units of the scale it starts from. No
        scale leaves ``[start/1000, 1000·start]``.
        """
        quantizer_scales = {id(q.scale) for q in self.unit.activations.values()}
        quantizer_scales |= {id(layer.weight_quantizer.scale) for layer in self.unit.weights}
        scales = [p for p in self.by_name.values() if id(p) in quantizer_scales]
        self.scales = _together(scales, self.device)
        self._limits = self.scales / LEAVE, self.scales * LEAVE
        of_weights = {id(p) for p in weights}
        rates = (self.recipe.activation_lr, self.recipe.weight_lr)
        shares = [self._share(p, self.recipe.scale_step, rates[id(p) in of_weights]) for p in scales]
        self._bounded = [self.scales]
        self._shares = [
            torch.cat([torch.zeros(0, dtype=torch.float32, device=self.device), *(share.flatten() for share in shares)])
        ]
        if self.recipe.learns == "weights" and self.recipe.weight_step > 0:
            self._bounded += [layer.latent for layer in self.unit.weights]
            self._shares += [
                self._share(
                    layer.weight_quantizer.broadcast(layer.weight_quantizer.scale, layer.latent),
                    self.recipe.weight_step,
                    self.recipe.weight_lr,
                )
                for layer in self.unit.weights
            ]

    @staticmethod
    def _share(scale: torch.Tensor, step: float, rate: float) -> torch.Tensor:
        """The share of a rate at which it is at most ``step`` of a scale."""
        return (step * scale.detach() / max(rate, 1e-30)).clamp(max=1)

    def step(self) -> None:
        """A step of the optimizer, its rates bounded. No scale leaves what a scale may be."""
        before = [p.detach().clone() for p in self._bounded]
        self.optimizer.step()
        with torch.no_grad():
            for p, old, share in zip(self._bounded, before, self._shares, strict=True):
                p.copy_(torch.lerp(old, p, share))
            finite = torch.where(self.scales.isfinite(), self.scales, before[0])
            self.scales.copy_(torch.clamp(finite, *self._limits))

    def all_finite(self) -> torch.Tensor:
        """For each learned tensor, on the device, whether it is finite."""
        return torch.stack([p.isfinite().all() for p in self.by_name.values()])

    def state(self) -> dict[str, torch.Tensor]:
        """The learned tensors and the optimizer's moments, by name."""
        tensors = {}
        for name, p in self.by_name.items():
            tensors[name] = p.detach()
            moments = self.optimizer.state[p]
            tensors.update({f"{name}/{key}": moments[key] for key in MOMENTS if moments})
        return tensors

    @torch.no_grad()
    def copy_to(self, state: dict[str, torch.Tensor]) -> None:
        """Make ``state`` a copy of :meth:`state`, in the memory that it has."""
        for name, value in self.state().items():
            if name in state:
                state[name].copy_(value)
            else:
                state[name] = value.clone()

    @torch.no_grad()
    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Go back to a state, or to learned tensors alone."""
        for name, p in self.by_name.items():
            p.copy_(tensors[name])
            moments = {key: tensors[f"{name}/{key}"] for key in MOMENTS if f"{name}/{key}" in tensors}
            self.optimizer.state[p] = {key: value.to(self.device, copy=True) for key, value in moments.items()}

    @torch.no_grad()
    def finish(self) -> None:
        """Round every weight for good, and let go of what only learning needs."""
        for layer in self.unit.weights:
            layer.settle()
            quantizer = layer.weight_quantizer
            quantizer.alpha = quantizer.beta = quantizer.dtype = None
        for layer in self.unit.layers:
            settle_bias(layer)
        for each in (*(layer.weight_quantizer for layer in self.unit.weights), *self.unit.activations.values()):
            each.mode, each.scale.data, each.rng = "round", each.scale.data.clone(), each.rng.clone()
        for activation in self.unit.activations.values():
            activation.keep = 1.0
        for p in self.by_name.values():
            p.requires_grad_(False).grad = None


def _together(parameters: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    """One tensor in whose memory all parameters lie from now on."""
    flat = torch.cat([torch.zeros(0, dtype=torch.float32, device=device), *(p.detach().flatten() for p in parameters)])
    for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.data = part.view_as(p)
    return flat
