"""Two 4-bit codes to a byte. Narrower codes, 2 and 3 bits, are stored so too: one layout for all that kernels read."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch

from hdrq import checks
from hdrq.backends.eager import packing


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Codes of 4 bits or less as bytes, two in each.

    Equation: ``byte[j] = (code[2j] & 15) | (code[2j + 1] & 15) << 4`` over the codes in row-major order: the low nibble
    first, two's complement; the high nibble of the last byte is 0 if their number is odd.

    Args:
        codes: int8 or int16, any shape, all in [−8, 7] or all in [0, 15].

    Returns:
        uint8, one dimension, ``ceil(numel / 2)`` elements.

    Raises:
        TypeError, ValueError: "X must be …, got …". Values are checked on CPU tensors only.
    """
    checks.tensor("codes", codes, checks.CODES)
    checks.nibble_values("codes", codes)
    return packing.pack(codes)


def unpack(packed: torch.Tensor, shape: Sequence[int], *, signed: bool = True) -> torch.Tensor:
    """The codes that :func:`pack` packed.

    Args:
        packed: uint8, one dimension, ``ceil(numel / 2)`` elements.
        shape: of the codes.
        signed: whether a nibble stands for −8 … 7, else for 0 … 15.

    Returns:
        int8 of ``shape``.

    Raises:
        TypeError, ValueError: "X must be …, got …".
    """
    checks.packed("packed", packed, prod(shape))
    return packing.unpack(packed, tuple(shape), signed)
