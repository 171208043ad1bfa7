"""The sequential walk: every unit of a model in forward order, each fitted behind the quantized prefix."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import nn

from hdrq.calibrate.cache import Cache
from hdrq.calibrate.data import Call
from hdrq.calibrate.progress import Step
from hdrq.calibrate.propagate import Chain
from hdrq.calibrate.report import BlockReport, RunReport
from hdrq.calibrate.trace import trace
from hdrq.checkpoint.workdir import Workdir
from hdrq.errors import DivergenceError
from hdrq.methods.reconstruct.learner import Data, Learner
from hdrq.quantizers.layers import QuantizedLayer, quantized_layers
from hdrq.quantizers.modules import ActivationQuantizer
from hdrq.recipes import Recipe


class Loop:
    """All blocks of a model, learned in forward order; what is finished already is taken from the work folder."""

    def __init__(
        self,
        full: nn.Module,
        model: nn.Module,
        blocks: list[str],
        batches: list[Call],
        plan: Recipe,
        pull: Mapping[str, torch.Tensor],
        seed: int,
        cache: Cache,
        graph: bool | str,
        folder: Workdir | None,
        every: int,
        tell: Callable[[Step], None] | None,
    ) -> None:
        self.model, self.plan, self.pull, self.seed, self.graph = model, plan, pull, seed, graph
        self.folder, self.every, self.tell = folder, every if folder is not None else 0, tell
        self.nodes = trace(full, blocks, batches[0])
        self.full, self.quantized = (Chain(m, self.nodes, batches, cache) for m in (full, model))
        self.losses: list[tuple[str, int, float]] = []
        self.finished: set[int] = set()  # parameters that an earlier block learned: a shared layer learns once

    def run(self, report: RunReport) -> None:
        """Learn every block, in order."""
        for index, node in enumerate(self.nodes):
            began = time.perf_counter()
            inputs = self.full.inputs(index)
            quantized = self.quantized.inputs(index) if node.needs else inputs
            target = self.full.run(index, inputs)[node.outputs.main]
            facts = self._block(index, Data(quantized, inputs, target))
            self.quantized.run(index, quantized)
            for chain in (self.full, self.quantized):
                chain.forget(index)
            if facts is not None:
                report.blocks.append(BlockReport(node.name, **facts, seconds=time.perf_counter() - began))
        report.losses = self.losses

    def _block(self, index: int, data: Data) -> dict[str, float] | None:
        """Learn a block, or load what was learned; its losses before and after. None where nothing is left to learn."""
        node = self.nodes[index]
        module = self.model.get_submodule(node.name)
        layers, activations = self._own(node.name)
        if not layers and not activations:
            return None
        source = {layer.name: self.pull[layer.name] for layer in layers if self.pull}
        learner = Learner(node, module, layers, activations, source, data, self.plan, self.seed, index, self.graph)
        saved = None if self.folder is None else self.folder.load_block(index)
        if saved is not None:
            tensors, facts = saved
            learner.load(tensors, self.plan.iterations)
            learner.finish()
            self.losses = [tuple(row) for row in facts["losses"]]
            return facts["report"]
        start, before = self._begin(learner, index)
        save = partial(self._save, learner, index, before)
        try:
            learner.learn(start, partial(self._log, index), save, self.every)
        except DivergenceError as error:
            save(error.good)
            learner.finish()
            raise
        learned = dict(learner.learned)
        learner.finish()
        losses = {"loss_before": before, "loss_after": learner.measure()}
        if self.folder is not None:
            self.folder.save_block(index, learned, {"losses": self.losses, "report": losses})
            self.folder.write_losses(self.losses)
        return losses

    def _own(self, block: str) -> tuple[list[QuantizedLayer], dict[str, ActivationQuantizer]]:
        """The quantizers of a block that no earlier block has learned."""
        layers = [
            layer
            for name, layer in quantized_layers(self.model).items()
            if (name == block or name.startswith(f"{block}.")) and id(layer.latent) not in self.finished
        ]
        named = self.model.get_submodule(block).named_modules(prefix=block)
        quantizers = {name: q for name, q in named if isinstance(q, ActivationQuantizer) and id(q) not in self.finished}
        self.finished |= {id(layer.latent) for layer in layers} | {id(q) for q in quantizers.values()}
        return layers, quantizers

    def _begin(self, learner: Learner, index: int) -> tuple[int, float]:
        """The iteration to start with, and the loss before the first: from the checkpoint, if there is one."""
        before = learner.measure()
        saved = None if self.folder is None else self.folder.load_current(index)
        if saved is None:
            return 0, before
        tensors, facts = saved
        learner.load(tensors, facts["iteration"])
        self.losses = [tuple(row) for row in facts["losses"]]
        return facts["iteration"], facts["loss_before"]

    def _log(self, index: int, iteration: int, loss: float) -> None:
        self.losses.append((self.nodes[index].name, iteration, loss))
        if self.tell is not None:
            blocks, iterations = len(self.nodes), self.plan.iterations
            self.tell(Step(self.nodes[index].name, index, blocks, iteration, iterations, loss))

    def _save(self, learner: Learner, index: int, before: float, iteration: int) -> None:
        if self.folder is not None:
            facts = {"index": index, "iteration": iteration, "loss_before": before, "losses": self.losses}
            self.folder.save_current(learner.state(), facts)
