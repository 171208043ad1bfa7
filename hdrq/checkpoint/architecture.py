"""Architectures by name: ``"module:factory"``."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable

from torch import nn


def factory(text: str) -> Callable[..., nn.Module]:
    """``"module:factory"`` as the function it names; modules are looked for in the working folder too.

    Raises:
        ValueError: the text is not of that form, there is no such module, or it has no function of that name.
    """
    module, colon, name = text.partition(":")
    if not (module and colon and name):
        raise ValueError(f'model must be written like "module:factory", got {text!r}')
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        raise ValueError(f"model must be in a module that can be imported, got {text!r}: {error}") from error
    if not callable(found):
        raise ValueError(f"model must name a function of {module}, got {name!r}, which it does not have")
    return found


def build(text: str, **arguments) -> nn.Module:
    """The module that a factory makes.

    Raises:
        TypeError: it makes something else.
        ValueError: there is no such factory.
    """
    model = factory(text)(**arguments)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a factory of a torch.nn.Module, got one of {type(model).__name__}")
    return model
