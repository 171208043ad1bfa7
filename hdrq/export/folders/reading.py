"""A folder of transformers with quantized weights, read as a file of hdrq would be: one tensor at a time."""

from __future__ import annotations

import json
import os
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from hdrq._version import __version__
from hdrq.checkpoint.files import file_hash
from hdrq.checkpoint.format import Spec, Writer, codes_spec
from hdrq.checkpoint.library import SafetensorError
from hdrq.checkpoint.tensors import TensorFile
from hdrq.export.folders.schemes import forms_of, input_ranges

INDEX = ".safetensors.index.json"
LARGEST_TEXT = 2**27  # bytes of a config or an index
UNLOADABLE = ".g_idx"  # columns in the order of groups are no layer's of torch


class Folder:
    """A folder with ``config.json`` and one safetensors file or an index of several, in a ``with`` block.

    ``manifest``, ``specs`` and :meth:`tensor` are those of :class:`hdrq.checkpoint.format.Reader`, so a folder is
    merged as a file is. ``forms`` has what each quantized weight lies in. A weight whose groups are no neighbours
    (act-order) has its columns in the order of groups, which ``<layer>.g_idx`` gives.

    Raises:
        FileNotFoundError: no such folder, no configuration, or a shard that the index names is missing.
        ValueError: damaged, or quantized in a way that is not known; the message names folder and tensor.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = os.fspath(path)
        with ExitStack() as stack:
            self.config, self.quantization = read_config(Path(path))
            self.files: dict[str, TensorFile] = {}
            for shard in shards_of(Path(path)):
                try:
                    self.files[shard] = TensorFile(Path(path) / shard)
                except (SafetensorError, ValueError, OverflowError) as error:
                    raise ValueError(f"{Path(path) / shard} must be a whole safetensors file: {error}") from error
                stack.callback(self.files[shard].close)
            self.shard_of = {name: shard for shard, file in self.files.items() for name in file.specs}
            self.raw: dict[str, Spec] = {n: s for file in self.files.values() for n, s in file.specs.items()}
            try:
                self.forms = forms_of(self.quantization, self.raw, self.read)
                inputs = input_ranges(self.quantization, self.forms, self.raw, self.read)
                self.manifest = self._manifest(inputs)
            except (ValueError, TypeError) as error:
                raise ValueError(
                    f"{self.path} must be a folder of quantized weights that hdrq reads: {error}"
                ) from error
            self.inputs = {name: f"{name}.input_scale" for name in inputs}
            self._stored = {
                f"{name}.weight.{part}": (form, part)
                for name, form in self.forms.items()
                for part in ("codes", "scale", *(["zero_point"] if form.affine else []))
            }
            self.specs = self._specs()
            self._stack = stack.pop_all()

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *error) -> None:
        self._stack.close()

    def read(self, name: str) -> torch.Tensor:
        """A tensor as it lies in the folder."""
        return self.files[self.shard_of[name]].read(name)

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor as a file of hdrq would hold it.

        Raises:
            ValueError: its values are not what the configuration says.
        """
        if name in self._stored:
            form, part = self._stored[name]
            return form.stored(part, self.read)
        layer = name.removesuffix(".input.scale")
        if layer in self.inputs and name.endswith(".input.scale"):
            return self.read(self.inputs[layer]).float().reshape(1)
        layer = name.removesuffix(UNLOADABLE)
        if layer in self.forms and name.endswith(UNLOADABLE):
            return self.read(self.forms[layer].tensors["g_idx"]).long()
        return self.read(name)

    @property
    def consumed(self) -> set[str]:
        """The names of the tensors that quantized weights and inputs are made of."""
        names = {tensor for form in self.forms.values() for tensor in form.tensors.values()}
        return names | {n for layer in self.inputs for n in (f"{layer}.input_scale", f"{layer}.input_zero_point")}

    def _specs(self) -> dict[str, Spec]:
        specs: dict[str, Spec] = {}
        for name, (form, part) in self._stored.items():
            scales = (torch.int32 if part == "zero_point" else torch.float32, form.grid)
            specs[name] = codes_spec(form.low, -form.low - 1, form.shape) if part == "codes" else scales
        specs |= {f"{name}.input.scale": (torch.float32, (1,)) for name in self.inputs}
        ordered = {name: form for name, form in self.forms.items() if form.order is not None}
        specs |= {f"{name}{UNLOADABLE}": (torch.int64, (form.shape[1],)) for name, form in ordered.items()}
        consumed = self.consumed
        rest = {name: spec for name, spec in self.raw.items() if name not in consumed}
        if clash := rest.keys() & specs.keys():
            raise ValueError(f"{self.path} must not have tensors called as quantized weights' are, got {sorted(clash)}")
        return {**specs, **rest}

    def _manifest(self, inputs: dict[str, tuple[int, int]]) -> dict[str, Any]:
        tables = {
            "weights": {name: form.facts for name, form in self.forms.items()},
            "inputs": {name: list(bounds) for name, bounds in inputs.items()},
        }
        text = next((file.metadata["hdrq"] for file in self.files.values() if "hdrq" in file.metadata), "{}")
        known: dict[str, Any] = json.loads(text)  # of a folder that we wrote
        origin = {"kind": self.quantization["quant_method"], "model_type": self.config.get("model_type")}
        return {"origin": origin, **known, "hdrq": __version__, "folded": {}, "shared": {}, "tied": {}, **tables}

    def sha256(self) -> dict[str, str]:
        """The SHA-256 of each of its files of tensors."""
        return {shard: file_hash(Path(self.path) / shard) for shard in self.files}


