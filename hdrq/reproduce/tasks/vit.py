"""Digits with a small vision transformer."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from hdrq.demo import data
from hdrq.reproduce.tasks.digits import digits
from hdrq.reproduce.tasks.task import Task


class ViT(nn.Module):
    """A small vision transformer (Dosovitskiy et al. 2021): pre-norm blocks, the mean of all tokens.

    Three convolutions of stride 2 make 16 tokens of an image (Xiao et al. 2021, "Early convolutions help transformers
    see better"), which trains in minutes on a core. (N, 3, 32, 32) to (N, classes).
    """

    def __init__(self, width: int = 96, depth: int = 2, heads: int = 4, classes: int = 10) -> None:
        super().__init__()
        sizes = (3, width // 4, width // 2, width)
        stem = [
            layer
            for a, b in pairwise(sizes)
            for layer in (nn.Conv2d(a, b, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
        ]
        self.stem = nn.Sequential(*stem[:-1])
        self.position = nn.Parameter(torch.randn(1, 16, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def features(self, x: Tensor) -> Tensor:
        tokens = self.stem(x).flatten(2).mT + self.position
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


DIGITS_VIT = Task("digits-vit", data.SOURCE, data.TARGETS, digits, ViT, source_epochs=12, source_rate=1e-3, rate=3e-4)
