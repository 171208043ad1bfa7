"""Which operations of a run read which tensors, inside which call of a module."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Operation:
    """One operation, with the storages of the tensors that it was called with and of those that it returned."""

    name: str
    args: tuple
    reads: frozenset[int]
    made: frozenset[int]
    view: bool


class Ledger(TorchDispatchMode):
    """The operations of a run, in order: while it is entered, every read of a storage is counted.

    A storage is known by its address. It is the same storage for as long as a tensor that has it is kept alive.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reads: Counter[int] = Counter()
        self.open: list[list[Operation]] = []  # the operations of the calls that were begun and not ended

    def __torch_dispatch__(self, func: Any, types, args=(), kwargs=None):
        read = storages((args, kwargs))
        self.reads.update(read)
        result = func(*args, **(kwargs or {}))
        if self.open:
            name = func._schema.name.rpartition("::")[2]
            known = tuple(storage_of(x) if isinstance(x, torch.Tensor) else x for x in args)
            operation = Operation(name, known, read, storages(result), _is_view(func))
            for call in self.open:
                call.append(operation)
        return result

    def begin(self) -> None:
        """A call of a module begins."""
        self.open.append([])

    def end(self) -> list[Operation]:
        """The operations of the call that began last."""
        return self.open.pop()


def storage_of(x: torch.Tensor) -> int:
    """What names a tensor's memory: equal for views of one tensor."""
    try:
        return x.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # a sparse tensor has no storage of its own
        return id(x)


def storages(values: Any) -> frozenset[int]:
    """What names the memory of each tensor in a tree."""
    return frozenset(storage_of(x) for x in tree_leaves(values) if isinstance(x, torch.Tensor))


def _is_view(func: Any) -> bool:
    aliases = [each.alias_info for each in func._schema.returns]
    return bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)
