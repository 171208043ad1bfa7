"""What a task is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from hdrq.demo import train

CALIBRATION = 1000  # images of each target, without their labels, which adaptation and quantization read


@dataclass(frozen=True)
class Task:
    """What is quantized and merged, and how it comes to be.

    Args:
        load: images (N, …), or :class:`hdrq.reproduce.folders.Pictures`, and labels of a domain's split, "train" or
            "test"; the two share no image. Labels are (N,), or (N, H, W) with 255 where there is none; the first tell
            accuracy, the others mIoU.
        network: a freshly initialised one; ``training`` says what it must have.
        source_epochs, source_rate: of supervised training on the source.
        epochs, rate: of adaptation to each target.
        training: a module with ``train_source`` and ``adapt``, as :mod:`hdrq.demo.train` has them.
        facts: what else makes the networks, such as the text of the module that makes the images; kept networks are
            those of the same facts.
        given: a domain's network in full precision, where a user has them and none is trained.
        check: finds at the start what would fail later; given a folder in which it may note that it did.
    """

    name: str
    source: str
    targets: tuple[str, ...]
    load: Callable[[str, str], tuple[Any, Tensor]]
    network: Callable[[], nn.Module]
    source_epochs: int = 8
    source_rate: float = 2e-3
    epochs: int = 30
    rate: float = 1e-3
    training: ModuleType = train
    facts: str = ""
    given: Callable[[str], nn.Module] | None = None
    check: Callable[[Path], None] | None = None
