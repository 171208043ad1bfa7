"""Copies of models: what cannot be copied is named, and what a run left behind is no obstacle."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from types import FunctionType, MethodType, ModuleType
from typing import Any, cast

import torch
from torch import nn

from hdrq.prepare.offload import Offload

ATOMS = (
    str,
    bytes,
    int,
    float,
    complex,
    type,
    type(None),
    FunctionType,
    MethodType,
    ModuleType,
    torch.dtype,
    nn.Module,
)


def copy_model(name: str, model: nn.Module, offload: Offload | None = None) -> nn.Module:
    """A deep copy. A tensor that a module kept from a run, with the graph that made it, is copied without the graph.

    Args:
        offload: where the parameters of the copy lie; None for memory.

    Raises:
        TypeError: something cannot be copied; the message names the module and the attribute.
    """
    memo: dict[int, Any] = {}
    kept: set[int] = set()
    for module in model.modules():
        for tensor in tensors_in(vars(module), kept):
            if not tensor.is_leaf:
                memo[id(tensor)] = tensor.detach().clone()
    if offload is not None:
        plain = [parameter for parameter in model.parameters() if type(parameter) is nn.Parameter]
        memo |= {id(p): nn.Parameter(offload.put(p.data), p.requires_grad) for p in plain}
    try:
        return copy.deepcopy(model, dict(memo))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        where = _culprit(model, memo)
        raise TypeError(
            f"{name} must be a module that can be copied, got {where or 'one that cannot'}: {error}; remove it, or "
            "give its class a __deepcopy__"
        ) from error


def tensors_in(value: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    """The tensors in attributes, and in what they hold; modules are looked at by themselves."""
    if isinstance(value, ATOMS) or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in list(value.values()):
            yield from tensors_in(item, seen)
    elif isinstance(value, list | tuple | set | frozenset):
        for item in list(value):
            yield from tensors_in(item, seen)
    else:
        yield from tensors_in(getattr(value, "__dict__", None), seen)


def _culprit(model: nn.Module, memo: dict[int, Any]) -> str | None:
    """The first attribute that cannot be copied, of the innermost module that has one."""
    for name, module in reversed(list(model.named_modules())):
        attributes = dict(vars(module))
        for group in ("_parameters", "_buffers"):
            attributes |= cast(Any, attributes.pop(group, {}))
        attributes.pop("_modules", None)
        for key, value in attributes.items():
            try:
                copy.deepcopy(value, dict(memo))
            except Exception:
                kind = type(value).__name__
                return f"attribute {key!r} ({kind}) of {name!r}" if name else f"attribute {key!r} ({kind}) of the model"
    return None
