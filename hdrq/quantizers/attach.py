"""Putting quantizers on modules: of what they read, through a forward pre-hook."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from hdrq import tree
from hdrq.quantizers.modules import ActivationQuantizer

PLAIN = (torch.Tensor, bool, int, float, str, type(None))  # arguments that hold no tensor inside


def attach_input_quantizer(module: nn.Module, quantizer: ActivationQuantizer) -> None:
    """Quantize the first tensor that a module is called with, wherever it is among the arguments.

    That is the first argument that is a tensor, else the first tensor of floating point inside lists, tuples, dicts and
    dataclasses. Wherever the same tensor stands again, it is quantized too.
    """
    module.input_quantizer = quantizer
    module.register_forward_pre_hook(_quantize_input, with_kwargs=True)


def _quantize_input(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    read = first_tensor(args, kwargs)
    return with_tensor(args, kwargs, read, module.input_quantizer(read))


def with_tensor(args: tuple, kwargs: dict, old: torch.Tensor, new: torch.Tensor) -> tuple[tuple, dict]:
    """The arguments of a call with one tensor in the place of another, wherever that stands."""
    return tuple(_replaced(x, old, new) for x in args), {key: _replaced(x, old, new) for key, x in kwargs.items()}


def _replaced(value: Any, old: torch.Tensor, new: torch.Tensor) -> Any:
    """An argument with the new tensor; itself if the old one is not in it, so that a module may go on writing to it."""
    if value is old:
        return new
    if isinstance(value, PLAIN):
        return value
    values, spec = tree.flatten(value)
    return tree.unflatten([new if x is old else x for x in values], spec) if any(x is old for x in values) else value


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
