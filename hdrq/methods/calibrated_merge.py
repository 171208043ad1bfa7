"""Merges of models that exist as integers, calibrated by what they do with a few samples of each one's task."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, fields
from typing import Any

import torch
from torch import nn

from hdrq import checks
from hdrq.calibrate.data import Call, data_hash, run_all
from hdrq.calibrate.finite import check_finite
from hdrq.calibrate.progress import Step
from hdrq.calibrate.report import RunReport, peak_memory, set_report
from hdrq.calibrate.sequential import Method
from hdrq.calibrate.settings import RunSettings
from hdrq.checkpoint.architecture import build
from hdrq.checkpoint.deferred import built_on_meta
from hdrq.checkpoint.files import output_path
from hdrq.checkpoint.format import STRUCTURE, Reader
from hdrq.checkpoint.loading import arguments_for, float_dtype, load, manifest_of
from hdrq.checkpoint.saving import check_storable, save_or_keep
from hdrq.checkpoint.workdir import opened, state_hash, surroundings
from hdrq.evaluate.averaging import weighted_mean
from hdrq.merging.assessment import check_ready
from hdrq.merging.inputs import Inputs
from hdrq.merging.models import fill, states_of
from hdrq.merging.settings import MergeSettings
from hdrq.merging.sources import Source, dequantized
from hdrq.methods.layerwise import Guidance, Target
from hdrq.methods.nearest import round_to_nearest
from hdrq.methods.post_merge import LEARNED, calls_of_tasks, spans
from hdrq.methods.post_training import warn_of_layers
from hdrq.methods.reconstruct.method import Reconstruction
from hdrq.methods.walks import walk_all
from hdrq.prepare.copying import copy_model
from hdrq.prepare.float_model import check_evaluated, device_of
from hdrq.prepare.offload import Offload
from hdrq.prepare.units import find_blocks
from hdrq.quantizers.layers import QuantizedLayer, quantized_layers
from hdrq.quantizers.modules import Quantizer
from hdrq.quantizers.provenance import origin, set_origin
from hdrq.recipes import Recipe
from hdrq.recipes import recipe as make_recipe

CLOSED_FORM = "closed-form"
METHODS = (CLOSED_FORM, *LEARNED)
# Fields of a recipe that the models' own quantizers have decided, or that are GPTQ's and AWQ's.
DECIDED = (
    *("name", "method", "damping", "act_order", "clip", "candidates", "range_samples", "range_union", "attention"),
    *("quantize_input", "affine_activations", "activation_placement", "learn_outputs"),
    *("per_channel", "group_size", "affine_weights"),
)


@torch.inference_mode(False)
@torch.enable_grad()
def merge_calibrated(
    models: Sequence[nn.Module | str | os.PathLike],
    calibration: Sequence[Any],
    *,
    architecture: nn.Module | str | None = None,
    weights: Sequence[float] | None = None,
    bits: str | None = None,
    method: str = CLOSED_FORM,
    blocks: Sequence[str] | None = None,
    seed: int = 0,
    cache: str = "auto",
    cache_bytes: int | None = None,
    offload_folder: str | os.PathLike | None = None,
    workdir: str | os.PathLike | None = None,
    resume: bool = False,
    checkpoint_every: int = 0,
    progress: Callable[[Step], None] | bool = True,
    **options: Any,
) -> nn.Module:
    """:func:`hdrq.merge` of quantized models, its integers chosen for a few samples of each model's task.

    Scales, ranges and what is not quantized are first those of :func:`hdrq.merge`, and weights the mean W_m of the
    models' ``W_t = (I_t − z_t)·Δ_t``. No original is needed. Methods:

    - ``"closed-form"``: layers are rounded one after the other by GPTQ for what they read behind those that are
      finished. ``target="mean"`` rounds W_m, ``"experts"`` what has the models' outputs, see
      :func:`hdrq.methods.post_merge.post_merge`, whose equations are these. Scales stay.
    - ``"hdrq"``, ``"qdrop"``, ``"brecq"``: block reconstruction of that recipe, from W_m and those scales on. With B_t
      a block of model t as it runs, its activations quantized, B the merge's, and x_t, x̂_t what they read on a sample
      of task t::

          mean over samples and positions of Σ_channels (B(x̂_t) − B_t(x_t))²  +  distance·Σ_layers ‖W − W_m‖₂  (HDRQ)

      Each sample counts alike, whatever λ and its task. With 0 ``iterations`` the result is :func:`hdrq.merge` with
      rule ``"half-even"``.

    In memory are two models, the merge and W_m, at most; and the models given, where they are modules. The closed form
    reads files a layer at a time. Blocks need every model whole while they are learned, files or not: what lies between
    units runs a model from its start. ``offload_folder`` keeps all of these in files, but the unit that is learned. To
    that come the rows that ``cache`` keeps, and in closed form the moments of a layer (``docs/post-merge.md``).

    Args:
        models: two or more results of :func:`hdrq.quantize`, of one architecture, in evaluation mode and left as they
            are; or as many files that :func:`hdrq.save` wrote.
        calibration: for each model, data of its task as for :func:`hdrq.quantize`.
        architecture: of files, as for :func:`hdrq.load`; one that is made by name or by a function needs no memory for
            its weights where ``offload_folder`` is given.
        weights, bits: of :func:`hdrq.merge`.
        method: see above.
        blocks, progress, cache, cache_bytes, offload_folder, workdir, resume, checkpoint_every: of
            :func:`hdrq.quantize`.
        seed: of batches, noise and drops.
        options: with ``"closed-form"`` fields of :class:`hdrq.methods.layerwise.Guidance`, such as ``target``; else of
            :class:`hdrq.recipes.Recipe`, such as ``iterations``, but for those that the quantizers of the models
            decide (:data:`DECIDED`).

    Returns:
        A quantized model, with a report (:func:`hdrq.report.report_of`).

    Raises:
        TypeError, ValueError: "X must be …, got …"; what differs between the models.
        FileNotFoundError: no such file.
        DivergenceError: a loss is not finite; see :func:`hdrq.quantize`.
    """
    began = time.perf_counter()
    plan, models = plan_of(method, options), list(models)
    settings = MergeSettings(weights, "half-even", seed=seed, bits=bits)
    shares = checks.mixing_weights(weights, len(models))
    checks.integer("checkpoint_every", checkpoint_every, 0, 2**31)
    offload = Offload.of(offload_folder, {f"models[{k}]": m for k, m in enumerate(models) if isinstance(m, nn.Module)})
    with ExitStack() as stack:
        sources, merged = _opened(models, architecture, stack, offload)
        by_task = calls_of_tasks([merged] * len(models), calibration, "models")
        _check_grids(plan, sources)
        check_ready(fill(merged, Inputs(sources, settings), settings), "warn")
        how = _facts(method, plan, seed, by_task)

        def fingerprint() -> dict[str, Any]:
            knobs = {f"recipe.{name}": value for name, value in how.get("recipe", {}).items()}
            run = {**surroundings(merged, seed, blocks), "weights": list(shares), "bits": bits, **how, **knobs}
            run |= {"recipe": method, "models": [_hash(source) for source in sources]}
            return run | {"tasks": [data_hash(calls) for calls in by_task]}

        if workdir is not None:
            check_storable(merged)
        folder = opened(workdir, resume, fingerprint)
        run = RunSettings(seed, cache, cache_bytes, progress, folder, checkpoint_every, offload=offload)
        own = [_Layers(source, quantized_layers(merged)) for source in sources]
        if isinstance(plan, Guidance) or plan.iterations:
            _take_mean(merged, own, shares)
        full = _unquantized(merged, offload)
        if isinstance(plan, Guidance):
            report = RunReport(f"merge towards {plan.target}")
            _walk(full, merged, by_task, [plan.method(own, spans(by_task))], run, report, blocks)
        else:
            report = RunReport(f"blocks of {method}")
            teachers = [
                m if isinstance(m, nn.Module) else load(m, architecture, offload_folder=offload_folder) for m in models
            ]
            _walk(full, merged, by_task, _learning(plan, full, seed), run, report, blocks, teachers)
    round_to_nearest(merged)
    warn_of_layers(report)
    report.seconds, report.peak_memory = time.perf_counter() - began, peak_memory(device_of(merged))
    set_report(merged, report)
    set_origin(merged, {**origin(merged), "calibrated": how})
    return merged


def plan_of(method: str, options: Mapping[str, Any]) -> Guidance | Recipe:
    """What a method of :func:`merge_calibrated` does, from the options that it knows.

    Raises:
        TypeError, ValueError: "X must be …, got …".
    """
    checks.choice("method", method, METHODS)
    closed, every = method == CLOSED_FORM, {f.name for kind in (Guidance, Recipe) for f in fields(kind)}
    for name in options:
        checks.choice("an option", name, tuple(sorted(every - {"name", "method"})))
    known = {f.name for f in fields(Guidance if closed else Recipe)} - (set() if closed else set(DECIDED))
    for name, value in options.items():
        if name not in known:
            why = ", which has the quantizers of its models" if name in DECIDED and not closed else ""
            raise ValueError(f'{name} must be left out with method="{method}"{why}, got {value!r}')
    if closed:
        return Guidance(**options)
    return make_recipe(method, **options)


def _opened(
    models: Sequence[Any], architecture: nn.Module | str | None, stack: ExitStack, offload: Offload | None
) -> tuple[list[Source], nn.Module]:
    """The models as sources, and a copy of the first, to be filled."""
    if any(isinstance(model, str | os.PathLike) for model in models):
        if not all(isinstance(model, str | os.PathLike) for model in models):
            raise TypeError("models must be modules, or files all of them, got both")
        folder = None if offload is None else offload.folder
        return (
            [stack.enter_context(Reader(path)) for path in models],
            load(models[0], architecture, offload_folder=folder),
        )
    if architecture is not None:
        raise ValueError("architecture must be left out with models that are modules, got one")
    sources = states_of(models)
    for k, model in enumerate(models):
        check_evaluated(f"models[{k}]", model)
    return sources, copy_model("models[0]", models[0], offload)


def _check_grids(plan: Guidance | Recipe, sources: Sequence[Source]) -> None:
    """Refuse to learn weights with zero points, of which the noise in place of rounding knows nothing."""
    affine = [name for name, facts in sources[0].manifest["weights"].items() if facts.get("affine")]
    if isinstance(plan, Recipe) and plan.learns == "weights" and plan.iterations and affine:
        raise ValueError(
            'method must be "qdrop", "brecq" or "closed-form" for weights with zero points, which noise does not '
            f'know, got "{plan.name}" for {checks.listed(affine)}'
        )


def _facts(method: str, plan: Guidance | Recipe, seed: int, by_task: Sequence[Sequence[Call]]) -> dict[str, Any]:
    """What the manifest says of a calibrated merge beside what it says of every merge."""
    own = asdict(plan) if isinstance(plan, Guidance) else {"seed": seed, "recipe": asdict(plan)}
    return {"method": method, **own, "calibration": data_hash([call for calls in by_task for call in calls])}


def _hash(source: Source) -> str:
    """A fingerprint of a model, the same in memory and in a file."""
    tables = json.dumps([source.manifest[key] for key in STRUCTURE[2:] if key in source.manifest], sort_keys=True)
    return state_hash({name: source.tensor(name) for name in sorted(source.specs)}, tables)


class _Layers(Mapping[str, Target]):
    """What a model has in the place of each quantized layer of the merge, made of its integers when it is asked for."""

    def __init__(self, source: Source, layers: Mapping[str, QuantizedLayer]) -> None:
        self.source, self.layers = source, layers

    def __getitem__(self, name: str) -> Target:
        layer, bias = self.layers[name], f"{name}.bias".removeprefix(".")
        weight = dequantized(self.source, self.source.manifest["tied"].get(name, name)).to(layer.latent)
        has_bias = getattr(layer.module, "bias", None) is not None
        return Target(weight, self.source.tensor(bias).to(weight.device) if has_bias else None)

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)


@torch.no_grad()
def _take_mean(merged: nn.Module, models: Sequence[_Layers], shares: Sequence[float]) -> None:
    """Put the mean of the models' weights into a merge, off its grid."""
    for name, layer in quantized_layers(merged).items():
        layer.latent.copy_(weighted_mean(shares, [each[name].weight for each in models]))


