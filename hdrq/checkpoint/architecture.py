"""Architectures by name: ``"module:factory"``, or ``"timm:NAME"`` and ``"torchvision:NAME"`` of these libraries."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn


def _timm(library: Any, name: str) -> Callable[..., nn.Module] | None:
    return partial(library.create_model, name) if library.is_model(name) else None


def _torchvision(library: Any, name: str) -> Callable[..., nn.Module] | None:
    return library.models.get_model_builder(name) if name in library.models.list_models() else None


LIBRARIES = {"timm": _timm, "torchvision": _torchvision}


def factory(text: str) -> Callable[..., nn.Module]:
    """``"module:factory"`` as the function it names; modules are looked for in the working folder too.

    ``"timm:resnet50"`` and ``"torchvision:resnet50"`` name models of these libraries, made with their defaults.

    Raises:
        ValueError: the text is not of that form, there is no such module, or it has no function of that name.
    """
    module, colon, name = text.partition(":")
    if not (module and colon and name):
        raise ValueError(f'model must be written like "module:factory", got {text!r}')
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        library = importlib.import_module(module)
        found = getattr(library, name, None)
        if found is None and module in LIBRARIES:
            found = LIBRARIES[module](library, name)
    except (Exception, SystemExit) as error:  # the module is the user's, and may do anything
        raise ValueError(f"model must be in a module that can be imported, got {text!r}: {_said(error)}") from error
    if not callable(found):
        raise ValueError(f"model must name a function of {module}, got {name!r}, which it does not have")
    return found


def build(model: str | Callable[..., nn.Module], **arguments) -> nn.Module:
    """The module that a factory makes, or the one of that name.

    Raises:
        TypeError: it makes something else.
        ValueError: there is no such factory, or it raises an error.
    """
    make = factory(model) if isinstance(model, str) else model
    if not callable(make):
        raise TypeError(f'model must be "module:factory" or a function that makes a module, got {type(model).__name__}')
    text = name_of(model)
    try:
        made = make(**arguments)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise ValueError(f"model must be made by {text} of {dict(arguments)}, got {_said(error)}") from error
    if not isinstance(made, nn.Module):
        raise TypeError(f"model must be a factory of a torch.nn.Module, got one of {type(made).__name__}")
    return made


def name_of(model: str | Callable[..., nn.Module]) -> str:
    """What messages call an architecture."""
    return model if isinstance(model, str) else getattr(model, "__qualname__", repr(model))


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
