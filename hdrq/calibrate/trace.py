"""How the units of a model depend on each other: what each reads and returns, found by tracing one call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hdrq import tree
from hdrq.calibrate.data import Call
from hdrq.checks import short_reason
from hdrq.prepare.ledger import storage_of
from hdrq.prepare.observe import hooks, version_of

WAY_OUT = 'name a module around it with blocks=, or keep its layers in full precision with "float"'


@dataclass(frozen=True)
class Leaf:
    """A tensor among arguments or results: ``axis`` grows with the batch, by ``count`` for each sample."""

    axis: int
    count: int
    shape: tuple[int, ...]  # of a row
    dtype: torch.dtype

    def rows(self, value: torch.Tensor) -> torch.Tensor:
        """One row for each sample."""
        value = value.movedim(self.axis, 0)
        return value.unflatten(0, (-1, self.count)) if self.count != 1 else value

    def tensor(self, rows: torch.Tensor) -> torch.Tensor:
        """The inverse of :meth:`rows`."""
        rows = rows.flatten(0, 1) if self.count != 1 else rows
        return rows.movedim(0, self.axis)


@dataclass(frozen=True)
class Layout:
    """A tree of arguments or results: a :class:`Leaf` where a value depends on the sample, else the value itself."""

    spec: tree.Spec
    leaves: tuple

    @classmethod
    def of(cls, name: str, one: Any, two: Any) -> Layout:
        """From the same tree for one sample, and for that sample twice."""
        (first, other), (values, spec) = tree.flatten(one), tree.flatten(two)
        if other != spec:
            raise ValueError(
                f"block {name} must be called alike whatever the batch, got other arguments for two samples"
            )
        return cls(spec, tuple(_leaf(name, a, b) for a, b in zip(first, values, strict=True)))

    def holding(self, value: Any) -> Layout:
        """This layout with the constants of another call; itself where they are the same."""
        pairs = list(zip(self.leaves, tree.leaves(value), strict=True))
        if all(isinstance(a, Leaf) or same(a, x) for a, x in pairs):
            return self
        return Layout(self.spec, tuple(a if isinstance(a, Leaf) else x for a, x in pairs))

    @property
    def batched(self) -> list[Leaf]:
        return [leaf for leaf in self.leaves if isinstance(leaf, Leaf)]

    def build(self, parts: list[torch.Tensor]) -> Any:
        """The tree whose batched leaves have these rows."""
        rows = iter(parts)
        return tree.unflatten([x.tensor(next(rows)) if isinstance(x, Leaf) else x for x in self.leaves], self.spec)

    @property
    def main(self) -> int:
        """The number of the batched leaf that a block is reconstructed by: the first of floating point."""
        return next(i for i, leaf in enumerate(self.batched) if leaf.dtype.is_floating_point)

    def tensors(self, value: Any) -> list[torch.Tensor]:
        """The batched leaves of a tree."""
        return [x for leaf, x in zip(self.leaves, tree.leaves(value), strict=True) if isinstance(leaf, Leaf)]

    def split(self, value: Any) -> list[torch.Tensor]:
        """The rows of the batched leaves of a tree."""
        return [leaf.rows(x) for leaf, x in zip(self.batched, self.tensors(value), strict=True)]


def same(a: Any, b: Any) -> bool:
    """Whether two values are the same. Objects that cannot be compared count as the same: they hold no tensor."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())
    if isinstance(a, bool | int | float | complex | str | None.__class__) or type(a) is not type(b):
        return type(a) is type(b) and a == b
    return True


def _leaf(name: str, one: Any, two: Any) -> Any:
    if not isinstance(two, torch.Tensor):
        if type(one) is not type(two) or (isinstance(two, bool | int | float | str) and one != two):
            raise ValueError(
                f"block {name} must be called alike whatever the batch, got {one!r:.40} for one sample and {two!r:.40} "
                f"for two; {WAY_OUT}"
            )
        if tree.hides_tensors(two):
            raise ValueError(
                f"block {name} must read and return tensors in lists, tuples, dicts or dataclasses, got a "
                f"{type(two).__name__} that holds some; {WAY_OUT}"
            )
        return two
    if not isinstance(one, torch.Tensor) or one.ndim != two.ndim:
        raise ValueError(f"block {name} must be called alike whatever the batch, got tensors of other forms for two")
    grown = [axis for axis in range(two.ndim) if two.shape[axis] != one.shape[axis]]
    if not grown:
        return two
    if len(grown) > 1 or two.shape[grown[0]] != 2 * one.shape[grown[0]]:
        raise ValueError(
            f"block {name} must have tensors of which one axis grows with the batch, "
            f"got {tuple(one.shape)} for one sample and {tuple(two.shape)} for two"
        )
    axis, count = grown[0], one.shape[grown[0]]
    rest = (*one.shape[:axis], *one.shape[axis + 1 :])
    return Leaf(axis, count, rest if count == 1 else (count, *rest), two.dtype)


@dataclass(frozen=True)
class Node:
    """What is known of a block before it is learned."""

    name: str
    inputs: Layout
    outputs: Layout
    reads: tuple[tuple[int, int], ...] | None  # for each batched input: which block returned it, at which leaf
    needs: frozenset[int]  # the blocks on whose outputs the inputs depend


