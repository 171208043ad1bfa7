"""Training and adaptation as :mod:`hdrq.demo.train` has them, with sharpness-aware steps: networks in flat minima."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hdrq.demo import train
from hdrq.qat import SAM


def train_source(model: nn.Module, images: Tensor, labels: Tensor, epochs: int, rate: float) -> nn.Module:
    """See :func:`hdrq.demo.train.train_source`; SAM of ``rho`` 0.05, its paper's, around Adam."""
    return train.train_source(model, images, labels, epochs, rate, wrap=SAM)


def adapt(source: Any, images: Tensor, epochs: int, rate: float) -> Any:
    """See :func:`hdrq.demo.train.adapt`; SAM likewise."""
    return train.adapt(source, images, epochs, rate, wrap=SAM)