def _unquantized(model: nn.Module, offload: Offload | None) -> nn.Module:
    """A copy whose quantizers let everything pass."""
    full = copy_model("models[0]", model, offload)
    for module in full.modules():
        if isinstance(module, Quantizer):
            module.mode = "float"
    return full


def _learning(plan: Recipe, full: nn.Module, seed: int) -> list[Method]:
    """The walks of a recipe, whose distance is from the weights of ``full``."""
    layers = quantized_layers(full) if plan.needs_source else {}
    anchor = {name: layer.latent.detach().float() for name, layer in layers.items()}
    return [Reconstruction(part, anchor, seed) for part in plan.walks()] if plan.iterations else []


def _walk(
    full: nn.Module,
    merged: nn.Module,
    by_task: Sequence[Sequence[Call]],
    methods: Sequence[Method],
    run: RunSettings,
    report: RunReport,
    blocks: Sequence[str] | None,
    teachers: Sequence[nn.Module] | None = None,
) -> None:
    """Fit the merge, in place; with teachers towards each task's own."""
    batches = [call for calls in by_task for call in calls]
    units = find_blocks(full, run_all(batches[:1], "models must run on calibration"), blocks)
    check_finite(full, batches, units)
    teaching = None
    if teachers is not None:
        for k, (teacher, calls) in enumerate(zip(teachers, by_task, strict=True)):
            check_finite(teacher, calls, units, f"calibration[{k}]")
        teaching = [teacher for teacher, calls in zip(teachers, by_task, strict=True) for _ in calls]
    walk_all(full, merged, units, batches, methods, run, report, teaching)


