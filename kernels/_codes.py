"""Codes of several models, as the kernels of a merge read them, and merged ones, as they write them."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from hdrq.backends.eager import packing
from hdrq.kernels import _lang as lang

ALIGNMENT = tl.constexpr(16)  # bytes


@triton.jit
def _load_codes(address, start, numel, LAYOUT: tl.constexpr, BLOCK: tl.constexpr):
    """A tile's codes, float32, of the tensor of this address: int8, int16, or "signed" or "unsigned" nibbles."""
    if LAYOUT == "int8" or LAYOUT == "int16":
        i = tl.arange(0, BLOCK)
        codes = address.to(tl.pointer_type(tl.int8 if LAYOUT == "int8" else tl.int16))
        code = tl.load(tl.multiple_of(codes, ALIGNMENT) + start + i, mask=i < numel - start, other=0).to(tl.int32)
    else:
        i = tl.arange(0, BLOCK // 2)
        pairs = tl.multiple_of(address.to(tl.pointer_type(tl.uint8)), ALIGNMENT)
        pair = tl.load(pairs + start // 2 + i, mask=2 * i < numel - start, other=0).to(tl.int32)
        code = tl.interleave(pair & 15, pair >> 4)
        if LAYOUT == "signed":
            code = (code ^ 8) - 8
    return code.to(tl.float32)


@triton.jit
def store_code(merged, code, start, i, numel, PACK: tl.constexpr, BLOCK: tl.constexpr):
    """A tile of codes, int32; two to a byte if PACK."""
    if PACK:
        j = tl.arange(0, BLOCK // 2)
        low, high = tl.split(tl.reshape(tl.where(i < numel - start, code & 15, 0), [BLOCK // 2, 2]))
        tl.store(merged + start // 2 + j, (low | (high << 4)).to(tl.uint8), mask=2 * j < numel - start)
    else:
        tl.store(merged + start + i, code.to(merged.dtype.element_ty), mask=i < numel - start)


@triton.jit
def input_tile(inputs, k, tile, ROWS: tl.constexpr, GROUP: tl.constexpr, LAYOUT: tl.constexpr, BLOCK: tl.constexpr):
    """``J_k`` of a tile, and Δ_k. ``tile`` is its start and ``_lang.place``; ``inputs`` the models' codes and grids."""
    codes, scales, zeros, numel, channels = inputs
    start, at = tile
    row = tl.cast(k, tl.int64) * channels
    delta = lang.element_scales(scales + row, at, ROWS, GROUP)
    zero = lang.element_values(zeros + row, at, ROWS, GROUP)
    return _load_codes(tl.load(codes + k), start, numel, LAYOUT, BLOCK) - zero, delta


class Codes(NamedTuple):
    """The codes of all models, where they lie: one tensor of them would be two more passes over memory."""

    tensors: list[torch.Tensor]  # alike, each from an aligned address on
    layout: str  # as ``_load_codes`` takes it

    @property
    def addresses(self) -> torch.Tensor:
        """Of the tensors, int64 on their device."""
        return on_device([c.data_ptr() for c in self.tensors], torch.int64, self.tensors[0].device)


def _layout(codes: torch.Tensor, signed: bool) -> str:
    if codes.dtype == torch.uint8:
        return "signed" if signed else "unsigned"
    return "int8" if codes.dtype == torch.int8 else "int16"


def alike(codes: list, shape: torch.Size, signed: list[bool]) -> Codes:
    """The models' codes for the kernels; those that differ in layout are widened to int16."""
    known = [_layout(c, s) for c, s in zip(codes, signed, strict=True)]
    if len(set(known)) > 1:
        nibbles = [layout in ("signed", "unsigned") for layout in known]
        plain = [packing.unpack(c, shape, s) if n else c for c, s, n in zip(codes, signed, nibbles, strict=True)]
        codes, known = [c.to(torch.int16) for c in plain], ["int16"]
    codes = [c.contiguous() for c in codes]
    return Codes([c.clone() if c.data_ptr() % ALIGNMENT.value else c for c in codes], known[0])


def on_device(values: list[float] | list[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Filled on the device: a copy of a list from the host would wait for the device, and could not be captured."""
    return torch.stack([torch.full((), v, dtype=dtype, device=device) for v in values])
