"""The inputs and outputs of blocks, chained: each block runs over the calibration set once per model.

How blocks depend on each other is found by tracing one call. Where a block reads what an earlier block returned, the
very tensors, it is given the cached ones. Where something lies between them (a pooling, a reshape, a concatenation),
the model runs again up to the block, with every finished block replaced by what it returned. A block's outputs are kept
until the last block that needs them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import torch
from torch import nn

from hdrq.calibrate.cache import Cache, Rows
from hdrq.calibrate.data import Call, spans
from hdrq.calibrate.trace import WAY_OUT, Layout, Node
from hdrq.prepare.observe import hooks


class _Stop(Exception):
    """Raised by a hook once a block's inputs are known: what follows is not needed."""


class Activations:
    """What the blocks of a model read and return, over all batches of the calibration set.

    Args:
        models: one for all batches, or one for each batch, of one architecture.
    """

    def __init__(
        self, models: nn.Module | Sequence[nn.Module], nodes: list[Node], batches: list[Call], cache: Cache
    ) -> None:
        self.models = [models] * len(batches) if isinstance(models, nn.Module) else list(models)
        self.nodes, self.batches, self.cache = nodes, batches, cache
        self._outputs: dict[int, list[Rows]] = {}
        self._results: dict[int, list[Layout]] = {}  # of each batch: what blocks returned besides rows is in it
        self._layouts: dict[tuple[int, int], Layout] = {}  # of blocks whose constants a model computes, by its id

    @torch.no_grad()
    def inputs(self, k: int) -> list[Rows]:
        """The rows of a block's batched inputs. All blocks before it must have run."""
        node = self.nodes[k]
        if node.reads is not None:
            return [self._outputs[block][place] for block, place in node.reads]
        store = self._room(node.inputs)

        def enter(module, args, kwargs):
            if (k, id(model)) not in self._layouts:
                self._layouts[k, id(model)] = node.inputs.holding((args, dict(kwargs)))
            _write(node.name, store, (start, stop), node.inputs.split((args, dict(kwargs))))
            raise _Stop

        calls = zip(self.models, self.batches, spans(self.batches), strict=True)
        for number, (model, call, (start, stop)) in enumerate(calls):
            block = model.get_submodule(node.name)
            handle = block.register_forward_pre_hook(enter, with_kwargs=True, prepend=True)
            with hooks([handle]), suppress(_Stop), self._finished(model, k, number, start, stop):
                call(model)
        return store

    def layout(self, k: int, model: nn.Module) -> Layout:
        """How a block's arguments are made of rows, with the constants that a model gives it."""
        return self._layouts.get((k, id(model)), self.nodes[k].inputs)

    @torch.no_grad()
    def run(self, k: int, inputs: list[Rows]) -> list[Rows]:
        """The rows of a block's outputs, from those of its inputs; kept for the blocks that need them."""
        node, store = self.nodes[k], self._room(self.nodes[k].outputs)
        results, layout = [], node.outputs
        for model, (start, stop) in zip(self.models, spans(self.batches), strict=True):
            args, kwargs = self.layout(k, model).build([rows.read(start, stop) for rows in inputs])
            outputs = model.get_submodule(node.name)(*args, **kwargs)
            layout = layout.holding(outputs)
            results.append(layout)
            _write(node.name, store, (start, stop), node.outputs.split(outputs))
        self._outputs[k], self._results[k] = store, results
        return store

    def forget(self, k: int) -> None:
        """Let go of what no block after ``k`` needs."""
        needed = frozenset().union(*(node.needs for node in self.nodes[k + 1 :]))
        self._outputs = {j: rows for j, rows in self._outputs.items() if j in needed}
        self._results = {j: layouts for j, layouts in self._results.items() if j in needed}

    def _room(self, layout: Layout) -> list[Rows]:
        samples = sum(call.size for call in self.batches)
        return [self.cache.rows(samples, leaf.shape, leaf.dtype) for leaf in layout.batched]

    @contextmanager
    def _finished(self, model: nn.Module, k: int, number: int, start: int, stop: int) -> Iterator[None]:
        """Inside, on a batch of this number, the first call of each block before ``k`` returns its known outputs; zeros
        if ``k`` needs none.
        """
        blocks = [model.get_submodule(node.name) for node in self.nodes[:k]]
        own = [block.__dict__.get("forward") for block in blocks]
        for j, block in enumerate(blocks):
            block.forward = self._stub(j, block.forward, j in self.nodes[k].needs, number, start, stop)
        try:
            yield
        finally:
            for block, forward in zip(blocks, own, strict=True):
                del block.forward
                if forward is not None:
                    block.forward = forward

    def _stub(self, j: int, forward: Callable, needed: bool, number: int, start: int, stop: int) -> Callable:
        layout, first = self._results[j][number] if needed else self.nodes[j].outputs, True

        def returned(*args, **kwargs):
            nonlocal first
            if not first:
                return forward(*args, **kwargs)
            first = False
            if needed:
                return layout.build([rows.read(start, stop) for rows in self._outputs[j]])
            shapes = [((stop - start, *leaf.shape), leaf.dtype) for leaf in layout.batched]
            return layout.build([torch.zeros(s, dtype=d, device=self.cache.device) for s, d in shapes])

        return returned


def _write(name: str, store: list[Rows], span: tuple[int, int], parts: list[torch.Tensor]) -> None:
    start, stop = span
    for rows, part in zip(store, parts, strict=True):
        if len(part) != stop - start:
            raise ValueError(
                f"block {name} must have a row for each sample, got {len(part)} for {stop - start}: what reaches it is "
                f"routed by the data; {WAY_OUT}"
            )
        rows.write(start, part)