def merge_calibrated_files(
    paths: Sequence[str | os.PathLike],
    data: Sequence[str | os.PathLike],
    out: str | os.PathLike,
    *,
    model: str | nn.Module,
    samples: int | None = 256,
    resize: int | None = None,
    crop: int | None = None,
    offload_folder: str | os.PathLike | None = None,
    checkpoint_every: int = 1000,
    **options: Any,
) -> nn.Module:
    """:func:`merge_calibrated` of files that :func:`hdrq.save` wrote, into another.

    Args:
        data: for each file, a path that :func:`hdrq.calibrate.images.load_data` reads, at most ``samples`` samples.
        resize, crop: of images; None for those that each file was calibrated with, as are mean and std.
        model: the architecture, as for :func:`hdrq.load`.

    Raises:
        FileNotFoundError, TypeError, ValueError, OSError: "X must be …, got …".
    """
    from hdrq.evaluate.files import load_as_calibrated  # needs Pillow

    output_path(out)
    if len(data) != len(paths):
        raise ValueError(f"calibrate must be given as often as there are models, {len(paths)} times, got {len(data)}")
    make = build if offload_folder is None else built_on_meta
    if isinstance(model, str):
        dtype = float_dtype(make(model, **arguments_for(model, manifest_of(paths[0]))))
    else:
        dtype = float_dtype(model)
    both = zip(paths, data, strict=True)
    calibration = [load_as_calibrated(path, own, samples, resize, crop).to(dtype) for path, own in both]
    options |= {"architecture": model, "checkpoint_every": checkpoint_every, "offload_folder": offload_folder}
    merged = merge_calibrated(paths, calibration, **options)
    save_or_keep(merged, out)
    return merged
