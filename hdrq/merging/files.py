"""Merging quantized models from file to file, one tensor at a time, and asking first whether it will work."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from hdrq import checks
from hdrq.merging.assessment import LOOKED_AT, UNREADY, LayerReadiness, Readiness, check_ready
from hdrq.merging.inputs import Inputs
from hdrq.merging.layers import layer_readiness, merge_layer
from hdrq.merging.manifest import merged_manifest, merged_ranges
from hdrq.merging.models import states_of
from hdrq.merging.settings import MergeSettings
from hdrq.merging.sources import Source, check_out, opened, writer
from hdrq.merging.tensors import Progress, merged_tensors, no_progress


def merge_files(
    paths: Sequence[str | os.PathLike],
    out: str | os.PathLike,
    *,
    report: bool = False,
    unready: str = "warn",
    device: str = "cpu",
    progress: Progress = no_progress,
    **options: Any,
) -> Readiness | None:
    """:func:`hdrq.merge` of models in files, into another file; it needs no architecture, and memory for few tensors.

    The file has the tensors that saving the merge of the loaded models would give, and the parents' SHA-256.

    Args:
        paths: two or more files that :func:`hdrq.save` wrote, folders that :class:`hdrq.export.folders.Folder`
            reads, or ONNX files that :func:`hdrq.export.read_onnx` reads.
        out: the merged file, or, where the first is a folder or an ONNX file, one like it, unless the name ends with
            ``.safetensors``; it appears whole or not at all.
        report: also say how well each layer merged.
        unready: whether to ``"warn"`` where the models are not ready to be merged, as :func:`readiness` judges by a
            part of their weights, or to ``"refuse"``, and write nothing.
        device: where layers are merged.
        progress: is called before every layer.
        options: as for :func:`hdrq.merge`.

    Raises:
        FileNotFoundError: no such file.
        OSError: ``out`` cannot be written.
        TypeError, ValueError: as :func:`hdrq.merge`; a damaged file.
    """
    checks.choice("unready", unready, UNREADY)
    for first in paths[:1]:
        check_out(out, first)
    settings = MergeSettings.of(len(paths), **options)
    layers: list[LayerReadiness] = []
    with ExitStack() as stack:
        inputs = Inputs([opened(path, stack) for path in paths], settings, device)
        manifest = merged_manifest(inputs, settings)
        with writer(out, inputs.sources[0], inputs.specs, manifest) as file:
            at_most = None if report else LOOKED_AT
            for name, value in merged_tensors(inputs, settings, progress, layers, at_most):
                file.write(name, value)
            found = Readiness(tuple(layers))
            check_ready(found, unready)
    warn_of_twins(paths)
    return found if report else None


def readiness(
    models: Sequence[Any],
    *,
    device: str = "cpu",
    progress: Progress = no_progress,
    **options: Any,
) -> Readiness:
    """Whether merging will work: what becomes of each layer of models or of files, and a verdict.

    Arguments and errors as :func:`merge_files`.
    """
    with ExitStack() as stack:
        if all(isinstance(model, str | os.PathLike) for model in models):
            sources: list[Source] = [opened(path, stack) for path in models]
        else:
            sources = states_of(models)
        settings = MergeSettings.of(len(models), **options)
        inputs = Inputs(sources, settings, device)
        merged_ranges(inputs)  # refuses scales that cannot be merged, as the merge would
        inputs.check_rest()
        layers = []
        for number, name in enumerate(inputs.layers):
            progress(number, len(inputs.layers), name)
            layers.append(_readiness_of_layer(inputs, settings, name))
        warn_of_twins([model for model in models if isinstance(model, str | os.PathLike)])
        return Readiness(tuple(layers))


def warn_of_twins(paths: Sequence[str | os.PathLike]) -> None:
    """Warn of a file that is given twice, since its name is then more likely a slip than its weight."""
    real = [os.path.realpath(path) for path in paths]
    if twice := [os.fspath(path) for k, path in enumerate(paths) if real[k] in real[:k]]:
        warnings.warn(f"one file is merged more than once: {checks.listed(dict.fromkeys(twice))}", stacklevel=3)


def _readiness_of_layer(inputs: Inputs, settings: MergeSettings, name: str) -> LayerReadiness:
    """How well a layer merges; when this returns, its tensors are not held any more."""
    layer = inputs.layer(name)
    return layer_readiness(layer, merge_layer(layer, settings))
