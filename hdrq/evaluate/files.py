"""Measuring files: accuracies and mIoU of checkpoints on folders of labelled images and of label maps."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hdrq import checks
from hdrq.calibrate.images import class_names, load_data, load_labelled
from hdrq.calibrate.labelmaps import LAYOUTS, list_label_maps, load_label_maps
from hdrq.checkpoint.loading import float_dtype, load_either, manifest_of
from hdrq.evaluate.metrics import IoURow, Row, accuracy_of
from hdrq.evaluate.segmentation import class_counts, iou_of


def evaluate_files(
    files: Sequence[str | os.PathLike],
    data: Sequence[str | os.PathLike],
    model: str,
    *,
    model_args: Mapping[str, Any] | None = None,
    device: str = "cpu",
    offload_folder: str | os.PathLike | None = None,
    batch_size: int = 100,
    top: int = 1,
    **preparation: Any,
) -> list[Row]:
    """The accuracies of models on folders of labelled images: a row for each file, a column for each folder.

    Args:
        files: quantized models, or states of the architecture in full precision, safetensors.
        data: folders with a folder for each class, the same as in the first.
        model: the architecture, ``"module:factory"``; without ``model_args``, those of the files are the factory's.
        offload_folder: as for :func:`hdrq.load`; on the CPU alone.
        top: an image is right if its label is among so many of the greatest logits.
        preparation: arguments of :func:`hdrq.calibrate.images.load_labelled`; without, images are made as those that
            the files were calibrated on.

    Raises:
        FileNotFoundError, TypeError, ValueError: "X must be …, got …"; files that were calibrated on images made in
            other ways, and none is given.
    """
    classes = class_names(data[0])
    manifests = {os.fspath(file): manifest_of(file) for file in files}
    preparation = _as_calibrated(manifests, preparation)
    model_args = _arguments(manifests, model) if model_args is None else model_args

    def measured(network: nn.Module, path: str | os.PathLike) -> float:
        batches = load_labelled(path, batch_size=batch_size, classes=classes, **preparation)
        return accuracy_of(network, _as_floats(batches, network), top)

    how = model, model_args, device, offload_folder
    return [Row(*each) for each in _each(files, data, *how, measured, "resize and crop make")]


def load_as_calibrated(
    file: str | os.PathLike, data: str | os.PathLike, samples: int | None, resize: int | None, crop: int | None
) -> Tensor:
    """Data for a quantized model, at most so many samples, images made as those that the file was calibrated on.

    Raises:
        FileNotFoundError, TypeError, ValueError: as for :func:`hdrq.calibrate.images.load_data`; ``samples`` is not
            positive.
    """
    if samples is not None:
        checks.integer("samples", samples, 1, 2**31)
    prepared = _as_calibrated({os.fspath(file): manifest_of(file)}, {"resize": resize, "crop": crop})
    return load_data(data, limit=samples, **prepared)


def _as_calibrated(manifests: Mapping[str, Mapping[str, Any]], given: Mapping[str, Any]) -> dict[str, Any]:
    """What images are made by: what is given, else what all files say of their calibration."""
    chosen = {name: value for name, value in given.items() if value is not None}
    runs = [(file, run) for file, manifest in manifests.items() for run in _runs(manifest)]
    for name in ("resize", "crop", "mean", "std"):
        values = {_numbers(f"{name} in {file}", run[name]): file for file, run in runs if name in run}
        if name in chosen:
            others = {value: file for value, file in values.items() if value != _numbers(name, chosen[name])}
            for value, file in others.items():
                warnings.warn(f"{name} is {chosen[name]}, and {file} was calibrated with {value}", stacklevel=3)
        elif len(values) > 1:
            each = ", ".join(f"{value} in {file}" for value, file in values.items())
            raise ValueError(f"{name} must be given for files that were calibrated with others, got {each}")
        elif values:
            (chosen[name],) = values
    return chosen


def _numbers(name: str, value: Any) -> Any:
    """A setting as its manifest or a caller has it, so that both can be compared."""
    several = value if isinstance(value, list | tuple) else [value]
    if not all(isinstance(each, int | float) for each in several):
        raise ValueError(f"{name} must be numbers, got {value!r:.100}")
    return tuple(map(float, value)) if several is value else value


def _runs(manifest: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """How a model and those it was merged from were calibrated, as far as the command line did it."""
    if isinstance(manifest.get("run"), Mapping):
        yield manifest["run"]
    for parent in (*manifest.get("models", ()), manifest.get("parent")):
        if isinstance(parent, Mapping):
            yield from _runs(parent)


def _arguments(manifests: Mapping[str, Mapping[str, Any]], model: str) -> Mapping[str, Any]:
    """The factory's arguments that files name with it; those of the first that does."""
    known = [manifest["architecture"] for manifest in manifests.values() if "architecture" in manifest]
    return next((each["arguments"] for each in known if each["factory"] == model), {})


