"""Processes that share one run: every rank has the whole model and its part of the samples, and all decide together.

Before ranks exchange anything they tell each other that they are well. A rank that fails takes part once more, to say
so, and the others end with its message: none waits for what will not come.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from hdrq.calibrate.data import Call, spans
from hdrq.checks import differing, listed
from hdrq.errors import RankError

T = TypeVar("T")
LONGEST = 1000  # characters of a message to other ranks
TOLD = "hdrq_told"  # an error with this attribute is known to all ranks: it is the first rank that has the same


@dataclass(frozen=True)
class Ranks:
    """The ranks of a process group; of no group, this process alone, which exchanges nothing.

    Of n samples rank r has those from ``r·n // size`` on, up to the first of rank r + 1.

    """

    group: Any = None
    rank: int = 0
    size: int = 1

    @classmethod
    def of(cls, group: dist.ProcessGroup | None) -> Ranks:
        """The ranks of a process group, once all of them are here.

        Raises:
            TypeError: it is no process group.
            ValueError: this process is not in it, or it exchanges nothing but tensors of a GPU.
        """
        if group is None:
            return ALONE
        if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                f"process_group must be a torch.distributed.ProcessGroup or None, got {type(group).__name__}; "
                "torch.distributed.group.WORLD is that of all processes, after init_process_group"
            )
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        if rank < 0:
            raise ValueError("process_group must be one that this process is in, got one without it")
        ranks = cls(group, rank, size)
        try:
            ranks._well()
        except RankError as error:
            if "backend" not in str(error.__cause__).lower():  # another rank has failed, or does not come
                raise
            raise ValueError(
                "process_group must exchange tensors of the CPU between all of its ranks, as that of "
                f'init_process_group("gloo") or ("cpu:gloo,cuda:nccl") does, got {error.__cause__}'
            ) from error
        return ranks

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes and speaks for all."""
        return self.rank == 0

    # --- samples

    def span(self, count: int) -> tuple[int, int]:
        """The first of this rank's samples among so many, and the one after its last."""
        return self.rank * count // self.size, (self.rank + 1) * count // self.size

    def share(self, calls: Sequence[Call]) -> list[Call]:
        """This rank's samples of calls, cut into calls where all of them are."""
        first, last = self.span(sum(call.size for call in calls))
        found = []
        for call, (start, stop) in zip(calls, spans(list(calls)), strict=True):
            own = range(max(start, first) - start, min(stop, last) - start)
            if len(own) == call.size:
                found.append(call)
            elif len(own):
                found.append(call.at(torch.tensor(own)))
        return found

    def own(self, samples: torch.Tensor, count: int) -> torch.Tensor:
        """Of the samples of these numbers, among so many, those of this rank, by its own numbers."""
        first, last = self.span(count)
        return samples[(samples >= first) & (samples < last)] - first

    # --- exchanges

    def average(self, tensors: Iterable[torch.Tensor]) -> None:
        """Put into tensors of one dtype, in place, their mean over ranks: the same bits on every rank."""
        if self.size == 1:
            return
        tensors = list(tensors)
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
        self._sum(flat)
        flat /= self.size
        with torch.no_grad():
            for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def add(self, tensors: Iterable[torch.Tensor]) -> None:
        """Put into each tensor, in place, its sum over ranks: the same bits on every rank."""
        if self.size > 1:
            for tensor in tensors:
                self._sum(tensor)

    def total(self, *values: float) -> list[float]:
        """The sum over ranks of each number, in float64."""
        found = torch.tensor(values, dtype=torch.float64)
        self.add([found])
        return found.tolist()

    def gather(self, value: T) -> list[T]:
        """What each rank has, by rank. Tensors must be on the CPU."""
        if self.size == 1:
            return [value]
        self._well()
        return self._gathered(value)

    def of_first(self, make: Callable[[], T]) -> T:
        """What rank 0 makes. Tensors must be on the CPU."""
        if self.size == 1:
            return make()
        held = [make() if self.first else None]
        self._well()
        source = dist.get_global_rank(self.group, 0)
        self._exchange(dist.broadcast_object_list, held, source, device=torch.device("cpu"))
        return held[0]  # type: ignore[return-value]

    def dealt(self, names: Sequence[str], work: Callable[[str], T]) -> dict[str, T]:
        """``work(name)`` for each name, each done by one rank. Results must be on the CPU."""
        own = {name: work(name) for name in names[self.rank :: self.size]}
        parts = self.gather(own)
        return {name: parts[number % self.size][name] for number, name in enumerate(names)}

    def check_same(self, facts: Mapping[str, Any]) -> None:
        """Refuse to go on where ranks differ.

        Raises:
            ValueError: names what differs, and between which ranks.
        """
        first, *others = self.gather(dict(facts))
        for rank, other in enumerate(others, 1):
            names = differing(first, other)
            if odd := [f"{name} ({first.get(name)!s:.100} and {other.get(name)!s:.100})" for name in names]:
                raise ValueError(f"ranks must be alike, got different ones on ranks 0 and {rank}: {listed(odd)}")

    def on_this_host(self) -> int:
        """How many of the ranks are on this machine."""
        hosts = self.gather(socket.gethostname())
        return hosts.count(hosts[self.rank])

    # --- failures

    @contextmanager
    def together(self) -> Iterator[None]:
        """All ranks end the block, or none: an error of one is a :class:`RankError` of all others.

        Raises:
            RankError: another rank has failed, or is gone.
        """
        try:
            yield
            if self.size > 1:
                self._well()
        except Exception as error:
            if self.size > 1 and not hasattr(error, TOLD):
                setattr(error, TOLD, self.rank)
                message = f"{type(error).__name__}: {error}"[:LONGEST]
                with suppress(RankError):
                    setattr(error, TOLD, self._meet(message).index(message))
            raise

    def _well(self) -> None:
        """Wait for all ranks, and go on if all are well."""
        failures = self._meet(None)
        for rank, message in enumerate(failures):
            if message is not None:
                raise _known(RankError(f"rank {rank} has failed, which ends all {self.size}: {message}"))

    def _meet(self, failure: str | None) -> list[str | None]:
        """What each rank has failed from; nothing where all are well."""
        failed = torch.tensor([int(failure is not None)], dtype=torch.int32)
        self._exchange(dist.all_reduce, failed)
        return self._gathered(failure) if int(failed) else []

    def _gathered(self, value: T) -> list[T]:
        found: list[Any] = [None] * self.size
        self._exchange(dist.all_gather_object, found, value)
        return found

    def _sum(self, tensor: torch.Tensor) -> None:
        self._well()
        self._exchange(dist.all_reduce, tensor)

    def _exchange(self, operation: Callable, *args: Any, **options: Any) -> None:
        try:
            operation(*args, group=self.group, **options)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise _known(
                RankError(f"every rank must stay until the end, got no answer from one on rank {self.rank}: {reason}")
            ) from error


def _known(error: RankError) -> RankError:
    setattr(error, TOLD, 0)
    return error


ALONE = Ranks()
