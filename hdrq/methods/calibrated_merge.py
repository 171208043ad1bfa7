"""Merges of models that exist as integers, rounded for what their layers read: a few samples in place of originals."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from hdrq import checks
from hdrq.calibrate.cache import Cache
from hdrq.calibrate.data import data_hash, run_all
from hdrq.calibrate.finite import check_finite
from hdrq.calibrate.progress import Step
from hdrq.calibrate.replay import without_caches
from hdrq.calibrate.report import RunReport, set_report
from hdrq.calibrate.sequential import walk
from hdrq.calibrate.settings import RunSettings
from hdrq.checkpoint.files import output_path
from hdrq.checkpoint.loading import float_dtype, load
from hdrq.checkpoint.saving import save
from hdrq.evaluate.averaging import weighted_mean
from hdrq.merging.models import merge
from hdrq.methods.layerwise import Guidance, Target
from hdrq.methods.nearest import round_to_nearest
from hdrq.methods.post_merge import calls_of_tasks, spans
from hdrq.methods.post_training import warn_of_layers
from hdrq.prepare.float_model import device_of
from hdrq.prepare.units import find_blocks
from hdrq.quantizers.layers import quantized_layers
from hdrq.quantizers.modules import Quantizer
from hdrq.quantizers.provenance import origin, set_origin


@torch.inference_mode(False)
@torch.no_grad()
def merge_calibrated(
    models: Sequence[nn.Module],
    calibration: Sequence[Any],
    *,
    weights: Sequence[float] | None = None,
    bits: str | None = None,
    blocks: Sequence[str] | None = None,
    seed: int = 0,
    progress: Callable[[Step], None] | bool = True,
    **guidance: Any,
) -> nn.Module:
    """:func:`hdrq.merge` of quantized models, its integers chosen for a few samples of each model's task.

    Scales, ranges and what is not quantized are those of :func:`hdrq.merge`. With ``W_t = (I_t − z_t)·Δ_t`` and their
    mean W_m, layers are rounded one after the other by GPTQ for what they read behind those that are finished:
    ``target="mean"`` rounds W_m, ``"experts"`` what has the models' outputs, see
    :func:`hdrq.methods.post_merge.post_merge`, whose equations are these. No original is needed.

    Args:
        models: two or more results of :func:`hdrq.quantize`, of one architecture; left as they are.
        calibration: for each model, data of its task as for :func:`hdrq.quantize`.
        weights, bits: of :func:`hdrq.merge`.
        blocks, progress: of :func:`hdrq.quantize`.
        seed: of the merge.
        guidance: fields of :class:`hdrq.methods.layerwise.Guidance`, such as ``target``.

    Raises:
        TypeError, ValueError: "X must be …, got …"; what differs between the models.
    """
    guided = Guidance(**guidance)
    models = list(models)
    shares = checks.mixing_weights(weights, len(models))
    by_task = calls_of_tasks(models, calibration, "models")
    batches = [call for calls in by_task for call in calls]
    merged = merge(models, weights=weights, bits=bits, rule="half-even", seed=seed)
    own = [quantized_layers(model) for model in models]
    layers = quantized_layers(merged)
    for name, layer in layers.items():
        layer.latent.copy_(weighted_mean(shares, [each[name].latent for each in own]))
    full = copy.deepcopy(merged)
    for module in full.modules():
        if isinstance(module, Quantizer):
            module.mode = "float"
    units = find_blocks(full, run_all(batches[:1], "models must run on calibration"), blocks)
    check_finite(full, batches, units)
    targets = [{n: Target(layer.latent, layer.module.bias) for n, layer in each.items()} for each in own]
    method = guided.method(targets, spans(by_task))
    report = RunReport(f"merge towards {guided.target}")
    with without_caches(full, merged), RunSettings(progress=progress).shown() as told:
        report.blocks, report.losses = walk(full, merged, units, batches, method, Cache(device_of(full)), told)
    round_to_nearest(merged)
    warn_of_layers(report)
    set_report(merged, report)
    how = {**asdict(guided), "calibration": data_hash(batches)}
    set_origin(merged, {**origin(merged), "calibrated": how})
    return merged


def merge_calibrated_files(
    paths: Sequence[str | os.PathLike],
    data: Sequence[str | os.PathLike],
    out: str | os.PathLike,
    *,
    model: str | nn.Module,
    samples: int | None = 256,
    resize: int = 256,
    crop: int = 224,
    **options: Any,
) -> nn.Module:
    """:func:`merge_calibrated` of files that :func:`hdrq.save` wrote, into another; all of them are in memory.

    Args:
        data: for each file, a path that :func:`hdrq.calibrate.images.load_data` reads, with ``resize``, ``crop`` and at
            most ``samples`` samples.
        model: the architecture, as for :func:`hdrq.load`.

    Raises:
        FileNotFoundError, TypeError, ValueError, OSError: "X must be …, got …".
    """
    from hdrq.calibrate.images import load_data  # needs Pillow

    output_path(out)
    if len(data) != len(paths):
        raise ValueError(f"calibrate must be given as often as there are models, {len(paths)} times, got {len(data)}")
    models = [load(path, model) for path in paths]
    calibration = [load_data(path, resize=resize, crop=crop, limit=samples) for path in data]
    calibration = [x.to(float_dtype(each)) for x, each in zip(calibration, models, strict=True)]
    merged = merge_calibrated(models, calibration, **options)
    save(merged, out)
    return merged
