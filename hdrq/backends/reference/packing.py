"""Two 4-bit codes to a byte: the layout that checkpoints store and merges read and write."""

from __future__ import annotations

import numpy as np


def pack(codes: np.ndarray) -> np.ndarray:
    """``byte[j] = (code[2j] & 15) | (code[2j + 1] & 15) << 4`` in row-major order; a missing last code is 0."""
    nibbles = codes.reshape(-1).astype(np.uint8) & np.uint8(15)
    nibbles = np.append(nibbles, np.zeros(nibbles.size % 2, np.uint8))
    return nibbles[::2] | nibbles[1::2] << np.uint8(4)


def unpack(packed: np.ndarray, shape: tuple[int, ...], signed: bool) -> np.ndarray:
    """The int8 codes of :func:`pack`: −8 … 7 (two's complement) if signed, else 0 … 15."""
    nibbles = np.stack((packed & np.uint8(15), packed >> np.uint8(4)), axis=-1).reshape(-1)
    codes = nibbles[: int(np.prod(shape))].astype(np.int8).reshape(shape)
    return (codes ^ np.int8(8)) - np.int8(8) if signed else codes
