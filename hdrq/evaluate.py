"""What a merged model is worth: accuracies and their harmonic mean."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from hdrq import checks


def harmonic_mean(values: Iterable[float]) -> float:
    """``n / Σ 1/v``; 0 where a value is 0.

    Raises:
        ValueError: no values, or one that is negative or not finite.
    """
    values = [float(v) for v in values]
    if not values or not all(0 <= v < math.inf for v in values):
        raise ValueError(f"values must be one or more finite numbers that are not negative, got {values}")
    return 0.0 if min(values) == 0 else len(values) / sum(1 / v for v in values)


@torch.no_grad()
def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, batch_size: int = 500) -> float:
    """The share of images whose greatest logit is the label's, in percent. ``images`` (N, …), ``labels`` (N,) int64.

    Raises:
        ValueError: no images, or not as many labels.
    """
    if len(images) == 0 or labels.shape != images.shape[:1]:
        raise ValueError(f"labels must be one for each image, got {tuple(labels.shape)} for {len(images)} images")
    checks.integer("batch_size", batch_size, 1, 2**31)
    right = sum(
        int((model(x).argmax(dim=1) == y).sum())
        for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True)
    )
    return 100 * right / len(labels)
