"""Labelled data of several domains: split, and drawn in an order that seed and step decide."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader

from hdrq import checks
from hdrq.checkpoint.workdir import state_hash


class Labelled:
    """Samples with labels, read by index.

    Args:
        source: a pair of tensors, samples (N, …) and labels (N,) int64; or a dataset with ``len`` and
            ``dataset[i] = (sample, label)``.
        name: of the domain, for messages.

    Raises:
        TypeError, ValueError: no labels, or not one for each sample.
    """

    def __init__(self, source: Any, name: str) -> None:
        self.name, self.source = name, source
        self.tensors = isinstance(source, tuple | list) and len(source) == 2
        if isinstance(source, DataLoader):
            raise TypeError(
                f"domains[{name!r}] must be tensors or a dataset, got a DataLoader; give its .dataset: the seed "
                "decides the order, so that a run goes on to the bit"
            )
        if isinstance(source, torch.Tensor) or (isinstance(source, tuple | list) and not self.tensors):
            raise TypeError(
                f"domains[{name!r}] must be samples with labels, got {type(source).__name__} without labels"
            )
        if not self.tensors and not (hasattr(source, "__len__") and hasattr(source, "__getitem__")):
            raise TypeError(
                f"domains[{name!r}] must be a pair of tensors or a dataset with a length, got {type(source).__name__}"
            )
        if self.tensors:
            x, y = source
            if not (isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor) and y.shape == x.shape[:1]):
                raise ValueError(f"labels of domains[{name!r}] must be one for each sample, a tensor (N,), got others")
        self.count = len(source[0]) if self.tensors else len(source)
        if self.count < 2:
            raise ValueError(f"domains[{name!r}] must have two samples or more, got {self.count}")
        self.batch([0])

    def __len__(self) -> int:
        return self.count

    def batch(self, index: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """The samples at ``index``, and their labels, int64."""
        if self.tensors:
            at = torch.as_tensor(index)
            return self.source[0][at], self._labels(self.source[1][at])
        if hasattr(self.source, "batch"):
            x, y = self.source.batch(index)
            return x, self._labels(y)
        pairs = [self.source[int(i)] for i in index]
        if any(not isinstance(pair, tuple | list) or len(pair) != 2 for pair in pairs):
            got = type(pairs[0]).__name__
            raise TypeError(f"domains[{self.name!r}] must have samples with labels, got items of {got} without labels")
        x = torch.stack([torch.as_tensor(x) for x, _ in pairs])
        return x, self._labels(torch.stack([torch.as_tensor(y) for _, y in pairs]))

    def _labels(self, y: torch.Tensor) -> torch.Tensor:
        if y.ndim != 1 or y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
            raise TypeError(
                f"labels of domains[{self.name!r}] must be integers, (N,), got {checks.short(y.dtype)} of shape "
                f"{tuple(y.shape)}"
            )
        return y.long()

    @property
    def fingerprint(self) -> str:
        """What says that it is other data: the tensors, or the number of a dataset's samples and the first of them."""
        if self.tensors:
            return state_hash({"x": self.source[0], "y": self.source[1]})
        own = getattr(self.source, "fingerprint", None)
        x, y = self.batch([0, self.count - 1])
        return own if isinstance(own, str) else state_hash({"x": x, "y": y}, str(self.count))


@dataclass(frozen=True)
class Part:
    """Some of the samples of a domain."""

    data: Labelled
    index: torch.Tensor

    def __len__(self) -> int:
        return len(self.index)

    def batches(self, size: int):
        """All of them, in order."""
        for some in self.index.split(size):
            yield self.data.batch(some.tolist())


class Stream:
    """An endless stream of batches of a part: pass after pass over all of it, each in an order of its own.

    What a step reads is a function of the seed, the name and the step.
    """

    def __init__(self, part: Part, size: int, seed: int) -> None:
        self.part, self.size, self.seed = part, size, seed
        self._orders: dict[int, torch.Tensor] = {}

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        places = range(step * self.size, (step + 1) * self.size)
        found = [int(self._order(place // len(self.part))[place % len(self.part)]) for place in places]
        return self.part.data.batch(self.part.index[found].tolist())

    def _order(self, number: int) -> torch.Tensor:
        if number not in self._orders:
            self._orders = {k: order for k, order in self._orders.items() if k == number - 1}
            words = (self.seed, "order", self.part.data.name, number)
            self._orders[number] = torch.randperm(len(self.part), generator=generator(*words))
        return self._orders[number]


def labelled(domains: Mapping[str, Any]) -> dict[str, Labelled]:
    """Domains by name, checked.

    Raises:
        TypeError, ValueError: no mapping, one domain only, or data without labels.
    """
    if not isinstance(domains, Mapping) or not all(isinstance(name, str) for name in domains):
        raise TypeError(f"domains must be a mapping from names to labelled data, got {type(domains).__name__}")
    if len(domains) < 2:
        raise ValueError(
            f"domains must be two or more, one of which is left out of training, got {len(domains)}: "
            f"{checks.listed(domains) or 'none'}"
        )
    return {name: Labelled(source, name) for name, source in domains.items()}


def split(data: Labelled, share: float, seed: int) -> tuple[Part, Part]:
    """A domain cut at random into what is left and a ``share`` of it, one sample at least."""
    order = torch.randperm(len(data), generator=generator(seed, "split", data.name))
    few = min(max(1, round(share * len(data))), len(data) - 1)
    return Part(data, order[few:].sort().values), Part(data, order[:few].sort().values)


def words_seed(*words: Any) -> int:
    """A seed of 63 bits that words decide."""
    return int.from_bytes(hashlib.sha256(repr(words).encode()).digest()[:8], "little") >> 1


def generator(*words: Any) -> torch.Generator:
    """A generator of random numbers that words decide."""
    return torch.Generator().manual_seed(words_seed(*words))
