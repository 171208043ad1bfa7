"""How a tensor is cut into tiles, and how every kernel is launched."""

from functools import cache
from math import prod
from typing import NamedTuple

import torch
import triton

from hdrq.rng import KEEP_ALL

BLOCK = 1024  # elements of a tile
PER_THREAD = 32  # bytes
LARGEST = 2**31  # elements of a tensor whose tiles are counted in 64 bits
SHORTEST = 128  # the shortest row that is cut into tiles of its own length


class Tiling(NamedTuple):
    """Flat tiles over a tensor. They decide no bit of a forward pass, only which terms are summed together."""

    numel: int
    inner: int  # length of a row: neighbours of one channel
    channels: int
    rows: str  # "one", "groups", "long" or "short": see _lang.place
    block: int
    group: int = 4  # neighbours that a thread loads at once

    @property
    def count(self) -> int:
        return triton.cdiv(self.numel, self.block)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Of the tensor and of its rows, as kernels take them."""
        over = 0, 0
        if self.numel < LARGEST and self.rows != "one":
            over = reciprocal(self.inner // (self.group if self.rows == "groups" else 1)), reciprocal(self.channels)
        return self.numel, self.inner, self.channels, *over

    @property
    def cut(self) -> dict:
        """The constants of a kernel that say how tensors are cut."""
        return {"ROWS": self.rows, "GROUP": self.group, "block": self.block}

    @property
    def span(self) -> int:
        """The neighbours of a row whose terms ``_lang.store_row_sums`` adds up, where rows are of groups."""
        return min(self.inner & -self.inner, 32 * self.group, 128) if self.rows == "groups" else 1

    @property
    def slots(self) -> int:
        """The most parts that a row's sum comes in."""
        if self.rows == "one":
            return self.count
        return self.inner // self.block + 2 if self.rows == "long" else self.inner // self.span

    def row_sums(self, device: torch.device) -> torch.Tensor:
        """Room for the parts of the rows' sums: of zeros, where a row may have fewer than ``slots``."""
        rows = 1 if self.rows == "one" else self.numel // max(self.inner, 1)
        room = torch.zeros if self.rows == "long" else torch.empty
        return room((rows, self.slots), dtype=torch.float32, device=device)

    def channel_sums(self, row_sums: torch.Tensor, factor: float) -> torch.Tensor:
        """Float32 (channels,), ``factor`` times what the kernel left in ``row_sums``, added up in float64."""
        sums = row_sums.view(-1, self.channels, self.slots).sum((0, 2), dtype=torch.float64)
        return torch.mul(sums, factor, out=torch.empty_like(sums, dtype=torch.float32))  # one kernel, cast included


def operand(x: torch.Tensor) -> torch.Tensor:
    """``x`` as the kernels take it. Triton's interpreter cuts float32 to bfloat16 toward zero (a GPU rounds to nearest
    even) and breaks subnormals, so it gets, and returns, float32; the ops narrow what they are given."""
    return x.float() if triton.knobs.runtime.interpret and x.dtype == torch.bfloat16 else x


def reciprocal(divisor: int) -> int:
    """What ``_lang.floor_divide`` takes for a divisor up to 2³¹: a factor of 32 bits, and 1 more than how far to shift,
    so that it never fits 32 bits: the interpreter would give it a type of 32, and a launch one of 64.

    With ``2^shift ≥ divisor`` the factor is ``2^(31 + shift) / divisor``, rounded up. Its error is below
    ``2^shift / divisor``, which for a dividend below 2³¹ is too little to reach the next integer.
    """
    shift = (divisor - 1).bit_length()
    return (shift + 1) << 32 | -(-(1 << (31 + shift)) // divisor)


def tiling(x: torch.Tensor, axis: int | None, *, groups: bool = False) -> Tiling:
    """The tiles of a contiguous tensor that is not empty, whose scale varies along ``axis``.

    ``groups`` says that the kernel knows rows of whole groups.
    """
    group = 8 if x.element_size() <= 2 else 4
    if axis is None:
        return Tiling(x.numel(), x.numel(), 1, "one", BLOCK, group)
    inner, channels = prod(x.shape[axis + 1 :]), x.shape[axis]
    groups = groups and x.numel() < LARGEST
    if groups and inner % group == 0:
        return Tiling(x.numel(), inner, channels, "groups", BLOCK, group)
    if inner < (BLOCK if groups else SHORTEST):
        return Tiling(x.numel(), inner, channels, "short", BLOCK, group)
    return Tiling(x.numel(), inner, channels, "long", min(BLOCK, 1 << (inner.bit_length() - 1)), group)


def row_block(length: int) -> int:
    """The tile of a row that has tiles of its own: a shorter one where the row is short."""
    return max(SHORTEST, min(BLOCK, triton.next_power_of_2(length)))


def drops(threshold: int) -> bool:
    """Whether a threshold leaves any element as it is."""
    return threshold < KEEP_ALL


def launch(
    kernel, programs: int, x: torch.Tensor, *args, block: int, per_thread: int | None = None, **constants
) -> None:
    """Run ``kernel`` on the device of ``x``. Here, once for all, it is compiled without fused multiply-adds."""
    if per_thread is None:
        per_thread = PER_THREAD // x.element_size() if x.is_floating_point() else 8
    warps = max(1, block // (per_thread * warp_size(x.device)))
    with torch.cuda.device_of(x):
        kernel[(programs,)](*args, **constants, BLOCK=block, num_warps=warps, enable_fp_fusion=False)


@cache
def warp_size(device: torch.device) -> int:
    """Threads of a warp: 32, or 64 on AMD's data centre GPUs. The interpreter has none."""
    return torch.cuda.get_device_properties(device).warp_size if device.type == "cuda" else 32
