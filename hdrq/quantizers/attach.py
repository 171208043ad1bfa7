"""Putting quantizers on modules: of what they read, through a forward pre-hook."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from hdrq.quantizers.modules import ActivationQuantizer


def attach_input_quantizer(module: nn.Module, quantizer: ActivationQuantizer) -> None:
    """Quantize the first tensor that a module is called with."""
    module.input_quantizer = quantizer
    module.register_forward_pre_hook(_quantize_input, with_kwargs=True)


def _quantize_input(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    where = first_tensor(args, kwargs)
    if isinstance(where, int):
        return (*args[:where], module.input_quantizer(args[where]), *args[where + 1 :]), kwargs
    return args, {**kwargs, where: module.input_quantizer(kwargs[where])}


def first_tensor(args: tuple, kwargs: Mapping) -> int | str:
    """The place or the name of the first tensor among a call's arguments."""
    named = [*enumerate(args), *kwargs.items()]
    where = next((key for key, value in named if isinstance(value, torch.Tensor)), None)
    if where is None:
        raise ValueError(f"a module to be quantized must be called with a tensor, got {[type(v) for _, v in named]}")
    return where
