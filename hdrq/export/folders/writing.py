"""A file of hdrq as a folder of transformers again: the template's files, with other numbers in its shards."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import torch

from hdrq import checks
from hdrq.checkpoint.files import disk_with_room, new_folder
from hdrq.checkpoint.format import TABLES, Reader
from hdrq.checkpoint.tensors import as_bytes, header, places_of
from hdrq.export.folders.reading import UNLOADABLE, Folder

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")  # that are not copied


class FolderWriter:
    """A folder like ``template`` to write to, in a ``with`` block, at whose end it appears, whole.

    Tensors are those of a file of hdrq, in any order, as :class:`hdrq.checkpoint.format.Writer` takes them; those of a
    quantized weight are put into the template's form once all are there.

    Args:
        path: of the folder; it must be empty or not exist.
        template: where configuration, tokenizer, shards and dtypes are taken from.
        manifest: how the numbers were made, which goes into the metadata of every shard; and the ranges of inputs.

    Raises:
        ValueError: the folder is not empty; a tensor that the template has not; one missing at the end; a scale that
            does not fit the template's dtype.
        OSError: it cannot be written; nothing is left behind.
    """

    def __init__(self, path: str | os.PathLike, template: Folder, manifest: dict[str, Any]) -> None:
        check_weights(manifest, template)
        self.path, self.template, self.manifest = path, template, manifest
        self._waiting: dict[str, dict[str, torch.Tensor]] = {name: {} for name in template.forms}
        self._missing, self._written = set(template.specs), set[str]()
        self._shards: dict[str, BinaryIO] = {}
        self._places: dict[str, int] = {}  # of tensors in their shards

    def __enter__(self) -> FolderWriter:
        facts = json.dumps({k: v for k, v in self.manifest.items() if k not in TABLES}, sort_keys=True)
        with ExitStack() as stack:
            folder = stack.enter_context(new_folder(self.path))
            with disk_with_room(self.path):
                for entry in Path(self.template.path).iterdir():
                    if entry.is_file() and not entry.name.endswith(WEIGHTS):
                        shutil.copyfile(entry, folder / entry.name)
                for shard, source in self.template.files.items():
                    specs = dict(sorted(source.specs.items(), key=lambda item: source.places[item[0]]))
                    places = places_of(specs)
                    start = header(specs, places, {**source.metadata, "hdrq": facts})
                    file = self._shards[shard] = stack.enter_context(open(folder / shard, "wb"))
                    file.write(start)
                    file.truncate(len(start) + max((end for _, end in places.values()), default=0))
                    self._places |= {name: len(start) + first for name, (first, _) in places.items()}
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error) -> bool | None:
        if error[0] is None:
            try:
                if self._missing:
                    missing = checks.listed(sorted(self._missing))
                    raise ValueError(f"every tensor must be written, got none for {missing}")
                # What no tensor of hdrq's stands for, such as shapes, the order of groups, and symmetric zero points.
                for name in self.template.raw.keys() - self._written:
                    self._put(name, self.template.read(name))
                with disk_with_room(self.path):
                    for file in self._shards.values():
                        file.flush()
                        os.fsync(file.fileno())
            except BaseException as problem:
                self._stack.__exit__(type(problem), problem, problem.__traceback__)
                raise
        return self._stack.__exit__(*error)

    def write(self, name: str, value: torch.Tensor) -> None:
        """Write one tensor."""
        if name not in self._missing:
            raise ValueError(f"{name} must be a tensor of {self.template.path}, written once")
        if tuple(value.shape) != self.template.specs[name][1] or value.dtype != self.template.specs[name][0]:
            want = self.template.specs[name]
            raise ValueError(f"{name} must be {want[0]} of shape {want[1]}, got {value.dtype} of {tuple(value.shape)}")
        self._missing.remove(name)
        layer, _, part = name.rpartition(".weight.")
        if layer in self._waiting and part:
            parts = self._waiting[layer]
            parts[part] = value.detach().cpu()
            form = self.template.forms[layer]
            if len(parts) == 2 + form.affine:
                dtypes = {n: dtype for n, (dtype, _) in self.template.raw.items() if n in form.tensors.values()}
                tensors = form.written(parts["codes"], parts["scale"], parts.get("zero_point"), dtypes)
                for own, tensor in tensors.items():
                    self._put(own, tensor)
                del self._waiting[layer]
        elif name.removesuffix(".input.scale") in self.template.inputs and name.endswith(".input.scale"):
            self._put_input(name.removesuffix(".input.scale"), value)
        elif not (name.endswith(UNLOADABLE) and name.removesuffix(UNLOADABLE) in self.template.forms):
            self._put(name, value)

    def _put_input(self, layer: str, scale: torch.Tensor) -> None:
        low, high = self.manifest["inputs"][layer]
        shift = -(low + high + 1) // 2  # a range is that of a signed type less its zero point
        name = f"{layer}.input_zero_point"
        if name in self.template.raw:
            self._put(name, torch.tensor(shift).to(self.template.raw[name][0]))
        elif shift:
            raise ValueError(f"input of {layer} must be symmetric like the template's, got the range [{low}, {high}]")
        self._put(f"{layer}.input_scale", scale.to(self.template.raw[f"{layer}.input_scale"][0]))

    def _put(self, name: str, value: torch.Tensor) -> None:
        dtype, shape = self.template.raw[name]
        value = value.detach().cpu().reshape(shape).contiguous()
        if value.dtype != dtype:
            raise ValueError(f"{name} must be {dtype}, got {value.dtype}")
        file = self._shards[self.template.shard_of[name]]
        with disk_with_room(self.path):
            file.seek(self._places[name])
            file.write(as_bytes(value))
        self._written.add(name)


def check_weights(manifest: Mapping[str, Any], template: Folder) -> None:
    """Refuse weights of other layers, ranges or grids than the template's.

    Raises:
        ValueError: what differs.
    """
    want, got = template.manifest["weights"], manifest["weights"]
    other = [
        f"{name} ({got.get(name)}, not {want.get(name)})"
        for name in want.keys() | got.keys()
        if got.get(name) != want.get(name)
    ]
    if other:
        raise ValueError(f"weights must be those of {template.path}, got {checks.listed(sorted(other))}")


def write_folder(file: str | os.PathLike, template: str | os.PathLike, out: str | os.PathLike) -> None:
    """Write a file of hdrq that was read from a folder, or merged from such files, as a folder like ``template``.

    Configuration, tokenizer and all else are the template's; codes, scales, zero points and float tensors are the
    file's, in the template's dtypes: scales in float16 are rounded to it.

    Raises:
        FileNotFoundError, ValueError: the file is not of the template's layers, grids and tensors.
    """
    with Reader(file) as reader, Folder(template) as folder:
        if reader.specs != folder.specs:
            other = sorted(
                n for n in reader.specs.keys() | folder.specs.keys() if reader.specs.get(n) != folder.specs.get(n)
            )
            raise ValueError(
                f"{reader.path} must have the tensors of {folder.path}, got others: {checks.listed(other)}"
            )
        with FolderWriter(out, folder, reader.manifest) as writer:
            for name in reader.specs:
                writer.write(name, reader.tensor(name))
