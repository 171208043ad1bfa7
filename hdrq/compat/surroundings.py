"""What a function depends on beside its arguments: simple values of its module, and of classes and modules it names."""

from __future__ import annotations

import enum
import inspect
from collections.abc import Callable, Iterator, Mapping
from types import CodeType, ModuleType
from typing import Any

import torch

SIMPLE = (bool, int, float, str, enum.Enum, torch.dtype, torch.device, torch.qscheme, type(None))
HELD = (dict, list, set)


def surroundings(function: Callable, package: str, owner: type | None = None) -> list[tuple[Mapping, str]]:
    """Where the values are that a function reads, and functions of its package that it calls: a mapping and a key each.

    Args:
        function: with Python code; of others nothing is known.
        package: what is followed.
        owner: the class whose methods ``self`` may have.
    """
    found: dict[tuple[int, str], Mapping] = {}
    todo, seen = [function], set()
    while todo:
        each = todo.pop()
        code, names = getattr(each, "__code__", None), getattr(each, "__globals__", None)
        if code is None or names is None or code in seen:
            continue
        seen.add(code)
        words = set(_words(code))
        for word in words:
            value = names.get(word)
            if word in names and isinstance(value, (*SIMPLE, *HELD)):
                found[id(names), word] = names
            elif inspect.isfunction(value) and _of(value, package):
                todo.append(value)
            elif isinstance(value, ModuleType) and f"{value.__name__}.".startswith(f"{package}."):
                held = vars(value)
                found |= {(id(held), w): held for w in words if isinstance(held.get(w), SIMPLE) and w in held}
                todo += [held[w] for w in words if inspect.isfunction(held.get(w))]
            elif isinstance(value, type) and _of(value, package):
                found |= {(id(value), k): vars(value) for k, v in vars(value).items() if isinstance(v, SIMPLE)}
        if owner is not None:
            for kind in owner.__mro__:
                own = {word: vars(kind)[word] for word in words if word in vars(kind)}
                todo += [value for value in own.values() if inspect.isfunction(value) and _of(value, package)]
                found |= {(id(kind), word): vars(kind) for word, value in own.items() if isinstance(value, SIMPLE)}
    return [(holder, key) for (_, key), holder in found.items() if not key.startswith("__")]


def values_of(places: list[tuple[Mapping, str]]) -> tuple:
    """The values that are there now, in a form that compares."""
    return tuple(repr(v) if isinstance(v := holder.get(key), HELD) else v for holder, key in places)


def _words(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _words(constant)


def _of(value: Any, package: str) -> bool:
    return f"{value.__module__}.".startswith(f"{package}.")
