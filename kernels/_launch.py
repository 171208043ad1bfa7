"""How a tensor is cut into tiles, and how every kernel is launched."""

from functools import cache
from math import prod
from typing import NamedTuple

import torch
import triton

from hdrq.rng import KEEP_ALL

BLOCK = 1024  # elements of a tile
PER_THREAD = 8  # of them: 16 bytes of a half type
SHORTEST = 128  # the shortest row that is cut into tiles of its own length


class Tiling(NamedTuple):
    """Flat tiles over a tensor. They decide no bit of a forward pass, only which terms are summed together."""

    numel: int
    inner: int  # length of a row: neighbours of one channel
    channels: int
    rows: str  # "one", "long" or "short": see _lang.per_element
    block: int

    @property
    def count(self) -> int:
        return triton.cdiv(self.numel, self.block)

    @property
    def slots(self) -> int:
        """The most tiles that a row of ``_lang.store_row_sums`` has a part in."""
        return {"one": self.count, "long": self.inner // self.block + 2, "short": self.inner}[self.rows]

    def row_sums(self, device: torch.device) -> torch.Tensor:
        """Room for the parts of the rows' sums. A row may have fewer than ``slots``, so the room starts as zeros."""
        rows = 1 if self.rows == "one" else self.numel // self.inner
        return torch.zeros((rows, self.slots), dtype=torch.float32, device=device)

    def channel_sums(self, row_sums: torch.Tensor) -> torch.Tensor:
        """Float64 (channels,), from what the kernel left in ``row_sums``."""
        return row_sums.view(-1, self.channels, self.slots).sum((0, 2), dtype=torch.float64)


def operand(x: torch.Tensor) -> torch.Tensor:
    """``x`` as the kernels take it. Triton's interpreter cuts float32 to bfloat16 toward zero (a GPU rounds to nearest
    even) and breaks subnormals, so it gets, and returns, float32; the ops narrow what they are given."""
    return x.float() if triton.knobs.runtime.interpret and x.dtype == torch.bfloat16 else x


def tiling(x: torch.Tensor, axis: int | None) -> Tiling:
    """The tiles of a contiguous tensor that is not empty, whose scale varies along ``axis``."""
    if axis is None:
        return Tiling(x.numel(), x.numel(), 1, "one", BLOCK)
    inner, channels = prod(x.shape[axis + 1 :]), x.shape[axis]
    if inner < SHORTEST:
        return Tiling(x.numel(), inner, channels, "short", BLOCK)
    return Tiling(x.numel(), inner, channels, "long", min(BLOCK, 1 << (inner.bit_length() - 1)))


def row_block(length: int) -> int:
    """The tile of a row that has tiles of its own: a shorter one where the row is short."""
    return max(SHORTEST, min(BLOCK, triton.next_power_of_2(length)))


def drops(threshold: int) -> bool:
    """Whether a threshold leaves any element as it is."""
    return threshold < KEEP_ALL


def launch(kernel, programs: int, x: torch.Tensor, *args, block: int, per_thread=PER_THREAD, **constants) -> None:
    """Run ``kernel`` on the device of ``x``. Here, once for all, it is compiled without fused multiply-adds."""
    warps = max(1, block // (per_thread * warp_size(x.device)))
    with torch.cuda.device_of(x):
        kernel[(programs,)](*args, **constants, BLOCK=block, num_warps=warps, enable_fp_fusion=False)


@cache
def warp_size(device: torch.device) -> int:
    """Threads of a warp: 32, or 64 on AMD's data centre GPUs. The interpreter has none."""
    return torch.cuda.get_device_properties(device).warp_size if device.type == "cuda" else 32
