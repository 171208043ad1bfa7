"""Whether units can be run again from what is kept of their calls.

A unit's rows are kept, and whatever does not grow with the batch is taken from the trace of one sample. That is right
only where it is the same in every call, which is proven here on all batches, and where running the unit again returns
what it returned, which is tried on samples of the first.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from hdrq import tree
from hdrq.calibrate.cache import Cache
from hdrq.calibrate.data import Call, spread
from hdrq.calibrate.propagate import Activations
from hdrq.calibrate.trace import WAY_OUT, Layout, Leaf, Node, alone, same
from hdrq.checks import short_reason
from hdrq.prepare.observe import hooks, observe, version_of

TRIED = 16  # samples among which one is looked for that is called as the whole batch is
AGAIN = 4  # samples of the first batch that units are run on again, and one that is called as the whole batch is
CLOSE = 1e-3  # relative difference of tensors that counts as the same; 4 roundings of half types do, too
UNPADDED = (
    "such as a mask that unpadded samples lack; give all samples in one batch, pad alike, load models of transformers "
    'with attn_implementation="eager"'
)
READS = (
    "read the same where blocks before it return what they returned without being run, got other inputs: one of them "
    "writes to what it reads, or leaves something elsewhere"
)
RETURNS = (
    "return the same for the same arguments, got outputs that differ: it keeps a state between calls, such as a "
    "key-value cache, or draws random numbers"
)
ALONE = (
    "return the same for a sample whatever others are in its batch, got outputs that differ: it mixes samples, which "
    "must lie along the first axis of the data, or knows their places"
)


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
def representative(model: nn.Module, blocks: Sequence[str], batch: Call) -> int:
    """The number of the first sample of a batch that calls blocks in the form of the whole: an unpadded one may lack
    the mask, say.

    Raises:
        ValueError: the model does not run on a sample alone.
    """
    whole = _forms(model, blocks, batch)
    for k in range(min(batch.size, TRIED)):
        if _forms(model, blocks, alone(batch, k)) == whole:
            return k
    return 0


def _forms(model: nn.Module, blocks: Sequence[str], call: Callable[[nn.Module], Any]) -> dict[str, tuple]:
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
    """Every unit reads and returns a row for each sample, and otherwise what the trace has seen, from whom it has.

    On some samples of the first batch, the units are then chained as they will be, and each is run without some rows.

    Raises:
        ValueError: a unit does something else; the message names it and what is wrong.
    """
    for number, call in enumerate(batches):
        _watched(model, nodes, call, number)
    formed = representative(model, [node.name for node in nodes], batches[0])
    few = batches[0].at(torch.tensor(sorted({formed, *spread(batches[0].size, AGAIN)})))
    _repeat(model, nodes, few, _watched(model, nodes, few, 0, keep=True).kept)


def _watched(model: nn.Module, nodes: Sequence[Node], call: Call, number: int, keep: bool = False) -> _Watched:
    run = _Watched(model, nodes, call.size, number, keep)
    with hooks(run.hooks()):
        call(model)
    if missed := [node.name for k, node in enumerate(nodes) if k not in run.order]:
        raise ValueError(
            f"block {missed[0]} must be called for every batch, got no call for batch {number}: what reaches it is "
            f"routed by the data; {WAY_OUT}"
        )
    return run


def _repeat(model: nn.Module, nodes: Sequence[Node], call: Call, kept: Mapping[int, list[list[torch.Tensor]]]) -> None:
    """Chain the units, and run each on some rows in another order; compare with the rows that were kept of a run."""
    chain = Activations(model, list(nodes), [call], Cache(next(model.parameters()).device, "device"))
    some = torch.arange(call.size).flip(0)[::2]
    for k, node in enumerate(nodes):
        try:
            read = chain.inputs(k)
            chain.run(k, read)
            returned = chain.run(k, read)  # a state may show at the second call alone
            args, kwargs = chain.layout(k, model).build([rows[some] for rows in kept[k][0]])
            parts = node.outputs.split(model.get_submodule(node.name)(*args, **kwargs))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise ValueError(
                f"block {node.name} must run again on samples of a batch, got {type(error).__name__}: "
                f"{short_reason(error)}; {WAY_OUT}"
            ) from error
        for why, ours, theirs in (
            (READS, [rows.tensor for rows in read], kept[k][0]),
            (RETURNS, [rows.tensor for rows in returned], kept[k][1]),
            (ALONE, parts, [rows[some] for rows in kept[k][1]]),
        ):
            if not all(map(_close, ours, theirs)):
                raise ValueError(f"block {node.name} must {why}; {WAY_OUT}")
        chain.forget(k)


class _Watched:
    """One run of a model, in which the first call of each unit is checked, and with ``keep`` its rows are kept."""

    def __init__(self, model: nn.Module, nodes: Sequence[Node], size: int, number: int, keep: bool) -> None:
        self.model, self.nodes, self.size, self.number, self.keep = model, nodes, size, number, keep
        self.order: list[int] = []  # the units that were called, by their numbers
        self.kept: dict[int, list[list[torch.Tensor]]] = {}  # rows that a unit read, and that it returned
        self._returned: dict[tuple[int, int], tuple[weakref.ref[torch.Tensor], int]] = {}
        self._running: set[int] = set()

    def hooks(self) -> list:
        handles = []
        for k, node in enumerate(self.nodes):
            block = self.model.get_submodule(node.name)
            handles.append(block.register_forward_pre_hook(partial(self._enter, k), with_kwargs=True, prepend=True))
            handles.append(block.register_forward_hook(partial(self._leave, k)))
        return handles

    def _enter(self, k: int, module: nn.Module, args: tuple, kwargs: dict) -> None:
        node = self.nodes[k]
        if k in self.order or k in self._running:
            return
        self._running.add(k)
        read = args, dict(kwargs)
        _check(node.name, "reads", node.inputs, read, self.size)
        self._check_source(node, read)
        if late := [self.nodes[j].name for j in node.needs if j not in self.order]:
            raise ValueError(
                f"block {node.name} must be called behind {late[0]} in every batch, as on the first sample, got "
                f"another order in batch {self.number}; {WAY_OUT}"
            )
        if self.keep:
            self.kept[k] = [[rows.detach().clone() for rows in node.inputs.split(read)]]

    def _check_source(self, node: Node, read: Any) -> None:
        """The tensors that a unit reads are those that the units returned from which the trace has them."""
        for x, source in zip(node.inputs.tensors(read), node.reads or (), strict=False):
            returned, version = self._returned.get(source, (None, 0))
            if returned is None or returned() is not x or version != version_of(x):
                raise ValueError(
                    f"block {node.name} must read what {self.nodes[source[0]].name} returned in every batch, as on the "
                    f"first sample, got another tensor in batch {self.number}: what lies between them depends on the "
                    f"data; {WAY_OUT}"
                )

    def _leave(self, k: int, module: nn.Module, args: tuple, output: Any) -> None:
        node = self.nodes[k]
        if k in self.order:
            return
        _check(node.name, "returns", node.outputs, output, self.size)
        self.order.append(k)
        values = enumerate(node.outputs.tensors(output))
        self._returned |= {(k, place): (weakref.ref(x), version_of(x)) for place, x in values}
        if self.keep:
            self.kept[k].append([rows.detach().clone() for rows in node.outputs.split(output)])


def _check(name: str, verb: str, layout: Layout, value: Any, size: int) -> None:
    values, spec = tree.flatten(value)
    if spec != layout.spec:
        raise ValueError(f"block {name} must be called alike for every batch, got arguments of another form; {WAY_OUT}")
    for leaf, x in zip(layout.leaves, values, strict=True):
        if isinstance(leaf, Leaf):
            if not isinstance(x, torch.Tensor):
                raise ValueError(
                    f"block {name} must be called alike for every batch, got {x!r:.40} where another sample has a "
                    f"tensor with rows of {leaf.shape}, {UNPADDED}, or {WAY_OUT}"
                )
            rows = x.shape[leaf.axis] / leaf.count if x.ndim > leaf.axis else 0
            if rows != size:
                raise ValueError(
                    f"block {name} must have a row for each sample, but {verb} {rows:g} for {size} samples: what "
                    f"reaches it is routed by the data; {WAY_OUT}"
                )
        elif verb == "reads" and not same(leaf, x):
            hint = f", {UNPADDED}, or " if leaf is None else "; "
            raise ValueError(
                f"block {name} must read the same for every batch, apart from what grows with the batch, got "
                f"{_short(leaf)} and {_short(x)}{hint}{WAY_OUT}"
            )


def _close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether two tensors are the same but for rounding; all count as such that are not of floating point."""
    if not theirs.is_floating_point():
        return True
    finite, bound = theirs.isfinite(), max(CLOSE, 4 * torch.finfo(theirs.dtype).eps)
    ours, theirs = (x.to(theirs.device).double().where(finite, 0.0) for x in (ours, theirs))
    return bool((ours - theirs).norm() <= bound * theirs.norm())


def _short(value: Any) -> str:
    return f"a tensor of {tuple(value.shape)}" if isinstance(value, torch.Tensor) else f"{value!r:.40}"
