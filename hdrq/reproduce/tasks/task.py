"""What a task is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

CALIBRATION = 1000  # images of each target, without their labels, which adaptation and quantization read


@dataclass(frozen=True)
class Task:
    """What is quantized and merged, and how it comes to be.

    Args:
        load: images (N, …) and labels (N,) of a domain's split, "train" or "test"; the two share no image.
        network: a freshly initialised one, with ``features`` and a linear ``head`` that SHOT freezes.
        source_epochs, source_rate: of supervised training on the source.
        epochs, rate: of adaptation to each target.
    """

    name: str
    source: str
    targets: tuple[str, ...]
    load: Callable[[str, str], tuple[Tensor, Tensor]]
    network: Callable[[], nn.Module]
    source_epochs: int = 8
    source_rate: float = 2e-3
    epochs: int = 30
    rate: float = 1e-3
