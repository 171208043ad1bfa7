"""The model in full precision that quantization starts from: checked, copied, folded."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn

from hdrq.prepare.attention import replace_attention
from hdrq.prepare.folding import fold_batchnorm
from hdrq.quantizers.layers import weighted_layers


def check_float(name: str, model: nn.Module) -> None:
    """``model`` is a module whose layers hold their weights themselves."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name} must be a torch.nn.Module, got {type(model).__name__}")
    for layer, module in weighted_layers(model).items():
        if "weight" not in module._parameters:
            raise ValueError(
                f"{name} must have plain weights, got a parametrized one (quantized already?) in {layer!r}"
            )


def check_module(name: str, model: nn.Module) -> None:
    """``model`` is a module in full precision and in evaluation mode."""
    check_float(name, model)
    if model.training:
        raise ValueError(f"{name} must be in evaluation mode, got training mode; call {name}.eval()")


def device_of(model: nn.Module) -> torch.device:
    """Where a model's first parameter is."""
    return next(model.parameters()).device


def prepare_float(model: nn.Module, run: Callable) -> tuple[nn.Module, dict[str, str]]:
    """A copy of a model with BatchNorm folded, its packed attentions replaced and no gradients; what was folded.

    ``run(model)`` executes the model on an example, and returns its outputs.
    """
    full = copy.deepcopy(model).requires_grad_(False)
    replace_attention(full, run)
    return full, fold_batchnorm(full, run)
