"""One of the models to merge, in memory, in a file or in a folder: a manifest, and tensors by name."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from hdrq.checkpoint.files import file_hash
from hdrq.checkpoint.format import Reader, Spec
from hdrq.export.folders import Folder, is_folder


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


Source = Reader | Folder | State


def opened(path: str | os.PathLike, stack: ExitStack) -> Source:
    """A model in a file of hdrq, or in a folder of transformers, until the stack is closed.

    Raises:
        FileNotFoundError, ValueError: see :class:`Reader` and :class:`Folder`.
    """
    return stack.enter_context(Folder(path)) if is_folder(path) else stack.enter_context(Reader(path))


def label_of(source: Source, index: int) -> str:
    """What messages call the model at a place among those to be merged: its path, or its number."""
    return f"number {index}" if isinstance(source, State) else source.path


def hash_of(source: Source) -> str | dict[str, str] | None:
    """The SHA-256 of a model's file, or of each of a folder's; None in memory."""
    if isinstance(source, State):
        return None
    return source.sha256() if isinstance(source, Folder) else file_hash(source.path)
