"""Quantized models on disk: safetensors that hold integers and scales, and a manifest. Never a pickle."""

from __future__ import annotations

import copy
import json
import os
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from hdrq import checks
from hdrq.files import write_atomically
from hdrq.folding import BATCHNORM
from hdrq.model import (
    WEIGHTED,
    attach_input_quantizer,
    check_float,
    input_quantizers,
    input_readers,
    origin,
    quantized_layers,
    replace_module,
    set_origin,
)
from hdrq.quantizers import ActivationQuantizer, WeightQuantizer

FORMAT = 1
TENSORS = ("format", "weights", "inputs", "shared")  # of the manifest: what the file holds; the rest is how it was made


def save(model: nn.Module, path: str | os.PathLike) -> None:
    """Write a quantized model: integer codes and scales of the quantized layers, every other tensor as it is.

    The manifest, in the file's metadata, has the ranges of all quantizers and how the model was made. The file appears
    whole or not at all.

    Raises:
        ValueError: the model was not made by :func:`hdrq.quantize`, :func:`hdrq.merge` or :func:`load`.
    """
    from safetensors.torch import save as serialize

    if not isinstance(model, nn.Module) or not quantized_layers(model) or not origin(model):
        raise ValueError(f"model must be quantized, by hdrq.quantize or hdrq.merge, got a plain {type(model).__name__}")
    held = _quantizer_state(model)
    tensors = {n: v for n, v in model.state_dict().items() if n not in held}
    weights, inputs, owners = {}, {}, {}
    for name, layer in quantized_layers(model).items():
        quantizer = layer.weight_quantizer
        tensors[f"{name}.weight.codes"] = quantizer.codes(layer.latent)
        tensors[f"{name}.weight.scale"] = quantizer.scale
        weights[name] = [quantizer.qmin, quantizer.qmax, quantizer.axis]
    for name, activation in input_quantizers(model).items():
        tensors[f"{name}.input.scale"] = activation.scale
        inputs[name] = [activation.qmin, activation.qmax]
        owners[id(activation)] = name
    shared = {n: owners[id(q)] for n, q in input_readers(model).items() if owners[id(q)] != n}
    manifest = {"format": FORMAT, "weights": weights, "inputs": inputs, "shared": shared, **origin(model)}
    text = json.dumps(manifest, sort_keys=True, default=lambda number: number.item())  # a knob may be NumPy's
    own = {n: v.detach().cpu().clone(memory_format=torch.contiguous_format) for n, v in tensors.items()}  # untied
    data = serialize(own, {"hdrq": text})
    write_atomically(path, data)


