"""Segmentation: intersections and unions of classes, image by image, and their mean over classes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import nn

from hdrq import checks
from hdrq.evaluate.metrics import logits_of

UNLABELLED = 255


def mean_iou(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, batch_size: int = 16, *, ignore: int = UNLABELLED
) -> float:
    """The mean over classes of intersection over union, in percent: of :func:`class_iou`, without those that are NaN.

    Arguments and errors are those of :func:`class_iou`.
    """
    return 100 * float(class_iou(model, images, labels, batch_size, ignore=ignore).nanmean())


def class_iou(
    model: nn.Module, images: torch.Tensor, labels: torch.Tensor, batch_size: int = 16, *, ignore: int = UNLABELLED
) -> torch.Tensor:
    """Intersection over union of each class, in [0, 1], float64 (C,); NaN of a class that is nowhere.

    Equation: ``Σ_n |P_nc ∩ Y_nc| / Σ_n |P_nc ∪ Y_nc|``, with the pixels P_nc of image n that the model takes for class
    c, and Y_nc, which are labelled so; pixels labelled ``ignore`` are in neither.

    Args:
        images, labels: (N, …), and integers (N, H, W) that are classes or ``ignore``.

    Raises:
        ValueError: no images, not as many label maps, or what :func:`class_counts` says.

    Source: Everingham et al., IJCV 2010 (PASCAL VOC); the sums run over all images, as in Cityscapes.
    """
    if len(images) == 0 or labels.ndim != 3 or len(labels) != len(images):
        got = f"{tuple(labels.shape)} for {len(images)} images"
        raise ValueError(f"labels must be a map (H, W) for each image, got {got}")
    checks.integer("batch_size", batch_size, 1, 2**31)
    pairs = zip(images.split(batch_size), labels.split(batch_size), strict=True)
    return iou_of(class_counts(model, pairs, ignore=ignore))


def iou_of(counts: torch.Tensor) -> torch.Tensor:
    """Intersection over union of each class, float64 (C,), of the counts (N, 2, C) of :func:`class_counts`."""
    intersection, union = counts.double().sum(0)
    return intersection / union


@torch.no_grad()
def class_counts(
    model: nn.Module, batches: Iterable[tuple[torch.Tensor, torch.Tensor]], *, ignore: int = UNLABELLED
) -> torch.Tensor:
    """Pixels of intersection and of union, of each image and class: int64 (N, 2, C), on the CPU.

    The model returns logits (N, C, h, w), as what its output names so or its first floating-point tensor. Where their
    height and width are not those of the label map, they are upsampled bilinearly, as segmentation does; a pixel's
    class is the one of the greatest logit.

    Args:
        batches: of images and label maps (N, H, W), moved to where the model is.

    Raises:
        ValueError: the model's output is no map of logits, or a label is neither a class of it nor ``ignore``.
    """
    parameter = next(model.parameters(), None)
    found = []
    for x, y in batches:
        if parameter is not None:
            x, y = x.to(parameter.device), y.to(parameter.device)
        logits = logits_of(model(x), "output of the model")
        if logits.ndim != 4 or len(logits) != len(y):
            shape = tuple(logits.shape)
            raise ValueError(f"output of the model must be logits (N, C, H, W) to be measured by labels, got {shape}")
        if logits.shape[2:] != y.shape[1:]:
            logits = F.interpolate(logits.float(), size=y.shape[1:], mode="bilinear", align_corners=False)
        found.append(_counts(logits.argmax(1), y.long(), logits.shape[1], ignore).cpu())
    return torch.cat(found)


def _counts(predicted: torch.Tensor, labels: torch.Tensor, classes: int, ignore: int) -> torch.Tensor:
    labelled = labels != ignore
    wrong = labels[labelled & ((labels < 0) | (labels >= classes))]
    if len(wrong):
        raise ValueError(f"labels must be classes of the model, of {classes}, or {ignore}, got {int(wrong[0])}")
    image = torch.arange(len(labels), device=labels.device)[:, None, None].expand_as(labels)
    pairs = ((image * classes + labels) * classes + predicted)[labelled]
    confusion = torch.bincount(pairs, minlength=len(labels) * classes**2).view(len(labels), classes, classes)
    right = confusion.diagonal(dim1=1, dim2=2)
    return torch.stack([right, confusion.sum(1) + confusion.sum(2) - right], 1)