def evaluate_label_maps(
    files: Sequence[str | os.PathLike],
    data: Sequence[tuple[str | os.PathLike, str]],
    model: str,
    *,
    split: str = "test",
    model_args: Mapping[str, Any] | None = None,
    device: str = "cpu",
    offload_folder: str | os.PathLike | None = None,
    batch_size: int = 4,
    **preparation: Any,
) -> list[IoURow]:
    """The mIoU of models on folders of images with label maps: a row for each file, a column for each folder.

    Args:
        files, model, offload_folder: as :func:`evaluate_files` has them.
        data: folders, each with its layout, as :func:`hdrq.calibrate.labelmaps.load_label_maps` has them; ``split``
            and ``preparation`` are its further arguments.
    """
    layouts = {path: layout for path, layout in data}
    for path, layout in data:
        list_label_maps(path, layout, split)

    def measured(network: nn.Module, path: str | os.PathLike) -> dict[str, float]:
        batches = load_label_maps(path, layouts[path], split, batch_size=batch_size, **preparation)
        found = 100 * iou_of(class_counts(network, _as_floats(batches, network)))
        names = LAYOUTS[layouts[path]].classes or [str(label) for label in range(len(found))]
        if len(found) != len(names):
            raise ValueError(f"model must tell the {len(names)} classes of {path} apart, got {len(found)} logits")
        return {name: iou for name, iou in zip(names, found.tolist(), strict=True) if not math.isnan(iou)}

    rows, how = [], (model, model_args, device, offload_folder)
    for name, classes in _each(files, layouts, *how, measured, "size makes"):
        means = {path: sum(each.values()) / len(each) for path, each in classes.items()}
        rows.append(IoURow(name, means, classes))
    return rows


def _each(
    files: Sequence[str | os.PathLike],
    data: Iterable[str | os.PathLike],
    model: str,
    model_args: Mapping[str, Any] | None,
    device: str,
    offload_folder: str | os.PathLike | None,
    measured: Callable[[nn.Module, str | os.PathLike], Any],
    made: str,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each file's name, and what is measured of it on each folder."""
    checks.device(device)
    if offload_folder is not None and device != "cpu":
        raise ValueError(f"device must be cpu where weights are offloaded, got {device}; leave offload_folder out")
    names = [Path(file).name for file in files]
    for name, file in zip(names, files, strict=True):
        network, folders = load_either(file, model, model_args or {}, offload_folder).to(device), {}
        for path in data:
            try:
                folders[str(path)] = measured(network, path)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise ValueError(f"{file} must run on what {made} of images, got {error}") from error
            except (FileNotFoundError, TypeError, ValueError) as error:
                kind = next(k for k in (FileNotFoundError, TypeError, ValueError) if isinstance(error, k))
                raise kind(f"to evaluate {file}, {error}") from error
        yield name if names.count(name) == 1 else str(file), folders


def _as_floats(batches: Iterable[tuple[Tensor, Tensor]], network: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches whose images have the network's own dtype."""
    dtype = float_dtype(network)
    return ((x.to(dtype), labels) for x, labels in batches)
