"""Where the inputs and targets of blocks lie while they are learned: on the device, on the host, or on disk."""

from __future__ import annotations

import math
import os
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch

from hdrq import checks
from hdrq.mapped import mapped

TIERS = ("device", "host", "disk")
ADVICE = "workdir or TMPDIR says where the cache is, and fewer samples need less"
UNKNOWN_FREE = 4 << 30  # bytes of the host's memory that count as free where the system does not say, as on Windows
MEMINFO = Path("/proc/meminfo")  # Linux's, in kB
AHEAD = 2  # batches that are gathered while a step runs


def check_cache(where: str, budget: int | None) -> None:
    """Refuse what :class:`Cache` knows no place or size of."""
    checks.choice("cache", where, ("auto", *TIERS))
    if budget is not None:
        checks.integer("cache_bytes", budget, 0, 2**63 - 1)


class Cache:
    """Memory for tensors with one row for each sample, in the fastest place that has room.

    Args:
        device: where blocks run.
        where: ``"auto"`` (the device, then pinned memory of the host, then disk), or one of :data:`TIERS` for all.
        budget: bytes that may be taken on the device, and again on the host; None for half of what is free now.
        folder: where files are mapped from; they have no name there, so that none outlives the process. None for the
            system's folder of temporary files, as where there is none.
        sharers: processes of one run on this machine, each with as much of what is free on the host.

    ``peak`` says how many bytes each tier held at most.
    """

    def __init__(
        self,
        device: torch.device,
        where: str = "auto",
        budget: int | None = None,
        folder: Path | None = None,
        sharers: int = 1,
    ) -> None:
        check_cache(where, budget)
        self.device, self.where, self.folder = device, where, folder
        if folder is not None and not folder.is_dir():  # another rank has made it, on a machine of its own
            self.folder = None
        self._room = {"device": budget, "host": budget} if budget is not None else half_of_free(device, sharers)
        if device.type == "cpu":
            self._room["host"] = 0  # the host is the device
        self._room["disk"] = 2**63 - 1
        self.used = dict.fromkeys(TIERS, 0)
        self.peak = dict.fromkeys(TIERS, 0)

    def rows(self, count: int, shape: Sequence[int], dtype: torch.dtype) -> Rows:
        """Room for ``count`` rows.

        Raises:
            OSError: the disk is full.
        """
        size = count * math.prod(shape) * dtype.itemsize
        tier = self.where
        if tier == "auto":
            tier = next(t for t in TIERS if self.used[t] + size <= self._room[t])
        if tier == "device":
            tensor = torch.empty((count, *shape), dtype=dtype, device=self.device)
        elif tier == "host":
            tensor = torch.empty((count, *shape), dtype=dtype, pin_memory=self.device.type == "cuda")
        else:
            tensor = mapped((count, *shape), dtype, self.folder, "the cache's folder", ADVICE)
        self.used[tier] += size
        self.peak[tier] = max(self.peak[tier], self.used[tier])
        rows = Rows(tensor, tier, self.device)
        weakref.finalize(rows, self._returned, tier, size)
        return rows

    def _returned(self, tier: str, size: int) -> None:
        self.used[tier] -= size


class Rows:
    """A tensor with one row for each sample."""

    def __init__(self, tensor: torch.Tensor, tier: str, device: torch.device) -> None:
        self.tensor, self.tier, self.device = tensor, tier, device

    def write(self, start: int, values: torch.Tensor) -> None:
        self.tensor[start : start + len(values)] = values.detach()  # a forward may turn gradients on by itself

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Rows, copied to the device: whoever reads may write to them."""
        return self.tensor[start:stop].to(self.device, copy=True)

    def gather(self, index: torch.Tensor) -> torch.Tensor:
        """The rows at ``index``, where they lie."""
        picked = self.tensor[index.to(self.tensor.device, non_blocking=True)]
        return picked.pin_memory() if self.device.type == "cuda" and picked.device.type == "cpu" else picked


def batches(sources: Sequence[Rows], indices: torch.Tensor) -> Iterator[list[torch.Tensor]]:
    """The rows at each row of ``indices``, on the device. What lies elsewhere is gathered ahead, while steps run."""

    def gather(index: torch.Tensor) -> list[torch.Tensor]:
        return [rows.gather(index) for rows in sources]

    def arrived(parts: list[torch.Tensor]) -> list[torch.Tensor]:
        return [part.to(rows.device, non_blocking=True) for part, rows in zip(parts, sources, strict=True)]

    if all(rows.tier == "device" for rows in sources):
        yield from map(gather, indices.to(sources[0].device))
        return
    with ThreadPoolExecutor(1, "hdrq-fetch") as worker:
        coming: deque = deque()
        for index in indices:
            coming.append(worker.submit(gather, index))
            if len(coming) > AHEAD:
                yield arrived(coming.popleft().result())
        while coming:
            yield arrived(coming.popleft().result())


def half_of_free(device: torch.device, sharers: int = 1) -> dict[str, int]:
    """Half of the bytes that are free on the device, and of those on the host for each of so many processes."""
    host = _free_on_host() // 2 // sharers
    own = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else host
    return {"device": own, "host": host}


def _free_on_host() -> int:
    """Bytes that programs can have without swapping. Linux says so; free pages leave out what its file cache holds."""
    with suppress(OSError, ValueError, StopIteration):
        lines = MEMINFO.read_text().splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable:")))
    if not hasattr(os, "sysconf"):
        return UNKNOWN_FREE
    free, total = "SC_AVPHYS_PAGES", "SC_PHYS_PAGES"
    pages = free if free in os.sysconf_names else total  # macOS does not say what is free
    return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")
