"""Biases that are learned with their layer."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import parametrize

from hdrq.quantizers.layers import QuantizedLayer


class _As(nn.Module):
    """A parametrization: what the module uses is of another type than what is learned."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self.dtype)


def learned_bias(layer: QuantizedLayer) -> torch.Tensor:
    """The learned form of a bias: float32 where the layer's bias is of a half type, as a latent weight is."""
    bias = layer.module.bias
    if bias.dtype.itemsize < 4 and not parametrize.is_parametrized(layer.module, "bias"):
        parametrize.register_parametrization(layer.module, "bias", _As(bias.dtype), unsafe=True)
        bias.data = bias.data.float()
    return bias


def settle_bias(layer: QuantizedLayer) -> None:
    """Give a bias its own type back."""
    if parametrize.is_parametrized(layer.module, "bias"):
        dtype = layer.module.parametrizations.bias[0].dtype
        parametrize.remove_parametrizations(layer.module, "bias", leave_parametrized=False)
        layer.module.bias.data = layer.module.bias.data.to(dtype)