def load(path: str | os.PathLike, model: nn.Module | None = None) -> nn.Module:
    """Read a quantized model; its outputs have the bits of the model that was saved.

    Args:
        path: a file that :func:`save` wrote.
        model: the float architecture, as it was before :func:`hdrq.quantize`; left as it is. A checkpoint holds
            tensors, not code, so it is needed.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no architecture, not a checkpoint of hdrq, a damaged one, or one that does not fit the architecture.
    """
    from safetensors import SafetensorError, safe_open

    if model is None:
        raise ValueError("model must be the architecture that the checkpoint was made from, got None")
    check_float("model", model)
    try:
        with safe_open(path, framework="pt") as file:
            manifest = _manifest((file.metadata() or {}).get("hdrq", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return _restore(copy.deepcopy(model), manifest, tensors)
    except (SafetensorError, TypeError) as error:
        raise ValueError(f"path must be a file that hdrq.save wrote, got {os.fspath(path)!r}: {error}") from error


def _quantizer_state(model: nn.Module) -> set[str]:
    """The names, in the state of a model, of what its quantizers hold: the file has codes in its place."""
    parts = ("original", "0.scale")
    names = {f"{name}.parametrizations.weight.{part}" for name in quantized_layers(model) for part in parts}
    names |= {f"{name}.input_quantizer.scale" for name in input_readers(model)}
    return {name.removeprefix(".") for name in names}  # the model itself may be a layer


def _manifest(text: str) -> dict:
    try:
        manifest = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"manifest must be JSON, got {text[:40]!r}: {error}") from error
    version = manifest.get("format") if isinstance(manifest, dict) else "no manifest"
    if version != FORMAT:
        raise ValueError(f"path must be a checkpoint of hdrq, format {FORMAT}, got {version}")
    for key in ("folded", "weights", "inputs", "shared"):
        if not isinstance(manifest.get(key), dict):
            raise ValueError(f"manifest must have a table of {key}, got {manifest.get(key)!r}")
    return manifest


@torch.no_grad()
def _restore(model: nn.Module, manifest: dict, tensors: dict[str, torch.Tensor]) -> nn.Module:
    model.eval().requires_grad_(False)
    _check_modules(model, manifest)

    def take(name: str) -> torch.Tensor:
        if name not in tensors:
            raise ValueError(f"checkpoint must hold {name!r}, got none")
        return tensors.pop(name)

    def take_scale(name: str, x: torch.Tensor, axis: int | None) -> torch.Tensor:
        scale = checks.per_axis(name, take(name), x, axis)
        checks.scale_values(name, scale)
        return scale

    for norm, name in manifest["folded"].items():
        replace_module(model, norm, nn.Identity())
        layer: Any = model.get_submodule(name)
        if layer.bias is None:
            layer.bias = nn.Parameter(layer.weight.new_zeros(layer.weight.shape[0]), requires_grad=False)
    device = next(model.parameters()).device
    for name, (qmin, qmax, axis) in manifest["weights"].items():
        layer = model.get_submodule(name)
        codes = checks.tensor(f"codes of {name}", take(f"{name}.weight.codes"), checks.CODES)
        checks.same_shape(f"codes of {name}", codes, "the layer's weight", layer.weight)
        checks.code_values(f"codes of {name}", codes, qmin, qmax)
        scale = take_scale(f"{name}.weight.scale", codes, checks.axis_of(codes, axis))
        quantizer = WeightQuantizer(scale, qmin, qmax, axis)
        layer.weight.copy_(quantizer.values(codes))
        parametrize.register_parametrization(layer, "weight", quantizer.to(device))
    for name, (qmin, qmax) in manifest["inputs"].items():
        scale = take_scale(f"{name}.input.scale", torch.empty(0), None)
        attach_input_quantizer(model.get_submodule(name), ActivationQuantizer(scale, qmin, qmax).to(device))
    for name, owner in manifest["shared"].items():
        attach_input_quantizer(model.get_submodule(name), input_readers(model)[owner])
    held = _quantizer_state(model)
    _check_state({n: v for n, v in model.state_dict().items() if n not in held}, tensors)
    model.load_state_dict(tensors, strict=False)
    set_origin(model, {key: value for key, value in manifest.items() if key not in TENSORS})
    return model.requires_grad_(False)


def _check_modules(model: nn.Module, manifest: dict) -> None:
    """Every module that the manifest names is in the model, and of its kind."""
    modules = dict(model.named_modules())
    wanted: list[tuple[str, tuple[type, ...] | type]] = [(name, BATCHNORM) for name in manifest["folded"]]
    wanted += [(name, WEIGHTED) for name in (*manifest["folded"].values(), *manifest["weights"])]
    wanted += [(name, nn.Module) for name in (*manifest["inputs"], *manifest["shared"])]
    orphans = [name for name, owner in manifest["shared"].items() if owner not in manifest["inputs"]]
    if orphans:
        raise ValueError(f"checkpoint must have the input quantizer of every module that shares one, got {orphans}")
    wrong = dict.fromkeys(name for name, kind in wanted if not isinstance(modules.get(name), kind))
    if wrong:
        raise ValueError(f"checkpoint must fit the model, got modules that it does not have: {_listed(wrong)}")


def _check_state(own: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """The tensors that are not quantized have the names, shapes and dtypes of the model's."""
    problems = [f"{name} missing" for name in own if name not in theirs]
    problems += [f"{name} unexpected" for name in theirs if name not in own]
    for name in own.keys() & theirs.keys():
        got, want = ((tuple(t.shape), t.dtype) for t in (theirs[name], own[name]))
        if got != want:
            problems.append(f"{name} {got}, not {want}")
    if problems:
        raise ValueError(f"checkpoint must fit the model, got {_listed(sorted(problems))}")


def _listed(items) -> str:
    items = list(items)
    return "; ".join(items[:10]) + (f" and {len(items) - 10} more" if len(items) > 10 else "")
