"""Quantized models on disk and back: integers and scales, and a manifest (:mod:`hdrq.checkpoint.format`)."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import parametrize

from hdrq import checks
from hdrq._version import __version__
from hdrq.checkpoint.architecture import build
from hdrq.checkpoint.format import FORMAT, Reader, Writer, packs
from hdrq.checks import listed
from hdrq.ops.packing import pack, unpack
from hdrq.prepare.attention import operand_table, restore_operands
from hdrq.prepare.float_model import check_float
from hdrq.prepare.folding import BATCHNORM
from hdrq.quantizers.attach import attach_input_quantizer
from hdrq.quantizers.layers import (
    TRANSPOSED,
    WEIGHTED,
    input_quantizers,
    input_readers,
    quantized_layers,
    replace_module,
)
from hdrq.quantizers.modules import ActivationQuantizer, WeightQuantizer
from hdrq.quantizers.provenance import origin, set_origin

FOLDABLE = tuple(kind for kind in WEIGHTED if kind is not nn.Embedding)
# What the file holds; the rest of its manifest is how the model was made.
TABLES = ("format", "hdrq", "weights", "inputs", "shared", "attention", "sha256")


def save(model: nn.Module, path: str | os.PathLike, *, architecture: str | None = None) -> None:
    """Write a quantized model: integer codes and scales of the quantized layers, every other tensor as it is.

    Codes of 4 bits and less are packed, two to a byte. The manifest, in the file's metadata, has the ranges of all
    quantizers, how the model was made, and a SHA-256 of each tensor. The file appears whole or not at all.

    Args:
        architecture: ``"module:factory"``, whose call makes the float model, for the manifest; None for what is known.

    Raises:
        ValueError: the model was not made by :func:`hdrq.quantize`, :func:`hdrq.merge` or :func:`load`.
        OSError: the file cannot be written; what was there stays.
    """
    manifest, tensors = state_of(model)
    if architecture is not None:
        manifest["architecture"] = {"factory": architecture, "arguments": {}}
    with Writer(path, {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}, manifest) as file:
        for name, value in tensors.items():
            file.write(name, value)


def load(
    path: str | os.PathLike, model: nn.Module | str | None = None, *, trust_architecture: bool = False
) -> nn.Module:
    """Read a quantized model; its outputs have the bits of the model that was saved.

    Args:
        path: a file that :func:`save` wrote.
        model: the float architecture, as it was before :func:`hdrq.quantize`, left as it is, or ``"module:factory"``.
            A checkpoint holds tensors, not code.
        trust_architecture: where ``model`` is None, import and call the factory that the file names. That runs
            whatever it names: only for files whose writer is trusted.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no architecture, not a checkpoint of hdrq, a damaged one, or one that does not fit the architecture.
    """
    with Reader(path) as file:
        if isinstance(model, str):
            model = build(model)
        elif model is None:
            known = file.manifest.get("architecture")
            if not (trust_architecture and known):
                named = f"; the file names {known['factory']}: model= it, or trust_architecture=True" if known else ""
                raise ValueError(f"model must be the architecture that the checkpoint was made from, got None{named}")
            model = build(known["factory"], **known["arguments"])
        check_float("model", model)
        result = copy.deepcopy(model)
        _attach(result, file.manifest)
        assign(result, file.manifest, file.specs, file.tensor)
    return result


def state_of(model: nn.Module) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The manifest of a quantized model, and its tensors, as a file holds them.

    Raises:
        ValueError: the model is not quantized.
    """
    if not isinstance(model, nn.Module) or not quantized_layers(model) or not origin(model):
        raise ValueError(f"model must be quantized, by hdrq.quantize or hdrq.merge, got a plain {type(model).__name__}")
    held = _quantizer_state(model)
    tensors = {n: v.detach() for n, v in model.state_dict().items() if n not in held}
    weights, inputs, owners = {}, {}, {}
    for name, layer in quantized_layers(model).items():
        quantizer = layer.weight_quantizer
        codes = quantizer.codes(layer.latent)
        tensors[f"{name}.weight.codes"] = pack(codes) if packs(quantizer.qmin, quantizer.qmax) else codes
        tensors[f"{name}.weight.scale"] = quantizer.scale.detach().flatten()
        bounds = [quantizer.qmin, quantizer.qmax]
        weights[name] = {"range": bounds, "axis": quantizer.axis, "shape": list(codes.shape)}
    for name, activation in input_quantizers(model).items():
        tensors[f"{name}.input.scale"] = activation.scale.detach().flatten()
        inputs[name] = [activation.qmin, activation.qmax]
        owners[id(activation)] = name
    shared = {n: owners[id(q)] for n, q in input_readers(model).items() if owners[id(q)] != n}
    tables = {"format": FORMAT, "hdrq": __version__, "weights": weights, "inputs": inputs, "shared": shared}
    return {**tables, "attention": operand_table(model), **origin(model)}, tensors


def _quantizer_state(model: nn.Module) -> set[str]:
    """The names, in the state of a model, of what its quantizers hold: the file has codes in its place."""
    parts = ("original", "0.scale")
    names = {f"{name}.parametrizations.weight.{part}" for name in quantized_layers(model) for part in parts}
    names |= {f"{name}.input_quantizer.scale" for name in input_readers(model)}
    return {name.removeprefix(".") for name in names}  # the model itself may be a layer


