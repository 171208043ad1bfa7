"""Arguments and results of modules as trees of tensors: lists, tuples, dicts, and dataclasses of the user's own."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

Spec = pytree.TreeSpec


class _Fields:
    """A dataclass's fields, a node of the tree. Only this class is made known to torch, never the user's."""

    def __init__(self, value: Any) -> None:
        self.kind = type(value)
        self.values = {f.name: _opened(getattr(value, f.name)) for f in fields(value) if hasattr(value, f.name)}


def _flatten(node: _Fields) -> tuple[list, tuple]:
    return list(node.values.values()), (node.kind, tuple(node.values))


def _unflatten(values: Any, context: tuple) -> Any:
    """The dataclass itself, made without its ``__init__``, which may compute."""
    kind, names = context
    made = object.__new__(kind)
    for name, value in zip(names, values, strict=True):
        object.__setattr__(made, name, value)
    return made


pytree.register_pytree_node(_Fields, _flatten, _unflatten)


def _is_fields(value: Any) -> bool:
    return is_dataclass(value) and not isinstance(value, type) and type(value) not in pytree.SUPPORTED_NODES


def _opened(tree: Any) -> Any:
    return pytree.tree_map(lambda x: _Fields(x) if _is_fields(x) else x, tree, is_leaf=_is_fields)


def flatten(tree: Any) -> tuple[list, Spec]:
    """The leaves of a tree, and how to put it together again."""
    return pytree.tree_flatten(_opened(tree))


def leaves(tree: Any) -> list:
    """The leaves of a tree."""
    return flatten(tree)[0]


def unflatten(values: list, spec: Spec) -> Any:
    """The inverse of :func:`flatten`."""
    return pytree.tree_unflatten(values, spec)


def hides_tensors(leaf: Any, depth: int = 3) -> bool:
    """Whether an object that is no container of the tree holds a tensor, so that it cannot be taken for a constant."""
    if isinstance(leaf, torch.Tensor):
        return True
    if depth == 0 or leaf is None or isinstance(leaf, type | torch.nn.Module | str | bytes | int | float | complex):
        return False
    if isinstance(leaf, dict):
        inside = list(leaf.values())
    elif isinstance(leaf, list | tuple | set):
        inside = list(leaf)
    else:
        inside = list(getattr(leaf, "__dict__", {}).values())
        inside += [getattr(leaf, n, None) for c in type(leaf).__mro__ for n in _slots(c)]
    return any(hides_tensors(x, depth - 1) for x in inside)


def _slots(kind: type) -> tuple[str, ...]:
    slots = kind.__dict__.get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)
