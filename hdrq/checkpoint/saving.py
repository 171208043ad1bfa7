"""Saving quantized models: integer codes, scales and a manifest (:mod:`hdrq.checkpoint.format`)."""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hdrq import checks
from hdrq._version import __version__
from hdrq.checkpoint.format import FORMAT, NAMES, Writer, codes_spec, packs
from hdrq.checkpoint.states import plain_state
from hdrq.checkpoint.tensors import Spec
from hdrq.ops.packing import pack
from hdrq.prepare.attention import operand_table
from hdrq.quantizers.layers import QuantizedLayer, input_quantizers, input_readers, quantized_layers
from hdrq.quantizers.provenance import origin, statistics_of


def save(model: nn.Module, path: str | os.PathLike, *, architecture: str | None = None) -> None:
    """Write a quantized model: integer codes and scales of the quantized layers, every other tensor as it is.

    Codes of 4 bits and less are packed, two to a byte. A weight that layers share is written once. The manifest, in the
    file's metadata, has the ranges of all quantizers, how the model was made, and a SHA-256 of each tensor. The file
    appears whole or not at all.

    Args:
        architecture: ``"module:factory"``, whose call makes the float model, for the manifest; None for what is known.

    Raises:
        ValueError: the model was not made by :func:`hdrq.quantize`, :func:`hdrq.merge` or :func:`load`; it has a tensor
            that no file holds (:func:`check_storable`, which :func:`hdrq.quantize` asks first where it has a
            ``workdir``, and the command line where it has ``--out``).
        OSError: the file cannot be written; what was there stays.
    """
    check_storable(model)
    manifest, tensors = state_of(model)
    if architecture is not None:
        manifest["architecture"] = {"factory": architecture, "arguments": {}}
    with Writer(path, tensors.specs, manifest) as file:
        for name, value in tensors.items():
            file.write(name, value)


def save_or_keep(model: nn.Module, path: str | os.PathLike) -> None:
    """:func:`save`. Where that fails the model is kept in another place if any has room: nobody else holds it.

    Raises:
        OSError: ``path`` could not be written; the message says where the model is kept.
    """
    try:
        save(model, path)
    except OSError as error:
        for folder in (Path.cwd(), Path(tempfile.gettempdir()), Path.home()):
            kept = folder / f"{Path(path).stem[:100]}-{secrets.token_hex(4)}.safetensors"
            try:
                save(model, kept)
            except (OSError, ValueError):
                continue
            raise OSError(error.errno, f"{error.strerror}; the quantized model is kept in {kept}") from error
        raise


def check_storable(model: nn.Module) -> None:
    """Whether a file can hold every tensor of a model, in full precision or quantized.

    Raises:
        ValueError: a dtype that safetensors does not have, or a sparse tensor; the message names it.
    """
    if not isinstance(model, nn.Module):
        return
    odd = [
        f"{name} ({checks.short(value.dtype) if value.layout == torch.strided else str(value.layout)})"
        for name, value in plain_state(model).items()
        if value.dtype not in NAMES or value.layout != torch.strided
    ]
    if odd:
        kinds = ", ".join(map(checks.short, NAMES))
        raise ValueError(
            f"model must have dense tensors of {kinds} to be saved, got {checks.listed(odd)}; convert them, or "
            "register a buffer with persistent=False"
        )


class Tensors(Mapping[str, torch.Tensor]):
    """A model's tensors, as a file holds them. Codes are made when they are asked for: together they may not fit."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._made: dict[str, torch.Tensor | QuantizedLayer] = {n: value.detach() for n, value in tensors.items()}
        self.specs: dict[str, Spec] = {n: (value.dtype, tuple(value.shape)) for n, value in tensors.items()}

    def add(self, name: str, value: torch.Tensor) -> None:
        self._made[name], self.specs[name] = value, (value.dtype, tuple(value.shape))

    def add_codes(self, name: str, layer: QuantizedLayer) -> None:
        quantizer = layer.weight_quantizer
        self._made[name] = layer
        self.specs[name] = codes_spec(quantizer.qmin, quantizer.qmax, tuple(layer.latent.shape))

    def __getitem__(self, name: str) -> torch.Tensor:
        value = self._made[name]
        if isinstance(value, torch.Tensor):
            return value
        quantizer, codes = value.weight_quantizer, value.weight_quantizer.codes(value.latent)
        return pack(codes) if packs(quantizer.qmin, quantizer.qmax) else codes

    def __iter__(self) -> Iterator[str]:
        return iter(self._made)

    def __len__(self) -> int:
        return len(self._made)


def state_of(model: nn.Module) -> tuple[dict[str, Any], Tensors]:
    """The manifest of a quantized model, and its tensors, as a file holds them.

    Raises:
        ValueError: the model is not quantized, or a weight or its scale is broken; the message names it.
    """
    if not isinstance(model, nn.Module) or not quantized_layers(model) or not origin(model):
        raise ValueError(f"model must be quantized, by hdrq.quantize or hdrq.merge, got a plain {type(model).__name__}")
    tensors = Tensors(plain_state(model))
    weights, inputs, tied = {}, {}, {}
    owners: dict[int, str] = {}  # of shared weights and quantizers, by id: who has them first
    for name, layer in quantized_layers(model).items():
        owner = owners.setdefault(id(layer.latent), name)
        if owner != name:
            tied[name] = owner
            continue
        quantizer = layer.weight_quantizer
        if layer.latent.isnan().any():
            raise ValueError(f"{name}.weight must hold no NaN to be saved or merged, got one; quantize that model anew")
        checks.scale_values(f"{name}.weight.scale", quantizer.scale)
        tensors.add_codes(f"{name}.weight.codes", layer)
        shape = list(layer.latent.shape)
        grid = (-1,) if quantizer.group_size is None else (*shape[:-1], shape[-1] // quantizer.group_size)
        tensors.add(f"{name}.weight.scale", quantizer.scale.detach().reshape(grid))
        bounds = [quantizer.qmin, quantizer.qmax]
        weights[name] = {"range": bounds, "axis": quantizer.axis, "shape": shape}
        if quantizer.zero_point is not None:
            tensors.add(f"{name}.weight.zero_point", quantizer.zero_point.to(torch.int32).reshape(grid))
            weights[name]["affine"] = True
        if quantizer.group_size is not None:
            weights[name]["group_size"] = quantizer.group_size
    for name, activation in input_quantizers(model).items():
        tensors.add(f"{name}.input.scale", activation.scale.detach().flatten())
        inputs[name] = [activation.qmin, activation.qmax]
        owners[id(activation)] = name
    shared = {n: owners[id(q)] for n, q in input_readers(model).items() if owners[id(q)] != n}
    layers: dict[str, Any] = {"weights": weights, "tied": tied, "inputs": inputs, "shared": shared}
    layers["attention"] = operand_table(model)
    for name, (facts, parts) in statistics_of(model).items():
        layers.setdefault("statistics", {})[name] = facts
        for part, value in parts.items():
            tensors.add(f"{name}.statistics.{part}", value)
    return {"format": FORMAT, "hdrq": __version__, **layers, **origin(model)}, tensors
