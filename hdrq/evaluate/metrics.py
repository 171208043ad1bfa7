"""What a model is worth: accuracies, their harmonic mean, and the errors that accumulate in it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hdrq import checks, tree
from hdrq.calibrate.data import Call
from hdrq.calibrate.ranks import ALONE, Ranks
from hdrq.prepare.observe import observe


def harmonic_mean(values: Iterable[float]) -> float:
    """``n / Σ 1/v``; 0 where a value is 0.

    Raises:
        ValueError: no values, or one that is negative or not finite.
    """
    values = [float(v) for v in values]
    if not values or not all(0 <= v < math.inf for v in values):
        raise ValueError(f"values must be one or more finite numbers that are not negative, got {values}")
    return 0.0 if min(values) == 0 else len(values) / sum(1 / v for v in values)


@dataclass(frozen=True)
class Row:
    """One way to merge: its accuracy on each domain, in percent."""

    method: str
    accuracies: dict[str, float]

    @property
    def harmonic_mean(self) -> float:
        return harmonic_mean(self.accuracies.values())


@dataclass(frozen=True)
class IoURow(Row):
    """A row of segmentation: its mIoU on each domain, and the IoU of each class that is in it, in percent."""

    classes: dict[str, dict[str, float]]


@torch.no_grad()
def accuracy(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, batch_size: int = 500, top: int = 1
) -> float:
    """The share of images whose label is among the ``top`` greatest logits, in percent.

    ``images`` are (N, …), ``labels`` (N,) int64.

    Raises:
        ValueError: no images, not as many labels, or fewer classes than ``top``.
    """
    if len(images) == 0 or labels.shape != images.shape[:1]:
        raise ValueError(f"labels must be one for each image, got {tuple(labels.shape)} for {len(images)} images")
    checks.integer("batch_size", batch_size, 1, 2**31)
    return accuracy_of(model, zip(images.split(batch_size), labels.split(batch_size), strict=True), top)


@torch.no_grad()
def accuracy_of(model: nn.Module, batches: Iterable[tuple[torch.Tensor, torch.Tensor]], top: int = 1) -> float:
    """:func:`accuracy` over batches of images and labels, such as a DataLoader's, moved to where the model is.

    The logits are what the output names so, else the first floating-point tensor that the model returns.

    Raises:
        TypeError: labels are no integers.
        ValueError: the model's output is no class for each label, or NaN; a label is none of its classes; no batch;
            fewer classes than ``top``.
    """
    checks.integer("top", top, 1, 2**31)
    parameter = next(model.parameters(), None)
    right = total = 0
    for x, y in batches:
        if parameter is not None:
            x, y = x.to(parameter.device), y.to(parameter.device)
        logits = logits_of(model(x), "output of the model")
        predicted = logits.argmax(dim=1)
        if predicted.shape != y.shape:
            got = f"{tuple(y.shape)} for {tuple(predicted.shape)}; label maps are measured by mean_iou"
            raise ValueError(f"labels must be one for each class that the model tells, got {got}")
        _check_classes(logits, y)
        if top > 1:
            if logits.shape[1] < top:
                raise ValueError(f"top must be at most the {logits.shape[1]} classes that the model tells, got {top}")
            right += int((logits.topk(top, dim=1).indices == y[:, None]).sum())
        else:
            right += int((predicted == y).sum())
        total += len(y)
    if not total:
        raise ValueError("batches must have at least one image, got none")
    return 100 * right / total


def _check_classes(logits: torch.Tensor, labels: torch.Tensor) -> None:
    """Refuse what has no accuracy: the greatest of NaN, and classes that there are not."""
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels must be integers, got {checks.short(labels.dtype)}")
    if logits.isnan().any():
        raise ValueError("logits must hold no NaN to be ranked, got some from the model")
    low, high = (int(bound) for bound in labels.aminmax()) if len(labels) else (0, 0)
    if low < 0 or high >= logits.shape[1]:
        known = f"[0, {logits.shape[1] - 1}], the classes that the model tells"
        raise ValueError(f"labels must be in {known}, got {low} to {high}")


@torch.no_grad()
def accumulated_errors(
    model: nn.Module, full: nn.Module, batches: Sequence[Call], blocks: Sequence[str], ranks: Ranks = ALONE
) -> dict[str, float]:
    """How far a quantized model is from full precision: ``‖y_q − y‖² / ‖y‖²`` of each block's output and the model's.

    Nothing is reset between blocks, so the error of a block contains that of all before it. Sums run over all
    samples of ``batches``, in float64, of the first tensor that a block returns at its first call. Each of ``ranks``
    runs its part of them.
    """
    names = (*blocks, "output")
    wrong, size = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    for call in ranks.share(batches):
        ours, theirs = (_outputs(m, call, blocks) for m in (model, full))
        for name in names:
            y = theirs[name].double()
            if ours[name].shape != y.shape:
                raise ValueError(
                    f"{name} must have one shape in full precision and quantized to be measured, got {tuple(y.shape)} "
                    f"and {tuple(ours[name].shape)}: the model's output depends on held_out; quantize without it"
                )
            wrong[name] += float((ours[name].double() - y).square().sum())
            size[name] += float(y.square().sum())
    sums = ranks.total(*wrong.values(), *size.values())
    return {name: each / max(of, 1e-300) for name, each, of in zip(names, sums, sums[len(names) :], strict=False)}


def _outputs(model: nn.Module, call: Call, blocks: Sequence[str]) -> dict[str, torch.Tensor]:
    seen: dict[str, torch.Tensor] = {}

    def keep(name, module, args, kwargs, output) -> None:
        if name not in seen:
            seen[name] = logits_of(output, f"output of block {name}").clone()  # what follows may work in place

    seen["output"] = logits_of(observe(model, call, after=keep, names=blocks), "output of the model on held_out")
    return seen


def floats_of(output: Any) -> list[torch.Tensor]:
    """The logits alone where an output names them, as it does beside a loss; else all its floating-point tensors."""
    named = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    for values in ([named], tree.leaves(output)):
        if found := [value for value in values if isinstance(value, torch.Tensor) and value.is_floating_point()]:
            return found
    return []


def logits_of(output: Any, what: str) -> torch.Tensor:
    """The first of :func:`floats_of`."""
    if found := floats_of(output):
        return found[0]
    raise ValueError(
        f"{what} must hold a floating-point tensor to be measured, got {type(output).__name__} without one; "
        "quantize without held_out, or let the model return its logits"
    )
