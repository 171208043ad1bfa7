"""One of the models to merge, in memory, in a file or in a folder: a manifest, and tensors by name."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from hdrq.checkpoint.files import file_hash, output_folder, output_path
from hdrq.checkpoint.format import Reader, Spec, Writer, packs, statistics_specs
from hdrq.checkpoint.saving import Tensors
from hdrq.export.folders import Folder, FolderWriter, is_folder
from hdrq.export.onnx_import import OnnxModel, is_onnx
from hdrq.ops import dequantize, unpack


@dataclass(frozen=True)
class State:
    """A model in memory, as its file would be."""

    manifest: dict[str, Any]
    tensors: Tensors

    @property
    def specs(self) -> dict[str, Spec]:
        """The dtype and shape of every tensor of the model."""
        apart = statistics_specs(self.manifest)
        return {name: spec for name, spec in self.tensors.specs.items() if name not in apart}

    def tensor(self, name: str) -> torch.Tensor:
        return self.tensors[name]


Source = Reader | Folder | OnnxModel | State


def opened(path: str | os.PathLike, stack: ExitStack) -> Source:
    """A model in a file of hdrq, in a folder of transformers or in an ONNX file, until the stack is closed.

    Raises:
        FileNotFoundError, ValueError, MissingExtra: see :class:`Reader`, :class:`Folder` and :class:`OnnxModel`.
    """
    if is_onnx(path):
        return stack.enter_context(OnnxModel(path))
    return stack.enter_context(Folder(path)) if is_folder(path) else stack.enter_context(Reader(path))


def dequantized(source: Source, name: str) -> torch.Tensor:
    """The quantized weight of a model's layer, float32, in its shape."""
    facts = source.manifest["weights"][name]
    low, high = facts["range"]
    codes, scale = (source.tensor(f"{name}.weight.{part}") for part in ("codes", "scale"))
    codes = unpack(codes, facts["shape"], signed=low < 0) if packs(low, high) else codes
    zero_point = source.tensor(f"{name}.weight.zero_point").float() if facts.get("affine") else None
    return dequantize(codes, scale, zero_point=zero_point, axis=facts["axis"], group_size=facts.get("group_size"))


def check_out(out: str | os.PathLike, path: str | os.PathLike) -> None:
    """A result that is made of the model in ``path`` can be written to ``out``.

    Raises:
        ValueError: it is named as an ONNX file, which has the graph of one.
        FileNotFoundError, PermissionError: see :func:`hdrq.checkpoint.files.output_path`.
    """
    (output_folder if _keeps_form(out) and is_folder(path) else output_path)(out)
    if is_onnx(out) and not is_onnx(path):
        raise ValueError(
            f"out must be a .safetensors file where the first model is no ONNX file, got {os.fspath(out)!r}"
        )


def writer(out: str | os.PathLike, like: Source, specs: Mapping[str, Spec], manifest: dict[str, Any]) -> Any:
    """What writes a result: in the form of the model ``like``, unless ``out`` is named as a file of hdrq."""
    if _keeps_form(out) and isinstance(like, Folder):
        return FolderWriter(out, like, manifest)
    if _keeps_form(out) and isinstance(like, OnnxModel):
        return like.writer(out, manifest)
    return Writer(out, specs, manifest)


def _keeps_form(out: str | os.PathLike) -> bool:
    return not os.fspath(out).endswith(".safetensors")


def label_of(source: Source, index: int) -> str:
    """What messages call the model at a place among those to be merged: its path, or its number."""
    return f"number {index}" if isinstance(source, State) else source.path


def hash_of(source: Source) -> str | dict[str, str] | None:
    """The SHA-256 of a model's file, or of each of a folder's; None in memory."""
    if isinstance(source, State):
        return None
    return file_hash(source.path) if isinstance(source, Reader) else source.sha256()