@torch.no_grad()
def _attach(model: nn.Module, manifest: Mapping[str, Any]) -> None:
    """Give a float model the structure that a manifest says; :func:`assign` fills it."""
    model.eval().requires_grad_(False)
    restore_operands(model, manifest.get("attention", {}))
    _check_modules(model, manifest)
    for norm, name in manifest["folded"].items():
        replace_module(model, norm, nn.Identity())
        layer: Any = model.get_submodule(name)
        if layer.bias is None:
            transposed = isinstance(layer, TRANSPOSED)
            size = layer.weight.shape[1] * layer.groups if transposed else layer.weight.shape[0]
            layer.bias = nn.Parameter(layer.weight.new_zeros(size), requires_grad=False)
    for name, facts in manifest["weights"].items():
        layer = model.get_submodule(name)
        if list(layer.weight.shape) != facts["shape"]:
            want = f"the shape of the layer's weight, {tuple(layer.weight.shape)}"
            raise ValueError(f"codes of {name} must have {want}, got {tuple(facts['shape'])}")
        axis = checks.axis_of(layer.weight, facts["axis"])
        scale = torch.ones(1 if axis is None else layer.weight.shape[axis], device=layer.weight.device)
        qmin, qmax = facts["range"]
        parametrize.register_parametrization(layer, "weight", WeightQuantizer(scale, qmin, qmax, facts["axis"]))
    device = next(model.parameters()).device
    for name, (qmin, qmax) in manifest["inputs"].items():
        quantizer = ActivationQuantizer(torch.ones(1, device=device), qmin, qmax)
        attach_input_quantizer(model.get_submodule(name), quantizer)
    for name, owner in manifest["shared"].items():
        attach_input_quantizer(model.get_submodule(name), input_readers(model)[owner])
    model.requires_grad_(False)


@torch.no_grad()
def assign(model: nn.Module, manifest: Mapping[str, Any], names, take: Callable[[str], torch.Tensor]) -> None:
    """Put tensors, ``take(name)`` for each of ``names``, into a model of their structure; say how they were made."""
    rest = set(names)

    def own(name: str) -> torch.Tensor:
        rest.remove(name)
        return take(name)

    def own_scale(name: str) -> torch.Tensor:
        scale = own(name)
        checks.scale_values(name, scale)
        return scale

    for name, layer in quantized_layers(model).items():
        quantizer, (qmin, qmax) = layer.weight_quantizer, manifest["weights"][name]["range"]
        codes = own(f"{name}.weight.codes")
        if packs(qmin, qmax):
            codes = unpack(codes, layer.latent.shape, signed=qmin < 0)
        checks.code_values(f"codes of {name}", codes, qmin, qmax)
        quantizer.scale.copy_(own_scale(f"{name}.weight.scale").view(quantizer.scale.shape))
        layer.latent.copy_(quantizer.values(codes.to(layer.latent.device)))
    for name, activation in input_quantizers(model).items():
        activation.scale.copy_(own_scale(f"{name}.input.scale").view(activation.scale.shape))
        activation.qmin, activation.qmax = manifest["inputs"][name]
    held = _quantizer_state(model)
    tensors = {name: take(name) for name in rest}
    _check_state({n: v for n, v in model.state_dict().items() if n not in held}, tensors)
    model.load_state_dict(tensors, strict=False)
    set_origin(model, {key: value for key, value in manifest.items() if key not in TABLES})


def _check_modules(model: nn.Module, manifest: Mapping[str, Any]) -> None:
    """Every module that the manifest names is in the model, and of its kind."""
    modules = dict(model.named_modules())
    wanted: list[tuple[str, tuple[type, ...] | type]] = [(name, BATCHNORM) for name in manifest["folded"]]
    wanted += [(name, FOLDABLE) for name in manifest["folded"].values()]
    wanted += [(name, WEIGHTED) for name in manifest["weights"]]
    wanted += [(name, nn.Module) for name in (*manifest["inputs"], *manifest["shared"])]
    wrong = dict.fromkeys(name for name, kind in wanted if not isinstance(modules.get(name), kind))
    if wrong:
        raise ValueError(f"checkpoint must fit the model, got modules that it does not have: {listed(wrong)}")


def _check_state(own: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """The tensors that are not quantized have the names, shapes and dtypes of the model's."""
    problems = [f"{name} missing" for name in own if name not in theirs]
    problems += [f"{name} unexpected" for name in theirs if name not in own]
    for name in own.keys() & theirs.keys():
        got, want = ((tuple(t.shape), t.dtype) for t in (theirs[name], own[name]))
        if got != want:
            problems.append(f"{name} {got}, not {want}")
    if problems:
        raise ValueError(f"checkpoint must fit the model, got {listed(sorted(problems))}")


def load_either(file: str | os.PathLike, architecture: str, arguments: Mapping) -> nn.Module:
    """A model from a file of either kind."""

    try:
        with safe_open(file, framework="pt") as opened:
            quantized = "hdrq" in (opened.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"files must be safetensors, got {file}: {error}") from error
    return load(file, build(architecture, **arguments)) if quantized else load_float(architecture, arguments, str(file))


def load_float(architecture: str, arguments: Mapping, weights: str | None) -> nn.Module:
    """The architecture, with a state in full precision."""

    model = build(architecture, **arguments)
    if weights is not None:
        try:
            state = load_file(weights)
        except SafetensorError as error:
            raise ValueError(f"weights must be a safetensors file, got {weights}: {error}") from error
        own = model.state_dict()
        wrong = [f"{name} missing" for name in own if name not in state]
        wrong += [f"{name} unexpected" for name in state if name not in own]
        wrong += [
            f"{name} {tuple(state[name].shape)}, not {tuple(own[name].shape)}"
            for name in own.keys() & state.keys()
            if state[name].shape != own[name].shape
        ]
        if wrong:
            raise ValueError(f"{weights} must have the tensors of {architecture}, got {listed(sorted(wrong))}")
        model.load_state_dict(state)
    return model.eval()
