"""Family ``ranges`` in C++ (csrc/ranges.h)."""

from __future__ import annotations

import torch

import hdrq._C as _C
from hdrq.backends.native import FLOATS, address, threads


def range_errors(x, weights, scale, low, high, unit, norm) -> torch.Tensor:
    errors = torch.empty(scale.shape, dtype=torch.float64)
    shape = (*x.shape, scale.shape[1])
    candidates = (address(scale), address(low), address(high), address(unit))
    values = (FLOATS[x.dtype], address(x), address(weights))
    _C.range_errors(threads(), *values, *shape, *candidates, norm, address(errors))
    return errors


def range_table(x, origin, factor, bins) -> torch.Tensor:
    table = torch.empty((len(x), bins, 2), dtype=torch.int64)
    positions = (address(origin), address(factor))
    _C.range_table(threads(), FLOATS[x.dtype], address(x), *x.shape, bins, *positions, address(table))
    return table
