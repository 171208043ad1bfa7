"""The block-wise loop: quantize a model, one block after the other, so that each block's output is kept."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial

import torch
from torch import nn

from hdrq import checks
from hdrq.attention import expose_operands, quantized_operands, replace_attention
from hdrq.block import Data, Diverged, Learner, settle
from hdrq.blocks import find_blocks
from hdrq.cache import Cache
from hdrq.calibration import Call, calibration_calls, first_samples, run_all
from hdrq.chain import Chain, trace
from hdrq.evaluate import accumulated_errors
from hdrq.folding import fold_batchnorm
from hdrq.model import (
    QuantizedLayer,
    attach_quantizers,
    check_float,
    quantized_layers,
    set_origin,
)
from hdrq.progress import Step, bars
from hdrq.quantizers import ActivationQuantizer
from hdrq.recipes import Recipe
from hdrq.recipes import recipe as make_recipe
from hdrq.report import BlockReport, RunReport, peak_memory, set_report
from hdrq.resume import Workdir, fingerprint, listed, state_hash
from hdrq.uncalled import refuse_uncalled


@torch.inference_mode(False)
@torch.enable_grad()
def quantize(
    model: nn.Module,
    calibration: torch.Tensor | Iterable,
    recipe: str | Recipe = "hdrq",
    *,
    bits: str | Mapping[str, str] = "W4A4",
    source: nn.Module | None = None,
    blocks: Sequence[str] | None = None,
    preset: str = "paper",
    seed: int = 0,
    iterations: int | None = None,
    held_out: torch.Tensor | Iterable | None = None,
    cache: str = "auto",
    cache_bytes: int | None = None,
    graph: bool | str = "auto",
    workdir: str | os.PathLike | None = None,
    resume: bool = False,
    checkpoint_every: int = 0,
    progress: Callable[[Step], None] | bool = True,
    **knobs,
) -> nn.Module:
    """Quantize a model after training, from unlabelled data.

    BatchNorm is folded; weights and inputs of every convolution and linear layer get quantizers
    (:func:`hdrq.model.attach_quantizers` says where), and so do an attention's operands (:mod:`hdrq.attention`); then,
    block by block in forward order, what the recipe learns is learned so that the block's output stays that of the
    full-precision model::

        mean over batch and positions of Σ_channels (B_q(x) − B(x))²
          +  λ·Σ_layers ‖W − W_src‖₂  (HDRQ)   or   0.01·Σ (1 − |2h(α) − 1|^β)  (BRECQ, QDrop)

    Args:
        model: in evaluation mode; it is left as it was. Weights in half precision are learned in float32.
        calibration: a tensor, or an iterable of batches: each a tensor, a tuple or a dict of the model's arguments.
        recipe: ``"hdrq"``, ``"qdrop"``, ``"brecq"``, ``"rtn"`` (round to nearest), or a :class:`hdrq.recipes.Recipe`.
        bits: ``"W4A4"``, with 8 bits for the first and the last layer; or patterns of layer names,
            ``{"stem": "W8A8", "head": "float", "*": "W4A4"}``, of which the first that matches decides.
        blocks: the names of the units of reconstruction, blocks or single layers; None finds blocks
            (:func:`hdrq.blocks.find_blocks`).
        source: the model before its adaptation; needed where the recipe has a distance.
        preset: ``"paper"`` or ``"official"``.
        seed: of the batches, the noise and the drops: the same seed gives the same bits on the same machine.
        iterations: for each block; None for the recipe's.
        held_out: data like ``calibration``; the report then has each block's accumulated error on it.
        cache: where inputs and targets of blocks lie: ``"auto"``, ``"device"``, ``"host"`` or ``"disk"``.
        cache_bytes: what ``"auto"`` may take on the device, and again on the host; None for half of what is free.
        graph: whether a step is captured as a CUDA graph: ``"auto"`` (where that works), True or False.
        workdir: a folder for checkpoints and losses, from which ``resume=True`` goes on; None for none.
        resume: go on with the run in ``workdir``, if there is one; it ends with the bits of a run that was not stopped.
        checkpoint_every: iterations between checkpoints inside a block; 0 for none but after each block.
        progress: called with a :class:`Step` from time to time; True for bars if standard error is a terminal.
        knobs: any other field of the recipe.

    Returns:
        A model of the same class, its weights on the grid; :func:`hdrq.model.quantized_layers` lists its quantizers,
        :func:`hdrq.report.report_of` says how it went.

    Raises:
        TypeError, ValueError: "X must be …, got …".
        Diverged: a loss is not finite (a FloatingPointError); it names block, layer and iteration, and holds the model.
        OSError: a disk is full; what is finished stays in ``workdir``.

    Source: HDRQ (Shin et al., ICML 2025); QDrop (Wei et al., ICLR 2022); BRECQ (Li et al., ICLR 2021).
    """
    if iterations is not None:
        knobs["iterations"] = iterations
    plan = make_recipe(recipe, preset, **knobs)
    seed = checks.integer("seed", seed, 0, 2**63 - 1)
    checks.integer("checkpoint_every", checkpoint_every, 0, 2**31)
    checks.choice("graph", graph, ("auto", True, False))
    if resume and workdir is None:
        raise ValueError("workdir must be the folder of the run to resume, got None")
    check_module("model", model)
    batches = calibration_calls(calibration)
    checked = None if held_out is None else calibration_calls(held_out, "held_out")
    learns = plan.iterations > 0
    if learns and plan.distance > 0 and source is None:
        raise ValueError("source must be the model before its adaptation where distance > 0, got None; or distance=0")
    folder = None
    if workdir is not None:
        folder = Workdir(workdir, fingerprint(model, source, batches, plan, bits, seed), resume)

    began = time.perf_counter()
    full, folded = prepare_float(model, batches)
    quantized = copy.deepcopy(full)
    example = run_all(first_samples(batches, 1))
    units = find_blocks(full, example, blocks)
    refuse_uncalled(quantized, example, bits)
    operands = expose_operands(quantized, example) if plan.attention else []
    ranged = run_all(first_samples(batches, plan.range_samples))
    attach_quantizers(quantized, ranged, example, bits, plan, units, operands)

    def errors() -> dict[str, float]:
        return {} if checked is None else accumulated_errors(quantized, full, checked, units)

    report = RunReport(plan.name, nearest=errors(), attention=quantized_operands(quantized))
    if learns:
        pull = {} if source is None or plan.distance == 0 else source_weights(source, quantized, batches)
        store = Cache(device_of(full), cache, cache_bytes, None if folder is None else folder.path)
        with bars() if progress is True else nullcontext(progress or None) as tell:
            loop = Loop(full, quantized, units, batches, plan, pull, seed, store, graph, folder, checkpoint_every, tell)
            try:
                loop.run(report)
            except Diverged as error:
                error.model = _finish(quantized)
                raise
        report.cache_peak = store.peak
    _finish(quantized)
    report.errors = errors() if learns else report.nearest
    report.seconds, report.peak_memory = time.perf_counter() - began, peak_memory(device_of(full))
    policy = bits if isinstance(bits, str) else dict(bits)
    states = {"model": state_hash(model.state_dict())}
    if source is not None:
        states["source"] = state_hash(source.state_dict())
    set_origin(
        quantized, {"folded": folded, "recipe": asdict(plan), "bits": policy, "seed": seed, "fingerprints": states}
    )
    set_report(quantized, report)
    return quantized


def check_module(name: str, model: nn.Module) -> None:
    """``model`` is a module in full precision and in evaluation mode."""
    check_float(name, model)
    if model.training:
        raise ValueError(f"{name} must be in evaluation mode, got training mode; call {name}.eval()")


def device_of(model: nn.Module) -> torch.device:
    """Where a model's first parameter is."""
    return next(model.parameters()).device


