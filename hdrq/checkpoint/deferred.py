"""Models that are made before there is memory for their parameters, or without any."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils.weak import WeakIdKeyDictionary

from hdrq.checkpoint.architecture import build
from hdrq.checks import listed
from hdrq.prepare.copying import tensors_in


def built_on_meta(model: str | Callable[..., nn.Module], **arguments: Any) -> nn.Module:
    """What a factory makes, its parameters on the meta device; its buffers are as ever.

    Raises:
        TypeError, ValueError: as for :func:`hdrq.checkpoint.architecture.build`; it computes with its parameters.
    """
    try:
        with _parameters_on_meta():
            return build(model, **arguments)
    except ValueError as error:
        if "meta" not in str(error):
            raise
        way_out = "parameters have no values until the state gives them; leave offload_folder out"
        raise ValueError(f"{error}; {way_out}") from error


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters of modules that are made inside the block have shapes and no values; buffers are as ever."""
    made = WeakIdKeyDictionary()  # of a parameter that several modules are given, one without values
    thread = threading.get_ident()  # the hook is the process's

    def without_values(module: nn.Module, name: str, parameter: Any) -> Any:
        if type(parameter) is not nn.Parameter or parameter.is_meta or threading.get_ident() != thread:
            return None
        if parameter not in made:
            made[parameter] = nn.Parameter(parameter.data.to("meta"), parameter.requires_grad)
        return made[parameter]

    hook = register_module_parameter_registration_hook(without_values)
    try:
        yield
    finally:
        hook.remove()


def give_parameters(model: nn.Module, value_of: Callable[[str, nn.Parameter], torch.Tensor]) -> set[str]:
    """Give each parameter that is on meta the tensor ``value_of(its name, it)``; one that modules share stays one.

    Returns:
        The names of those that were given.

    Raises:
        ValueError: other tensors of the model are on meta, because they were made of its parameters.
    """
    absent = {name: p for name, p in model.named_parameters(remove_duplicate=False) if p.is_meta}
    last = {id(parameter): name for name, parameter in absent.items()}  # of several names the last decides, as in torch
    given = {
        id(absent[name]): nn.Parameter(value_of(name, absent[name]), absent[name].requires_grad)
        for name in last.values()
    }
    for module in model.modules():
        module._parameters.update((name, given.get(id(own), own)) for name, own in module._parameters.items())
    derived = [
        f"{place}.{name}".removeprefix(".")
        for place, module in model.named_modules()
        for name, value in {**vars(module), **module._buffers, "_parameters": None, "_buffers": None}.items()
        if any(tensor.is_meta for tensor in tensors_in(value, set()))
    ]
    if derived:
        raise ValueError(
            "model must keep its parameters in modules alone, and compute no tensor of them while it is made, got "
            f"{listed(derived)}; leave offload_folder out"
        )
    return set(absent)