def read_folder(path: str | os.PathLike, out: str | os.PathLike) -> dict[str, Any]:
    """Write a folder of transformers with quantized weights as a file of hdrq, one tensor at a time.

    compressed-tensors (``pack-quantized`` and ``int-quantized`` of 2 to 8 bits: per tensor, per channel, in groups;
    symmetric or with zero points; act-order), GPTQ (2, 3, 4, 8 bits; ``gptq`` and ``gptq_v2``) and AWQ (gemm).
    :func:`hdrq.load` takes the file with the model's architecture; ranges of activations that are found anew for each
    token are left out, and a warning says so.

    Returns:
        The manifest.

    Raises:
        FileNotFoundError, ValueError: as :class:`Folder`.
    """
    with Folder(path) as folder:
        groups = (folder.quantization.get("config_groups") or {}).values()
        if any((group.get("input_activations") or {}).get("dynamic") for group in groups):
            warnings.warn(f"{folder.path}: inputs are quantized as they come there, and not in the file", stacklevel=2)
        origin = {**folder.manifest.get("origin", {}), "sha256": folder.sha256()}
        manifest = {**folder.manifest, "origin": origin}
        with Writer(out, folder.specs, manifest) as file:
            for name in folder.specs:
                file.write(name, folder.tensor(name))
        return manifest


def is_folder(path: str | os.PathLike) -> bool:
    """Whether a path is a folder that :class:`Folder` may read."""
    return os.path.isfile(Path(path) / "config.json")


def read_config(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """A folder's configuration, and the section of it on quantization, which older GPTQ folders have in a file."""
    if not folder.is_dir():
        raise FileNotFoundError(f"path must be a folder that exists, got {str(folder)!r}")
    config = read_json(folder / "config.json")
    section = config.get("quantization_config") or config.get("compression_config")
    if section is None and (folder / "quantize_config.json").is_file():
        section = {"quant_method": "gptq", **read_json(folder / "quantize_config.json")}
    if not isinstance(section, dict):
        raise ValueError(f"{folder / 'config.json'} must have a quantization_config, got {section!r:.100}")
    return config, section


def read_json(path: Path, what: str = "an object") -> dict[str, Any]:
    """A JSON file that is an object.

    Raises:
        FileNotFoundError, ValueError: there is none, or it is something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} must be there, got none")
    if path.stat().st_size > LARGEST_TEXT:
        raise ValueError(f"{path} must have at most {LARGEST_TEXT:,} bytes, got {path.stat().st_size:,}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be JSON, got {str(error)[:200]}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must be {what}, got {type(value).__name__}")
    return value


def shards_of(folder: Path) -> list[str]:
    """The names of a folder's safetensors files: those that its index has, or the only one."""
    indices = sorted(path.name for path in folder.glob(f"*{INDEX}"))
    if len(indices) > 1:
        raise ValueError(f"{folder} must have one index of safetensors files, got {', '.join(indices)}")
    if not indices:
        found = sorted(path.name for path in folder.glob("*.safetensors"))
        if len(found) != 1:
            raise ValueError(f"{folder} must have one safetensors file, or an index, got {', '.join(found) or 'none'}")
        return found
    names = read_json(folder / indices[0]).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{folder / indices[0]} must have a weight_map of file names, got {names!r:.100}")
    shards = sorted(set(names.values()))
    for shard in shards:
        if Path(shard).name != shard:
            raise ValueError(f"{folder / indices[0]} must name files beside it, got {shard!r}")
        if not (folder / shard).is_file():
            raise FileNotFoundError(f"{folder / shard} must be there, since the index names it, got none")
    return shards
