"""Putting quantizers on modules: of what they read, through a forward pre-hook."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from hdrq import tree
from hdrq.quantizers.modules import ActivationQuantizer


def attach_input_quantizer(module: nn.Module, quantizer: ActivationQuantizer) -> None:
    """Quantize the first tensor that a module is called with, wherever it is among the arguments.

    That is the first argument that is a tensor, else the first tensor of floating point inside lists, tuples, dicts and
    dataclasses.
    """
    module.input_quantizer = quantizer
    module.register_forward_pre_hook(_quantize_input, with_kwargs=True)


def _quantize_input(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    read = first_tensor(args, kwargs)
    quantized = module.input_quantizer(read)
    if any(read is x for x in (*args, *kwargs.values())):
        given = tuple(quantized if x is read else x for x in args)
        return given, {key: quantized if x is read else x for key, x in kwargs.items()}
    values, spec = tree.flatten((args, dict(kwargs)))
    return tree.unflatten([quantized if x is read else x for x in values], spec)


def first_tensor(args: tuple, kwargs: Mapping, name: str = "a module to be quantized") -> torch.Tensor:
    """The tensor among a call's arguments that is quantized.

    Raises:
        ValueError: there is none.
    """
    direct = (*args, *kwargs.values())
    found = next((x for x in direct if isinstance(x, torch.Tensor)), None)
    if found is None:
        inside = tree.leaves((args, dict(kwargs)))
        found = next((x for x in inside if isinstance(x, torch.Tensor) and x.is_floating_point()), None)
    if found is None:
        raise ValueError(
            f"{name} must be called with a tensor, got {', '.join(type(x).__name__ for x in direct) or 'none'}"
        )
    return found
