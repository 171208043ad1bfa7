"""Saving quantized models: integer codes, scales and a manifest (:mod:`hdrq.checkpoint.format`)."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from hdrq import checks
from hdrq._version import __version__
from hdrq.checkpoint.format import FORMAT, NAMES, Writer, packs
from hdrq.checkpoint.states import plain_state
from hdrq.ops.packing import pack
from hdrq.prepare.attention import operand_table
from hdrq.quantizers.layers import input_quantizers, input_readers, quantized_layers
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
    with Writer(path, {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}, manifest) as file:
        for name, value in tensors.items():
            file.write(name, value)


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


def state_of(model: nn.Module) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The manifest of a quantized model, and its tensors, as a file holds them.

    Raises:
        ValueError: the model is not quantized, or a weight or its scale is broken; the message names it.
    """
    if not isinstance(model, nn.Module) or not quantized_layers(model) or not origin(model):
        raise ValueError(f"model must be quantized, by hdrq.quantize or hdrq.merge, got a plain {type(model).__name__}")
    tensors = {name: value.detach() for name, value in plain_state(model).items()}
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
        codes = quantizer.codes(layer.latent)
        tensors[f"{name}.weight.codes"] = pack(codes) if packs(quantizer.qmin, quantizer.qmax) else codes
        grid = (-1,) if quantizer.group_size is None else (*codes.shape[:-1], codes.shape[-1] // quantizer.group_size)
        tensors[f"{name}.weight.scale"] = quantizer.scale.detach().reshape(grid)
        bounds = [quantizer.qmin, quantizer.qmax]
        weights[name] = {"range": bounds, "axis": quantizer.axis, "shape": list(codes.shape)}
        if quantizer.zero_point is not None:
            tensors[f"{name}.weight.zero_point"] = quantizer.zero_point.to(torch.int32).reshape(grid)
            weights[name]["affine"] = True
        if quantizer.group_size is not None:
            weights[name]["group_size"] = quantizer.group_size
    for name, activation in input_quantizers(model).items():
        tensors[f"{name}.input.scale"] = activation.scale.detach().flatten()
        inputs[name] = [activation.qmin, activation.qmax]
        owners[id(activation)] = name
    shared = {n: owners[id(q)] for n, q in input_readers(model).items() if owners[id(q)] != n}
    layers: dict[str, Any] = {"weights": weights, "tied": tied, "inputs": inputs, "shared": shared}
    layers["attention"] = operand_table(model)
    for name, (facts, parts) in statistics_of(model).items():
        layers.setdefault("statistics", {})[name] = facts
        tensors |= {f"{name}.statistics.{part}": value for part, value in parts.items()}
    return {"format": FORMAT, "hdrq": __version__, **layers, **origin(model)}, tensors
