"""State dicts: which names of one belong to quantizers, and how one differs from what a model needs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

from hdrq.quantizers.layers import input_readers, quantized_layers


def quantizer_names(model: nn.Module) -> set[str]:
    """The names in a quantized model's state dict that its quantizers hold; a file has codes and scales for them."""
    parts = ("original", "0.scale", "0.zero_point", "0._extra_state")
    names = {f"{name}.parametrizations.weight.{part}" for name in quantized_layers(model) for part in parts}
    names |= {f"{name}.input_quantizer.{part}" for name in input_readers(model) for part in ("scale", "_extra_state")}
    return {name.removeprefix(".") for name in names}  # the model itself may be a layer


def plain_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The part of a model's state dict that its quantizers do not hold."""
    quantizers = quantizer_names(model)
    return {name: value for name, value in tensors_of(model).items() if name not in quantizers}


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """A model's state dict without the extra state of modules that is no tensor: no file and no merge holds that."""
    return {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}


def put_state(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Load a state that has the form of a model's own: a module that reads states of older versions is told so."""
    current: Any = OrderedDict(state)
    current._metadata = cast(Any, model.state_dict())._metadata
    model.load_state_dict(current, strict=False)


def state_differences(
    state: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor], *, dtypes: bool
) -> list[str]:
    """What differs between a state dict and the one that is wanted: names missing, names unexpected, other shapes.

    Args:
        dtypes: whether dtypes must be equal too.
    """

    def form(value: torch.Tensor) -> tuple:
        shape = tuple(value.shape)
        return (shape, value.dtype) if dtypes else shape

    differences = [f"{name} missing" for name in wanted if name not in state]
    differences += [f"{name} unexpected" for name in state if name not in wanted]
    differences += [
        f"{name} {form(state[name])}, not {form(wanted[name])}"
        for name in wanted.keys() & state.keys()
        if form(state[name]) != form(wanted[name])
    ]
    return sorted(differences)