def prepare_float(model: nn.Module, batches: list[Call]) -> tuple[nn.Module, dict[str, str]]:
    """A copy of a model with BatchNorm folded, its packed attentions replaced and no gradients; what was folded."""
    full = copy.deepcopy(model).requires_grad_(False)
    run = run_all(batches[:1])
    replace_attention(full, run)
    return full, fold_batchnorm(full, run)


def fold(model: nn.Module, example) -> nn.Module:
    """The model, in full precision, that :func:`quantize` starts from; ``example`` is data that it runs on."""
    return prepare_float(model, calibration_calls(example))[0]


def source_weights(source: nn.Module, model: nn.Module, batches: list[Call]) -> dict[str, torch.Tensor]:
    """The source's weight, its own BatchNorm folded, for each quantized layer of a model: in float32."""
    check_module("source", source)
    full, _ = prepare_float(source, batches)
    modules = dict(full.named_modules())
    weights, wrong = {}, []
    for name, layer in quantized_layers(model).items():
        theirs = getattr(modules.get(name), "weight", None)
        if theirs is None or theirs.shape != layer.latent.shape:
            got = "missing" if theirs is None else tuple(theirs.shape)
            wrong.append(f"{name} ({tuple(layer.latent.shape)}, got {got})")
        else:
            weights[name] = theirs.detach().to(layer.latent.device, torch.float32)
    if wrong:
        raise ValueError(f"source must have the layers of model, got others: {listed(wrong)}")
    return weights


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
        except Diverged as error:
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


@torch.no_grad()
def _finish(model: nn.Module) -> nn.Module:
    """Put every weight on its grid."""
    for layer in quantized_layers(model).values():
        settle(layer)
    return model.requires_grad_(False)
