"""Merges of models that exist as integers, rounded for what their layers read by statistics in their files.

The equations are those of :func:`hdrq.methods.post_merge.post_merge`, with X_t what a layer read in model t when that
was quantized (``hdrq.quantize(…, statistics=True)``). Each layer stands for itself: no data, no model is run, and
layers are read from files one at a time. Scales, ranges and the rest are those of :func:`hdrq.merge`. With floats in
place of integers this is RegMean (Jin et al., ICLR 2023).
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from hdrq import checks
from hdrq.calibrate.report import BlockReport, LayerReport, RunReport, set_report
from hdrq.calibrate.statistics import expanded
from hdrq.checkpoint.format import packs, scales_shape
from hdrq.checkpoint.loading import assign, statistics
from hdrq.evaluate.averaging import weighted_mean
from hdrq.merging.inputs import Inputs
from hdrq.merging.manifest import merged_manifest
from hdrq.merging.models import states_of
from hdrq.merging.settings import MergeSettings
from hdrq.merging.sources import Source, check_out, dequantized, label_of, opened, writer
from hdrq.merging.tensors import Progress, merged_tensors, no_progress
from hdrq.methods.layerwise import Guidance, Target
from hdrq.methods.post_training import warn_of_layers
from hdrq.ops import MergedTensor, pack
from hdrq.quantizers.layers import QuantizedLayer
from hdrq.quantizers.modules import WeightQuantizer


def merge_by_statistics(
    models: Sequence[nn.Module],
    *,
    weights: Sequence[float] | None = None,
    bits: str | None = None,
    seed: int = 0,
    **guidance: Any,
) -> nn.Module:
    """:func:`hdrq.merge` of quantized models, rounded for what their layers read.

    Args:
        models: results of :func:`hdrq.quantize` with ``statistics``; left as they are.
        weights, bits, seed: of :func:`hdrq.merge`.
        guidance: fields of :class:`hdrq.methods.layerwise.Guidance`.

    Returns:
        A model of the class of the first, with a report (:func:`hdrq.report.report_of`), and without statistics.

    Raises:
        TypeError, ValueError: "X must be …, got …"; a model without statistics.
    """
    models = list(models)
    settings = MergeSettings(weights, "half-even", seed=seed, bits=bits)
    guided = _Guided(states_of(models), settings, checks.made_of(Guidance, guidance))
    tensors = dict(guided.tensors())
    merged = copy.deepcopy(models[0])
    assign(merged, guided.manifest, tensors, tensors.__getitem__)
    set_report(merged, guided.report())
    return merged


def merge_files_by_statistics(
    paths: Sequence[str | os.PathLike],
    out: str | os.PathLike,
    *,
    weights: Sequence[float] | None = None,
    bits: str | None = None,
    seed: int = 0,
    progress: Progress = no_progress,
    **guidance: Any,
) -> RunReport:
    """:func:`merge_by_statistics` of files that :func:`hdrq.save` wrote, into another, with no architecture.

    Args:
        progress: is called before every layer.

    Raises:
        FileNotFoundError, TypeError, ValueError: "X must be …, got …".
        OSError: ``out`` cannot be written.
    """
    for first in paths[:1]:
        check_out(out, first)
    settings = MergeSettings(weights, "half-even", seed=seed, bits=bits)
    with ExitStack() as stack:
        guided = _Guided([opened(path, stack) for path in paths], settings, checks.made_of(Guidance, guidance))
        with writer(out, guided.inputs.sources[0], guided.inputs.specs, guided.manifest) as file:
            for name, value in guided.tensors(progress):
                file.write(name, value)
    return guided.report()


class _Guided:
    """A merge whose layers are rounded for their statistics."""

    def __init__(self, sources: Sequence[Source], settings: MergeSettings, guidance: Guidance) -> None:
        for k, source in enumerate(sources):
            if not source.manifest.get("statistics"):
                raise ValueError(
                    f"models must have statistics of what their layers read, got none in {label_of(source, k)}; "
                    "quantize with statistics=True, or give data (hdrq merge --calibrate)"
                )
        self.inputs, self.settings, self.guidance = Inputs(sources, settings), settings, guidance
        how = {**asdict(guidance), "calibration": "statistics"}
        self.manifest = {**merged_manifest(self.inputs, settings), "calibrated": how}
        self._reports: list[LayerReport] = []

    def tensors(self, progress: Progress = no_progress) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor of the merged model, with its name."""
        return merged_tensors(self.inputs, self.settings, progress, refine=self._refined)

    def report(self) -> RunReport:
        """What the objective of every layer came to."""
        report = RunReport(f"merge towards {self.guidance.target}, by statistics")
        nearest, error = (sum(getattr(one, kind) for one in self._reports) for kind in ("nearest", "error"))
        report.blocks = [BlockReport("", nearest, error, 0.0, tuple(self._reports))]
        warn_of_layers(report)
        return report

    @torch.no_grad()
    def _refined(self, name: str, merged: MergedTensor) -> tuple[MergedTensor, dict[str, torch.Tensor]]:
        """A layer with other codes, and its bias, which codes decide too."""
        sources = self.inputs.sources
        if not all(name in source.manifest["statistics"] for source in sources):
            self._reports.append(LayerReport(name, note="rounded to nearest: it has no statistics in some model"))
            return merged, {}
        moments = [expanded(statistics(source, name)) for source in sources]
        bias = f"{name}.bias".removeprefix(".")
        biases = self.inputs.tensor(bias) if bias in self.inputs.specs else [None] * len(sources)
        targets = [Target(dequantized(source, name), b) for source, b in zip(sources, biases, strict=True)]
        layer = self._alone(name, merged, targets)
        method = self.guidance.method([{name: target} for target in targets])
        self._reports.append(method.fit_layer([layer], moments))
        quantizer = layer.weight_quantizer
        codes = quantizer.codes(layer.latent)
        codes = pack(codes) if packs(quantizer.qmin, quantizer.qmax) else codes
        more = {} if layer.module.bias is None else {bias: layer.module.bias.detach()}
        return merged._replace(codes=codes), more

    def _alone(self, name: str, merged: MergedTensor, targets: Sequence[Target]) -> QuantizedLayer:
        """The layer of the merge by itself, its weight the mean of the models', before it is rounded."""
        facts = self.inputs.sources[0].manifest["weights"][name]
        grid = scales_shape(name, facts)
        zero_point = merged.zero_point.float().view(grid) if facts.get("affine") else None
        quantizer = WeightQuantizer(
            merged.scale.view(grid), *self.inputs.ranges[name], facts["axis"], zero_point, facts.get("group_size")
        )
        module: Any = nn.Module()
        shares = self.inputs.weights[f"{name}.weight.codes"]
        module.weight = nn.Parameter(weighted_mean(shares, [t.weight for t in targets]).float())
        mean = targets[0].bias if targets[0].bias is None else self.inputs.mean(f"{name}.bias".removeprefix("."))
        module.bias = None if mean is None else nn.Parameter(mean)
        parametrize.register_parametrization(module, "weight", quantizer)
        return QuantizedLayer(name, module)
