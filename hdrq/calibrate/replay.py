"""Whether units can be run again from what is kept of their calls.

A unit's rows are kept, and whatever does not grow with the batch is taken from the trace of one sample. That is right
only where it is the same in every call, which is proven here on all batches, and where running the unit again returns
what it returned, which is tried on the first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from hdrq import tree
from hdrq.calibrate.data import Call
from hdrq.calibrate.trace import WAY_OUT, Layout, Leaf, Node
from hdrq.prepare.observe import hooks, observe

TRIED = 16  # samples among which one is looked for that is called as the whole batch is
CLOSE = 1e-3  # relative difference of outputs that counts as the same, half types included


@contextmanager
def without_caches(*models: nn.Module) -> Iterator[None]:
    """Inside the block no decoder of transformers fills a key-value cache: a replay would attend to earlier keys."""
    configs = {id(c): c for m in models for x in m.modules() if (c := getattr(x, "config", None)) is not None}
    caching = [c for c in configs.values() if getattr(c, "use_cache", False) is True]
    for config in caching:
        config.use_cache = False
    try:
        yield
    finally:
        for config in caching:
            config.use_cache = True


@torch.no_grad()
def representative(model: nn.Module, blocks: Sequence[str], batch: Call) -> Call:
    """The first sample that calls blocks in the form of the whole batch: an unpadded one may lack the mask, say."""
    whole = _forms(model, blocks, batch)
    for k in range(min(batch.size, TRIED)):
        sample = batch.at(torch.tensor([k]))
        if _forms(model, blocks, sample) == whole:
            return sample
    return batch.at(torch.tensor([0]))


def _forms(model: nn.Module, blocks: Sequence[str], call: Call) -> dict[str, tuple]:
    """For each block, how its first call is made up: which leaves are tensors."""
    found: dict[str, tuple] = {}

    def note(name: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if name not in found:
            values, spec = tree.flatten((args, dict(kwargs)))
            found[name] = spec, [isinstance(x, torch.Tensor) for x in values]

    observe(model, call, before=note, names=blocks)
    return found


@torch.no_grad()
def check_replay(model: nn.Module, nodes: Sequence[Node], batches: Sequence[Call]) -> None:
    """Every unit reads and returns a row for each sample, and otherwise what the trace has seen.

    Raises:
        ValueError: it does not; the message names the unit and what is wrong.
    """
    for number, call in enumerate(batches):
        reached: set[str] = set()
        handles = []
        for node in nodes:
            handles += _watch(model.get_submodule(node.name), node, call.size, reached, again=number == 0)
        with hooks(handles):
            call(model)
        if missed := [node.name for node in nodes if node.name not in reached]:
            raise ValueError(
                f"block {missed[0]} must be called for every batch, got no call for batch {number}: what reaches it is "
                f"routed by the data; {WAY_OUT}"
            )


def _watch(block: nn.Module, node: Node, size: int, reached: set[str], again: bool) -> list:
    """Hooks that check a block's first call, and with ``again`` run it once more."""
    read: list = []
    state = {"busy": False}

    def enter(module, args, kwargs):
        if node.name in reached or state["busy"]:
            return
        _check(node.name, "reads", node.inputs, (args, dict(kwargs)), size)
        if again:
            read.extend(rows.clone() for rows in node.inputs.split((args, dict(kwargs))))

    def leave(module, args, output):
        if node.name in reached or state["busy"]:
            return
        _check(node.name, "returns", node.outputs, output, size)
        reached.add(node.name)
        if again:
            kept = [rows.clone() for rows in node.outputs.split(output)]
            built_args, built_kwargs = node.inputs.build(read)
            state["busy"] = True
            try:
                repeated = node.outputs.split(block(*built_args, **built_kwargs))
            finally:
                state["busy"] = False
            read.clear()
            for ours, theirs in zip(repeated, kept, strict=True):
                _check_same(node.name, ours, theirs)

    return [
        block.register_forward_pre_hook(enter, with_kwargs=True, prepend=True),
        block.register_forward_hook(leave),
    ]


def _check(name: str, verb: str, layout: Layout, value: Any, size: int) -> None:
    values, spec = tree.flatten(value)
    if spec != layout.spec:
        raise ValueError(f"block {name} must be called alike for every batch, got arguments of another form; {WAY_OUT}")
    for leaf, x in zip(layout.leaves, values, strict=True):
        if isinstance(leaf, Leaf):
            if not isinstance(x, torch.Tensor):
                raise ValueError(
                    f"block {name} must be called alike for every batch, got {x!r:.40} where another sample has a "
                    f"tensor with rows of {leaf.shape}, such as a mask that "
                    f"unpadded samples lack; pad and batch alike, or {WAY_OUT}"
                )
            rows = x.shape[leaf.axis] / leaf.count if x.ndim > leaf.axis else 0
            if rows != size:
                raise ValueError(
                    f"block {name} must have a row for each sample, but {verb} {rows:g} for {size} samples: what "
                    f"reaches it is routed by the data; {WAY_OUT}"
                )
        elif verb == "reads" and not _same(leaf, x):
            raise ValueError(
                f"block {name} must read the same for every batch, apart from what grows with the batch, got "
                f"{_short(leaf)} and {_short(x)}; {WAY_OUT}"
            )


def _check_same(name: str, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Refuse a block that returns something else when it is run again."""
    if not theirs.is_floating_point():
        return
    finite = theirs.isfinite()
    ours, theirs = (x.double().where(finite, 0.0) for x in (ours, theirs))
    if (ours - theirs).norm() > CLOSE * theirs.norm():
        raise ValueError(
            f"block {name} must return the same for the same arguments, got outputs that differ: it keeps a state "
            f"between calls, such as a key-value cache, or draws random numbers; {WAY_OUT}"
        )


def _same(a: Any, b: Any) -> bool:
    """Whether two values are the same. Objects that cannot be compared count as the same: they hold no tensor."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())
    if isinstance(a, bool | int | float | complex | str | None.__class__) or type(a) is not type(b):
        return type(a) is type(b) and a == b
    return True


def _short(value: Any) -> str:
    return f"a tensor of {tuple(value.shape)}" if isinstance(value, torch.Tensor) else f"{value!r:.40}"
