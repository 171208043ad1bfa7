"""Tasks of multi-target domain adaptation: a labelled source, targets without labels, and a network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hdrq import checks
from hdrq.demo import data
from hdrq.demo.model import resnet

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


def digits(domain: str, split: str) -> tuple[Tensor, Tensor]:
    """The demo's domains with larger test sets: 3,000 digits of MNIST, plain and on photographs, and 797 of optdigits.

    "mnist" and "photos" are adapted on disjoint digits, and tested on the same ones, which neither was adapted on.
    """
    train, test = slice(0, CALIBRATION), slice(2 * CALIBRATION, None)
    if domain == data.SOURCE:
        return data.load(domain, split)
    if domain == "optdigits":
        return data.target(domain, train if split == "train" else slice(CALIBRATION, None))
    if split == "test":
        return data.target(domain, test, seed=1)
    return data.target(domain, train if domain == "mnist" else slice(CALIBRATION, 2 * CALIBRATION))


class ViT(nn.Module):
    """A small vision transformer (Dosovitskiy et al. 2021): patches of 4 × 4, pre-norm blocks, the mean of all tokens.

    (N, 3, 32, 32) to (N, classes).
    """

    def __init__(self, width: int = 96, depth: int = 4, heads: int = 4, classes: int = 10) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.position = nn.Parameter(torch.randn(1, 64, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def features(self, x: Tensor) -> Tensor:
        tokens = self.patch(x).flatten(2).mT + self.position
        return self.norm(self.blocks(tokens)).mean(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class Block(nn.Module):
    """Attention and a perceptron, each behind a norm and around a residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


TASKS = {
    task.name: task
    for task in (
        Task("digits", data.SOURCE, data.TARGETS, digits, resnet),
        Task("digits-vit", data.SOURCE, data.TARGETS, digits, ViT, source_epochs=12, source_rate=1e-3, rate=3e-4),
    )
}


def task_of(name: str) -> Task:
    """A task by its name.

    Raises:
        ValueError: there is none.
    """
    return TASKS[checks.choice("task", name, tuple(TASKS))]
