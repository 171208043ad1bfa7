"""One of the models to merge, in memory or in a file: a manifest, and tensors by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hdrq.checkpoint.format import Reader, Spec


@dataclass(frozen=True)
class State:
    """A model in memory, as its file would be."""

    manifest: dict[str, Any]
    tensors: Mapping[str, torch.Tensor]

    @property
    def specs(self) -> dict[str, Spec]:
        """The dtype and shape of every tensor."""
        return {name: (value.dtype, tuple(value.shape)) for name, value in self.tensors.items()}

    def tensor(self, name: str) -> torch.Tensor:
        return self.tensors[name]


Source = Reader | State


def label_of(source: Source, index: int) -> str:
    """What messages call the model at a place among those to be merged: its file, or its number."""
    return source.path if isinstance(source, Reader) else f"number {index}"
