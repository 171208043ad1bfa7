"""Integers of 2 to 8 bits in int32 words, as compressed-tensors, GPTQ and AWQ store them."""

from __future__ import annotations

import torch

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight neighbours the nibbles of a word hold, lowest first


def words_of(count: int, bits: int) -> int:
    """How many words hold so many integers."""
    return -(-count * bits // 32)


def unpack_words(words: torch.Tensor, bits: int, count: int, *, padded: bool = False) -> torch.Tensor:
    """The integers that words hold along their last axis, lowest bits first.

    Equation: integer i has the bits ``bits·i … bits·(i + 1) − 1`` of the words as one number; ``padded``: each word has
    ``⌊32/bits⌋`` of them, and its highest bits are unused.

    Args:
        words: int32, ``(…, W)``.
        count: of integers along the axis.

    Returns:
        uint8, ``(…, count)``.
    """
    if 8 % bits == 0:  # 2, 4 and 8 bits: none lies in two bytes
        data = words.contiguous().view(torch.uint8)
        parts = [(data >> shift) & (2**bits - 1) for shift in range(0, 8, bits)] if bits < 8 else [data]
        return torch.stack(parts, -1).flatten(-2)[..., :count]
    number = words.long() & 0xFFFFFFFF
    word, shift = _places(count, bits, padded)
    low = number[..., word] >> shift
    high = number[..., (word + 1).clamp(max=words.shape[-1] - 1)] << (32 - shift)
    return ((low | high) & (2**bits - 1)).to(torch.uint8)


def pack_words(values: torch.Tensor, bits: int, *, padded: bool = False) -> torch.Tensor:
    """Words that hold integers along the last axis; the inverse of :func:`unpack_words`.

    Args:
        values: any integers in [0, 2^bits), ``(…, count)``.

    Returns:
        int32, ``(…, W)``.
    """
    count = values.shape[-1]
    per_word = 32 // bits
    size = -(-count // per_word) if padded else words_of(count, bits)
    if 8 % bits == 0:
        whole = values.new_zeros((*values.shape[:-1], size * per_word), dtype=torch.uint8)
        whole[..., :count] = values
        parts = whole.unflatten(-1, (-1, 8 // bits)).unbind(-1)
        data = parts[0].clone()
        for k, part in enumerate(parts[1:], start=1):
            data |= part << (bits * k)
        return data.view(torch.int32)
    word, shift = _places(count, bits, padded)
    number = values.long() << shift
    total = torch.zeros((*values.shape[:-1], size + 1), dtype=torch.int64)
    # No two integers have a bit in common, so sums are unions.
    total.index_add_(-1, word, number & 0xFFFFFFFF)
    total.index_add_(-1, word + 1, number >> 32)
    total = total[..., :size]
    return torch.where(total >= 2**31, total - 2**32, total).to(torch.int32)


def _places(count: int, bits: int, padded: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The word in which each integer begins, and at which bit."""
    index = torch.arange(count)
    if padded:
        return index // (32 // bits), index % (32 // bits) * bits
    return index * bits // 32, index * bits % 32


def from_awq(values: torch.Tensor) -> torch.Tensor:
    """Integers of AWQ's words, ``(…, 8·n)`` in the order of their nibbles, in the order of columns."""
    inverse = sorted(range(8), key=AWQ_ORDER.__getitem__)
    return values.unflatten(-1, (-1, 8))[..., inverse].flatten(-2)


def to_awq(values: torch.Tensor) -> torch.Tensor:
    """The inverse of :func:`from_awq`."""
    return values.unflatten(-1, (-1, 8))[..., list(AWQ_ORDER)].flatten(-2)
