"""Weights in files: what a copy of a model holds needs no memory of its own but while its unit is fitted."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from hdrq.mapped import give_back_freed_memory, mapped

SMALLEST = 1 << 16  # bytes of a tensor that is worth a file: a map takes whole pages, and a process has 65,530 maps
ADVICE = "offload_folder says where weights lie, and must have room for the copies of the model"


class Offload:
    """A folder whose files hold weights; they have no name there, so that none outlives the process.

    Args:
        folder: a folder on a disk, made if there is none. What lies on a ``tmpfs``, as ``/tmp`` on some systems, is
            memory all the same.

    Raises:
        ValueError: ``folder`` is something else.
        OSError: it cannot be made.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        if not isinstance(folder, str | os.PathLike) or not os.fspath(folder):
            raise ValueError(f"offload_folder must be a folder on a disk, got {folder!r}")
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"offload_folder must be a folder, got {os.fspath(folder)!r}, which is none")
        self.folder.mkdir(parents=True, exist_ok=True)

    @classmethod
    def of(cls, folder: str | os.PathLike | None, models: Mapping[str, nn.Module]) -> Offload | None:
        """The folder for the copies of models; None for None.

        Raises:
            ValueError, OSError: as above; a model, named by its key, is not on the CPU.
        """
        if folder is None:
            return None
        for name, model in models.items():
            device = next((p.device for p in model.parameters()), torch.device("cpu"))
            if device.type != "cpu":
                raise ValueError(
                    f"{name} must be on the CPU where weights are offloaded, got {device}; call {name}.cpu(), or leave "
                    "offload_folder out"
                )
        return cls(folder)

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy with the strides of a clone: in a file, or in memory if it is small, or not on a CPU.

        Raises:
            OSError: the disk is full.
        """
        if tensor.device.type != "cpu" or tensor.layout != torch.strided:
            return tensor.clone()
        return self.empty_like(tensor).copy_(tensor)

    def empty_like(self, tensor: torch.Tensor) -> torch.Tensor:
        """Room on the CPU with the strides of a clone, for channels may be last, and operations choose kernels by that.

        It is in a file, or in memory if the tensor is small.

        Raises:
            OSError: the disk is full.
        """
        if tensor.nbytes < SMALLEST:
            return torch.empty_like(tensor, device="cpu")
        clone = torch.empty_like(tensor, device="meta")
        home = mapped((tensor.numel(),), tensor.dtype, self.folder, "the folder of weights", ADVICE)
        return home.as_strided(clone.shape, clone.stride())

    def put_parameters(self, module: nn.Module, but: Sequence[nn.Parameter] = ()) -> None:
        """Move a module's parameters to files, but those given, which lie there."""
        there = {id(parameter) for parameter in but}
        for parameter in module.parameters():
            if id(parameter) not in there:
                parameter.data = self.put(parameter.data)

    @contextmanager
    def in_memory(self, module: nn.Module) -> Iterator[None]:
        """A module's parameters are in memory inside the block, and in files after it."""
        for parameter in module.parameters():
            parameter.data = parameter.data.clone()
        yield
        self.put_parameters(module)
        give_back_freed_memory()
