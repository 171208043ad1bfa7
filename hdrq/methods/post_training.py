"""Post-training quantization of a whole model: data, prepared model, ranges, and a walk over its units."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hdrq import checks
from hdrq.calibrate.data import Call, calibration_calls, check_call, data_hash, first_samples, run_all
from hdrq.calibrate.finite import check_finite
from hdrq.calibrate.progress import Step
from hdrq.calibrate.ranges import attach_quantizers, reaching_samples
from hdrq.calibrate.ranks import Ranks
from hdrq.calibrate.report import RunReport, peak_memory, set_report
from hdrq.calibrate.sequential import Method
from hdrq.calibrate.settings import RunSettings
from hdrq.calibrate.shared_workdir import SharedWorkdir
from hdrq.calibrate.statistics import check_rank, collect
from hdrq.checkpoint.saving import check_storable
from hdrq.checkpoint.workdir import CHOSEN, begun_run, fingerprint, state_hash
from hdrq.checks import listed
from hdrq.evaluate.metrics import accumulated_errors
from hdrq.methods.awq import AWQ
from hdrq.methods.layerwise import LayerWise
from hdrq.methods.nearest import round_to_nearest
from hdrq.methods.reconstruct.method import Reconstruction
from hdrq.methods.reconstruct.samples import part, split
from hdrq.methods.sensitivity import chosen_bits
from hdrq.methods.walks import walk_all
from hdrq.prepare.attention import quantized_operands
from hdrq.prepare.coverage import coverage, warn_of_float, warn_of_products
from hdrq.prepare.float_model import check_module, device_of, prepare_float
from hdrq.prepare.offload import Offload
from hdrq.prepare.prepared import prepare
from hdrq.quantizers.bits import budget_of, check_bits, recorded
from hdrq.quantizers.layers import quantized_layers
from hdrq.quantizers.provenance import set_origin, set_statistics
from hdrq.recipes import Recipe
from hdrq.recipes import recipe as make_recipe
from hdrq.rng import CONTRACT, kept_random_state

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


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
    offload_folder: str | os.PathLike | None = None,
    workdir: str | os.PathLike | None = None,
    resume: bool = False,
    checkpoint_every: int = 0,
    statistics: bool | int = False,
    progress: Callable[[Step], None] | bool = True,
    process_group: ProcessGroup | None = None,
    **knobs,
) -> nn.Module:
    """Quantize a model after training, from unlabelled data.

    BatchNorm is folded. Weights and inputs of every convolution and linear layer get quantizers
    (:func:`hdrq.calibrate.ranges.attach_quantizers` says where), and so do an attention's operands
    (:mod:`hdrq.prepare.attention`). Then, block by block in forward order, what the recipe learns is learned so that
    the block's output stays that of the full-precision model; what is kept is the block's best state on samples that
    it does not learn from (``judged_samples``)::

        mean over batch and positions of Σ_channels (B_q(x) − B(x))²
          +  λ·Σ_layers ‖W − W_src‖₂  (HDRQ)   or   0.01·Σ (1 − |2h(α) − 1|^β)  (BRECQ, QDrop)

    Args:
        model: in evaluation mode; it is left as it was. Weights in half precision are learned in float32.
        calibration: a tensor, or an iterable of batches: each a tensor, a tuple or a dict of the model's arguments,
            which may be lists, tuples and dicts of tensors. Samples lie along the first axis of all tensors. A batch
            is moved to the model's device while it runs, so the whole may be larger than a GPU.
        recipe: ``"hdrq"``, ``"qdrop"``, ``"brecq"``, ``"gptq"``, ``"awq"``, ``"rtn"`` (round to nearest), or a
            :class:`hdrq.recipes.Recipe`. GPTQ and AWQ learn nothing: weights have a scale for each output channel, or
            for each group (``group_size``), and each layer is fitted to what it reads behind the quantized prefix.
        bits: ``"W4A4"``, with 8 bits for the first and the last layer; or patterns of layer names,
            ``{"stem": "W8A8", "head": "float", "*": "W4A4"}``, of which the first that matches decides.
            ``"auto:W4.5A8"``, or that in a pattern, gives each layer's weight the bits that are best for 4.5 in the
            mean (:func:`hdrq.sensitivity`). Models that are to be merged need the same: find them once.
        blocks: the names of the units of reconstruction, blocks or single layers; None finds blocks
            (:func:`hdrq.prepare.units.find_blocks`).
        source: the model before its adaptation; needed where weights are learned with a distance.
        preset: ``"paper"``, or ``"official"`` for what the recipe's released code does.
        seed: of the batches, the noise, the drops and the elements that ranges are searched on. The same seed gives the
            same bits on the same processor with the same number of threads; on CUDA it does where
            ``torch.backends.cudnn.deterministic`` is True and the model has no operation that PyTorch calls
            nondeterministic.
        iterations: for each block; None for the recipe's.
        held_out: data like ``calibration``; the report then has each block's accumulated error on it.
        cache: where inputs and targets of blocks lie: ``"auto"``, ``"device"``, ``"host"`` or ``"disk"``.
        cache_bytes: what ``"auto"`` may take on the device, and again on the host; None for half of what is free.
        graph: whether a step is captured as a CUDA graph: ``"auto"`` (where that works), True or False.
        offload_folder: a folder on a disk for the weights of the quantized model, so that they need no memory but
            while their block is learned; None for memory. The model must be on the CPU. One that is read by
            :func:`hdrq.load_float` with the same folder needs none either: ``docs/memory.md``.
        workdir: a folder for checkpoints and losses, from which ``resume=True`` goes on; None for none.
        resume: go on with the run in ``workdir``, if there is one; it ends with the bits of a run that was not stopped.
        checkpoint_every: iterations between checkpoints inside a block; 0 for none but after each block.
        statistics: keep with the model, and in its file, the second moments of what each layer reads, for merges that
            are rounded for them with no data (:mod:`hdrq.methods.statistics_merge`): True for all of
            them, 2·K² bytes for a weight of K inputs, or the rank r of a sketch, 4·K·(r + 2) bytes.
        progress: called with a :class:`Step` from time to time; True for bars if standard error is a terminal.
            Rank 0 of a process group alone is asked.
        process_group: a group of torch.distributed, such as ``torch.distributed.group.WORLD``. Every rank of it makes
            this call with the same arguments: together they reconstruct each block, each from its part of the samples,
            and return the same model. Rank 0 alone touches ``workdir``. None: this process alone, whatever is
            initialised. ``docs/distributed.md`` says what is equal to the bit.
        knobs: any other field of the recipe.

    Returns:
        A model of the same class, its weights on the grid. :func:`hdrq.quantizers.layers.quantized_layers` lists its
        quantizers, and :func:`hdrq.report.report_of` says how it went.

    Raises:
        TypeError, ValueError: "X must be …, got …".
        DivergenceError: a loss is not finite (a FloatingPointError). It names block, layer and iteration, and holds
            the model.
        OSError: a disk is full; what is finished stays in ``workdir``.
        RankError: another rank of the process group has failed (a ConnectionError).

    Source: HDRQ (Shin et al., ICML 2025); QDrop (Wei et al., ICLR 2022); BRECQ (Li et al., ICLR 2021);
    GPTQ (Frantar et al., ICLR 2023); AWQ (Lin et al., MLSys 2024).
    """
    ranks = Ranks.of(process_group)
    with ranks.together(), kept_random_state():
        if iterations is not None:
            knobs["iterations"] = iterations
        plan = make_recipe(recipe, preset, **knobs)
        check_bits(bits)
        check_options(plan, source, seed, graph, workdir, resume, checkpoint_every, statistics)
        seed, rank = int(seed), None if statistics is False else check_rank(statistics)
        check_module("model", model, bits)
        if source is not None:
            check_module("source", source, bits)
        offload = Offload.of(offload_folder, {"model": model})
        batches = calibration_calls(calibration)
        checked = None if held_out is None else calibration_calls(held_out, "held_out")
        check_call(model, batches[0])
        if checked is not None:
            check_call(model, checked[0], "held_out")
        check_shareable(plan, graph, sum(call.size for call in batches), ranks)
        states = {"model": state_hash(model.state_dict()), "calibration": data_hash(batches)}
        if source is not None:
            states["source"] = state_hash(source.state_dict())
        run = fingerprint(model, states, plan, bits, seed, blocks)
        if ranks.size > 1:
            run["processes"] = ranks.size
            ranks.check_same({**run, "workdir": workdir is not None, "resume": resume, "statistics": statistics})
        begun = None
        if workdir is not None:
            check_storable(model)
            begun = ranks.of_first(lambda: begun_run(workdir, run, resume))
        if budget_of(bits) is not None:
            bits = chosen_bits(model, batches, plan, bits, begun, offload)
            run[CHOSEN] = recorded(bits)
            ranks.check_same({CHOSEN: run[CHOSEN]})
        folder = None if workdir is None else SharedWorkdir(workdir, run, resume, ranks)
        settings = RunSettings(seed, cache, cache_bytes, progress, folder, checkpoint_every, ranks, offload)

        def methods(quantized: nn.Module) -> list[Method]:
            if plan.method == "awq":
                return [AWQ(plan, quantized, seed)]
            if plan.method == "gptq":
                return [LayerWise(plan.damping, plan.act_order)]
            if not plan.iterations:
                return []
            weights = {}
            if source is not None and plan.needs_source:
                weights = source_weights(source, quantized, batches, offload)
            return [Reconstruction(part, weights, seed, graph) for part in plan.walks()]

        facts: dict[str, Any] = {"fingerprints": states}
        if ranks.size > 1:
            facts["processes"] = ranks.size
        quantized, _ = fit(model, batches, checked, plan, methods, settings, bits=bits, blocks=blocks, facts=facts)
        if statistics is not False:
            set_statistics(quantized, collect(quantized, ranks.share(batches), rank, ranks))
        return quantized


def check_options(
    plan: Recipe,
    source: Any,
    seed: int,
    graph: bool | str,
    workdir: str | os.PathLike | None,
    resume: bool,
    checkpoint_every: int,
    statistics: bool | int,
) -> None:
    """Refuse options of :func:`quantize` that are wrong whatever the model and the data are.

    Args:
        source: None where there is none.
    """
    checks.integer("seed", seed, 0, 2**63 - 1)
    checks.integer("checkpoint_every", checkpoint_every, 0, 2**31)
    checks.choice("graph", graph, ("auto", True, False))
    if statistics is not False:
        check_rank(statistics)
    if resume and workdir is None:
        raise ValueError("workdir must be the folder of the run to resume, got None")
    if plan.needs_source and source is None:
        raise ValueError("source must be the model before its adaptation where distance > 0, got None; or distance=0")


def check_shareable(plan: Recipe, graph: bool | str, samples: int, ranks: Ranks) -> None:
    """Refuse what several ranks cannot do together.

    Args:
        samples: of all ranks.

    Raises:
        ValueError: names it, and the way out.
    """
    if ranks.size == 1:
        return
    if plan.method == "awq":
        raise ValueError(
            'recipe must be another than "awq" in a process_group: its folds are tried on the samples of one process; '
            'use one process, or "gptq"'
        )
    if graph is True:
        raise ValueError('graph must be False or "auto" in a process_group, whose exchanges no graph has, got True')
    if not plan.iterations:
        return
    if plan.noise_activations and plan.noise == "empirical":
        raise ValueError(
            'noise_activations must be False in a process_group, or noise "uniform": empirical noise has the '
            "distribution of a whole batch's rounding errors, of which a rank has a part; use one process"
        )
    if plan.batch_size % ranks.size:
        raise ValueError(
            f"batch_size must be a multiple of the {ranks.size} ranks, which have equal parts of a batch, got "
            f"{plan.batch_size}"
        )
    if not part(split(samples, plan.judged_samples)[0], samples, plan.batch_size, ranks):
        raise ValueError(
            f"calibration must have a sample to learn from for each of {ranks.size} ranks, got {samples} of which "
            f"{min(plan.judged_samples, samples // 8)} are judged by; give more, or take fewer ranks"
        )


def fit(
    model: nn.Module,
    batches: list[Call],
    checked: list[Call] | None,
    plan: Recipe,
    methods: Callable[[nn.Module], list[Method]],
    settings: RunSettings,
    *,
    bits: str | Mapping[str, str],
    blocks: Sequence[str] | None,
    facts: Mapping[str, Any],
    reaching: list[Call] | None = None,
    rounds: bool = True,
    folds: bool = True,
    teachers: Sequence[nn.Module] | None = None,
) -> tuple[nn.Module, nn.Module]:
    """What :func:`quantize` does once its arguments are checked: prepare, attach quantizers, walk, report.

    Args:
        methods: of the walks, one after the other, for the model with its quantizers; none rounds to nearest.
        facts: more of the manifest.
        reaching: samples that scales of activations are searched on; None for the first.
        rounds: whether weights are rounded at the end, and inputs quantized; else the methods fit weights in float.
        folds: whether BatchNorm is folded.
        teachers: of :func:`hdrq.calibrate.sequential.walk`.

    Returns:
        The quantized model, and the model in full precision that it was made of.
    """
    began, ranks = time.perf_counter(), settings.ranks
    reaching = reaching or reaching_samples(batches, plan)
    first, example = run_all(batches[:1], "model must run on calibration"), run_all(reaching)
    ready = prepare(
        model, first, example, bits, blocks=blocks, attention=plan.attention, fold=folds, offload=settings.offload
    )
    full, quantized, units = ready.full, ready.quantized, ready.units
    if checked is not None:
        run_all(first_samples(checked, 1), "model must run on held_out")(full)
        check_finite(full, checked, units, "held_out", ranks)
    walks = plan.iterations > 0 or plan.in_closed_form
    check_finite(full, batches if walks else reaching, units, ranks=ranks)
    placement = attach_quantizers(quantized, reaching, bits, plan, units, ready.operands, settings.seed, ranks)
    if ranks.size > 1:
        ranks.check_same({"the prepared model": state_hash(quantized.state_dict()), "units": units})
    share = coverage(quantized, full, example, sum(call.size for call in reaching))
    if rounds:
        warn_of_float(quantized, full, share, bits)
    if plan.attention:
        warn_of_products(quantized, share, bits)

    def errors() -> dict[str, float]:
        return {} if checked is None else accumulated_errors(quantized, full, checked, units, ranks)

    report = RunReport(
        plan.name,
        nearest=errors(),
        attention=quantized_operands(quantized),
        placement=placement,
        coverage=share,
    )
    if walks:
        walk_all(full, quantized, units, batches, methods(quantized), settings, report, teachers)
    if rounds:
        round_to_nearest(quantized)
    warn_of_layers(report)
    report.errors = errors() if walks else report.nearest
    report.seconds, report.peak_memory = time.perf_counter() - began, peak_memory(device_of(full))
    how = {"contract": CONTRACT, "recipe": asdict(plan), "bits": recorded(bits), "seed": settings.seed, **facts}
    set_origin(quantized, {"folded": ready.folded, **how, "coverage": share.as_dict()})
    set_report(quantized, report)
    return quantized, full


def warn_of_layers(report: RunReport) -> None:
    """Say which layers a closed form could not serve as it serves others."""
    odd = [f"{one.name} ({one.note})" for block in report.blocks for one in block.layers if one.note]
    if odd:
        warnings.warn(f"recipe {report.recipe} could not serve {listed(odd)}", stacklevel=6)


def fold(model: nn.Module, example) -> nn.Module:
    """The model, in full precision, that :func:`quantize` starts from; ``example`` is data that it runs on."""
    return prepare_float(model, run_all(calibration_calls(example, "example")[:1], "model must run on example"))[0]


def source_weights(
    source: nn.Module, model: nn.Module, batches: list[Call], offload: Offload | None = None
) -> dict[str, torch.Tensor]:
    """The source's weight, its own BatchNorm folded, for each quantized layer of a model."""
    run = run_all(batches[:1], "source must run on calibration")
    full, _ = prepare_float(source, run, "source", offload=offload)
    modules = dict(full.named_modules())
    weights, wrong = {}, []
    for name, layer in quantized_layers(model).items():
        weight = getattr(modules.get(name), "weight", None)
        if weight is None or weight.shape != layer.latent.shape:
            got = "missing" if weight is None else tuple(weight.shape)
            wrong.append(f"{name} ({tuple(layer.latent.shape)}, got {got})")
        else:
            weights[name] = weight.detach()
    if wrong:
        raise ValueError(f"source must have the layers of model, got others: {listed(wrong)}")
    return weights
