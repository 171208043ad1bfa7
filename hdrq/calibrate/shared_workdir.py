"""A work folder that one rank reads and writes for all."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from hdrq.calibrate.ranks import Ranks
from hdrq.checkpoint.workdir import Workdir


class SharedWorkdir(Workdir):
    """The folder of one run of several ranks. All call the same methods; rank 0 alone touches the disk.

    What it cannot do there ends all of them, as every failure of a rank does.
    """

    def __init__(self, path: str | os.PathLike, fingerprint: Mapping[str, Any], resume: bool, ranks: Ranks) -> None:
        self.ranks = ranks

        def opened() -> Path:
            Workdir.__init__(self, path, fingerprint, resume)
            return self.path

        self.path = ranks.of_first(opened)

    def save_block(self, index: int, tensors: Mapping[str, torch.Tensor], facts: dict) -> None:
        if self.ranks.first:
            super().save_block(index, tensors, facts)

    def save_current(self, tensors: Mapping[str, torch.Tensor], facts: dict) -> None:
        if self.ranks.first:
            super().save_current(tensors, facts)

    def write_losses(self, rows: list[tuple]) -> None:
        if self.ranks.first:
            super().write_losses(rows)

    def _load(self, name: str) -> tuple[dict[str, torch.Tensor], dict] | None:
        load: Callable = super()._load
        return self.ranks.of_first(lambda: load(name))
