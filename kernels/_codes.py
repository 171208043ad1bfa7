"""Codes of several models, as the kernels of a merge read them, and merged ones, as they write them."""

import torch
import triton
import triton.language as tl

from hdrq.backends.eager import packing
from hdrq.kernels import _lang as lang


@triton.jit
def _load_code(codes, start, i, live, PACKED: tl.constexpr):
    """A tile's codes, float32; PACKED: "signed" or "unsigned" nibbles; "": none."""
    if PACKED == "":
        code = tl.load(codes + start + i, mask=live, other=0).to(tl.int32)
    else:
        pair = tl.load(codes + start // 2 + i // 2, mask=live, other=0).to(tl.int32)
        code = (pair >> (4 * (i % 2))) & 15
        if PACKED == "signed":
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
def input_tile(inputs, k: tl.constexpr, start, i, live, ROWS: tl.constexpr, PACKED: tl.constexpr):
    """``J_k`` of a tile, and Δ_k. ``inputs`` has a tuple of the models' codes first."""
    codes, scales, zeros, inner, channels = inputs
    row = tl.cast(k, tl.int64) * channels
    delta = lang.valid_scale(lang.per_element(scales + row, start, i, inner, channels, ROWS))
    zero = lang.per_element(zeros + row, start, i, inner, channels, ROWS)
    return _load_code(codes[k], start, i, live, PACKED) - zero, delta


def alike(codes: list, shape: torch.Size, signed: list[bool]) -> tuple[tuple[torch.Tensor, ...], str]:
    """The inputs as the kernels take them, and what they hold; inputs that differ in layout are widened to int16."""
    if all(c.dtype == codes[0].dtype for c in codes) and (codes[0].dtype != torch.uint8 or len(set(signed)) == 1):
        layout = "" if codes[0].dtype != torch.uint8 else "signed" if signed[0] else "unsigned"
        return tuple(c.contiguous() for c in codes), layout
    plain = [packing.unpack(c, shape, s) if c.dtype == torch.uint8 else c for c, s in zip(codes, signed, strict=True)]
    return tuple(c.to(torch.int16).contiguous() for c in plain), ""
