"""A small U-Net: an encoder-decoder with skips, for label maps."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """``relu(bn(conv(relu(bn(conv(x))))))``: (N, C, H, W) to (N, C', H / stride, W / stride)."""

    def __init__(self, channels_in: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1, self.relu1 = nn.BatchNorm2d(channels), nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2, self.relu2 = nn.BatchNorm2d(channels), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(x)))


class UNet(nn.Module):
    """A stem of stride 2, an encoder, a decoder with skips (Ronneberger et al. 2015), and logits that are upsampled.

    (N, 3, H, W) to (N, classes, H, W), with H and W multiples of 16. About 280,000 parameters.
    """

    def __init__(self, channels: tuple[int, ...] = (12, 24, 48, 96), classes: int = 6) -> None:
        super().__init__()
        first = channels[0]
        self.stem = nn.Sequential(
            nn.Conv2d(3, first, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(first), nn.ReLU()
        )
        steps = list(pairwise(channels))
        self.encoder = nn.ModuleList([Block(first, first), *(Block(a, b, stride=2) for a, b in steps)])
        self.decoder = nn.ModuleList([Block(a + b, a) for a, b in reversed(steps)])
        self.head = nn.Conv2d(first, classes, 1)

    def features(self, x: Tensor) -> Tensor:
        """What the head classifies: (N, 3, H, W) to (N, C, H / 2, W / 2)."""
        skips = [self.stem(x)]
        for block in self.encoder:
            skips.append(block(skips[-1]))
        x = skips.pop()
        for block in self.decoder:
            x = block(torch.cat([F.interpolate(x, scale_factor=2.0), skips.pop()], 1))
        return x

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(self.head(self.features(x)), scale_factor=2.0, mode="bilinear", align_corners=False)
