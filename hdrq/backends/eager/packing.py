"""Two 4-bit codes to a byte, in plain PyTorch. Definition: :mod:`hdrq.backends.reference.packing`."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch


def pack(codes: torch.Tensor) -> torch.Tensor:
    nibbles = codes.flatten().to(torch.uint8) & 15
    nibbles = torch.cat([nibbles, nibbles.new_zeros(nibbles.numel() % 2)])
    return nibbles[::2] | nibbles[1::2] << 4


def unpack(packed: torch.Tensor, shape: Sequence[int], signed: bool) -> torch.Tensor:
    codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten()[: prod(shape)].reshape(shape).to(torch.int8)
    return (codes ^ 8) - 8 if signed else codes