class _Taint(TorchDispatchMode):
    """Follows, storage by storage, which blocks' outputs a tensor was computed from."""

    def __init__(self) -> None:
        super().__init__()
        self.of: dict[int, frozenset[int]] = {}
        self.control: frozenset[int] = frozenset()  # read on the host: anything may depend on it
        self.alive: list = []  # so that no storage's address is used twice

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        origins = self.read((args, kwargs))
        tensors = [x for x in tree.leaves(result) if isinstance(x, torch.Tensor)]
        for x in tensors:
            self.mark(x, self.of.get(storage_of(x), frozenset()) | origins)
        if not tensors:
            self.control |= origins
        return result

    def mark(self, x: torch.Tensor, origins: frozenset[int]) -> None:
        self.alive.append(x)
        self.of[storage_of(x)] = origins

    def read(self, value: Any) -> frozenset[int]:
        tensors = [x for x in tree.leaves(value) if isinstance(x, torch.Tensor)]
        return self.control.union(*(self.of.get(storage_of(x), frozenset()) for x in tensors))


@torch.no_grad()
def trace(model: nn.Module, blocks: list[str], batch: Call, sample: int = 0) -> list[Node]:
    """How blocks depend on each other, from running the model on a sample of a batch, once and twice over.

    Blocks that return the same for every sample, such as an embedding of positions, have nothing to be reconstructed
    from, and are left out.

    Raises:
        ValueError: the model does not run on these, or a tensor of a block grows with the batch along no axis, or
            along several.
    """
    one = _traced(model, blocks, alone(batch, sample))
    two = _traced(model, blocks, alone(batch, sample, 2))
    growing = [name for name, *pair in zip(blocks, one, two, strict=True) if _grows(name, *pair)]
    if growing != blocks:
        return trace(model, growing, batch, sample)
    produced: dict[tuple[int, int], tuple[int, int]] = {}
    nodes = []
    for k, name in enumerate(blocks):
        inputs = Layout.of(name, one[k].inputs, two[k].inputs)
        outputs = Layout.of(name, one[k].outputs, two[k].outputs)
        if not inputs.batched or not any(leaf.dtype.is_floating_point for leaf in outputs.batched):
            raise ValueError(f"block {name} must read tensors that grow with the batch, and return floats, got none")
        batched = [i for i, leaf in enumerate(inputs.leaves) if isinstance(leaf, Leaf)]
        reads = [produced[two[k].read[i]] for i in batched if two[k].read[i] in produced]
        computed = any(two[k].origins[i] for i in range(len(inputs.leaves)) if i not in batched)
        known = len(reads) == len(batched) and not computed
        nodes.append(Node(name, inputs, outputs, tuple(reads) if known else None, frozenset().union(*two[k].origins)))
        batched = [i for i, leaf in enumerate(outputs.leaves) if isinstance(leaf, Leaf)]
        produced.update({two[k].returned[i]: (k, place) for place, i in enumerate(batched)})
    return nodes


@dataclass
class _Visit:
    """One block's call while tracing."""

    inputs: Any = None
    outputs: Any = None
    read: list[tuple[int, int]] = field(default_factory=list)  # identity and version of each leaf
    returned: list[tuple[int, int]] = field(default_factory=list)
    origins: list[frozenset[int]] = field(default_factory=list)


def _grows(name: str, one: _Visit, two: _Visit) -> bool:
    """Whether anything that a block returns grows with the batch."""
    return bool(Layout.of(name, one.outputs, two.outputs).batched)


def alone(batch: Call, sample: int, count: int = 1) -> Callable[[nn.Module], Any]:
    """A call of a model with one sample of a batch, so many times over.

    Raises:
        ValueError: when it is called, where the model does not run on that.
    """
    call = batch.at(torch.full((count,), sample))

    def run(model: nn.Module) -> Any:
        try:
            return call(model)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise ValueError(
                "model must run on a sample alone, and on one twice over, to be learned, got "
                f"{type(error).__name__} from model({call}): {short_reason(error)}; samples must lie along the first "
                'axis of the data and not need each other, or take recipe "rtn"'
            ) from error

    return run


def _traced(model: nn.Module, blocks: list[str], call: Callable[[nn.Module], Any]) -> list[_Visit]:
    taint = _Taint()
    visits: dict[int, _Visit] = {}

    def enter(k: int):
        def hook(module, args, kwargs):
            if k in visits:  # a reused block: its first call is what is cached
                return
            leaves, spec = tree.flatten((args, dict(kwargs)))
            visits[k] = _Visit(inputs=tree.unflatten(leaves, spec))  # a list that is handed on may grow
            taint.alive.extend(leaves)
            visits[k].read = [_identity(x) for x in leaves]
            visits[k].origins = [taint.read(x) for x in leaves]

        return hook

    def leave(k: int):
        def hook(module, args, output):
            if visits[k].outputs is not None:
                return
            leaves, spec = tree.flatten(output)
            visits[k].outputs = tree.unflatten(leaves, spec)
            for x in leaves:
                if isinstance(x, torch.Tensor):
                    taint.mark(x, frozenset([k]))
            visits[k].returned = [_identity(x) for x in leaves]

        return hook

    handles = []
    for k, name in enumerate(blocks):
        block = model.get_submodule(name)
        handles += [block.register_forward_pre_hook(enter(k), with_kwargs=True, prepend=True)]
        handles += [block.register_forward_hook(leave(k))]
    with hooks(handles), taint:
        call(model)
    if silent := [blocks[k] for k in visits if visits[k].outputs is None]:
        raise ValueError(
            f"block {silent[0]} must return what it computes, got None: what it writes to its "
            f"arguments is not seen; {WAY_OUT}"
        )
    if missed := [name for k, name in enumerate(blocks) if k not in visits]:
        raise ValueError(
            f"block {missed[0]} must be called for every sample, got one that does not reach it: what reaches it is "
            f"routed by the data; {WAY_OUT}"
        )
    return [visits[k] for k in range(len(blocks))]


def _identity(x: Any) -> tuple[int, int]:
    return id(x), version_of(x) if isinstance(x, torch.Tensor) else 0
