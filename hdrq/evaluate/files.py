"""Measuring files: the accuracies of checkpoints on folders of labelled images."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hdrq import checks
from hdrq.calibrate.images import class_names, load_labelled
from hdrq.checkpoint.loading import float_dtype, load_either
from hdrq.evaluate.metrics import Row, accuracy_of


def evaluate_files(
    files: Sequence[str | os.PathLike],
    data: Sequence[str | os.PathLike],
    model: str,
    *,
    model_args: Mapping[str, Any] | None = None,
    device: str = "cpu",
    batch_size: int = 100,
    **preparation: Any,
) -> list[Row]:
    """The accuracies of models on folders of labelled images: a row for each file, a column for each folder.

    Args:
        files: quantized models, or states of the architecture in full precision, safetensors.
        data: folders with a folder for each class, the same as in the first; ``preparation`` is arguments of
            :func:`hdrq.calibrate.images.load_labelled`.
        model: the architecture, ``"module:factory"``.
    """
    checks.device(device)
    classes, rows = class_names(data[0]), []
    for file in files:
        network = load_either(file, model, model_args or {}).to(device)
        folders = {}
        for path in data:
            batches = load_labelled(path, batch_size=batch_size, classes=classes, **preparation)
            dtype = float_dtype(network)
            try:
                folders[str(path)] = accuracy_of(network, ((x.to(dtype), labels) for x, labels in batches))
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise ValueError(f"{file} must run on what resize and crop make of images, got {error}") from error
        rows.append(Row(Path(file).name, folders))
    return rows
