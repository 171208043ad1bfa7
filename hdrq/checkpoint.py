"""Quantized models on disk: safetensors that hold integers and scales, and a manifest. Never a pickle."""

from __future__ import annotations

import copy
import json
import os
import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils import parametrize

from hdrq import checks
from hdrq.model import attach_input_quantizer, quantized_layers, replace_module
from hdrq.quantizers import ActivationQuantizer, WeightQuantizer

FORMAT = 1
_QUANTIZER_STATE = ("parametrizations.weight.", "input_quantizer.")


def save(model: nn.Module, path: str | os.PathLike) -> None:
    """Write a quantized model: integer codes and scales of the quantized layers, every other tensor as it is.

    The manifest, in the file's metadata, has the ranges of all quantizers and how the model was made. The file appears
    whole or not at all.

    Raises:
        ValueError: the model has no quantizers.
    """
    from safetensors.torch import save as serialize

    layers = quantized_layers(model)
    if not layers:
        raise ValueError("model must be quantized to be saved here, got one without quantizers")
    tensors = {n: v for n, v in model.state_dict().items() if not any(part in n for part in _QUANTIZER_STATE)}
    ranges = {}
    for name, layer in layers.items():
        weight, activation = layer.quantizers
        tensors[f"{name}.weight.codes"] = weight.codes(layer.latent)
        tensors[f"{name}.weight.scale"] = weight.scale
        tensors[f"{name}.input.scale"] = activation.scale
        ranges[name] = {
            "weight": [weight.qmin, weight.qmax, weight.axis],
            "input": [activation.qmin, activation.qmax],
        }
    manifest = {"format": FORMAT, "layers": ranges, **getattr(model, "hdrq_origin", {})}
    data = serialize(
        {n: v.detach().cpu().contiguous() for n, v in tensors.items()}, {"hdrq": json.dumps(manifest, sort_keys=True)}
    )
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


@torch.no_grad()
def load(path: str | os.PathLike, model: nn.Module | None = None) -> nn.Module:
    """Read a quantized model; its outputs have the bits of the model that was saved.

    Args:
        path: a file that :func:`save` wrote.
        model: the float architecture, as it was before :func:`hdrq.quantize`; left as it is. A checkpoint holds
            tensors, not code, so it is needed.

    Raises:
        ValueError: no architecture, not a checkpoint of hdrq, or one that does not fit the architecture.
    """
    from safetensors import SafetensorError, safe_open

    if model is None:
        raise ValueError("model must be the architecture that the checkpoint was made from, got None")
    try:
        with safe_open(path, framework="pt") as file:
            manifest = json.loads((file.metadata() or {}).get("hdrq", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"path must be a safetensors file, got {os.fspath(path)!r}: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        got = manifest.get("format") if isinstance(manifest, dict) else "no manifest"
        raise ValueError(f"path must be a checkpoint of hdrq, format {FORMAT}, got {got}")
    loaded = copy.deepcopy(model).eval().requires_grad_(False)
    for norm, layer in manifest["folded"].items():
        replace_module(loaded, norm, nn.Identity())
        module = loaded.get_submodule(layer)
        if module.bias is None:
            module.bias = nn.Parameter(module.weight.new_zeros(module.weight.shape[0]), requires_grad=False)
    for name, ranges in manifest["layers"].items():
        codes, scale, step = (tensors.pop(f"{name}.{part}") for part in ("weight.codes", "weight.scale", "input.scale"))
        qmin, qmax, axis = ranges["weight"]
        checks.code_values(f"codes of {name}", codes, qmin, qmax)
        weight = WeightQuantizer(scale, qmin, qmax, axis)
        layer = loaded.get_submodule(name)
        checks.same_shape(f"codes of {name}", codes, "the layer's weight", layer.weight)
        layer.weight.copy_(weight.values(codes))
        parametrize.register_parametrization(layer, "weight", weight)
        attach_input_quantizer(layer, ActivationQuantizer(step, *ranges["input"]))
    missing, unexpected = loaded.load_state_dict(tensors, strict=False)
    missing = [n for n in missing if not any(part in n for part in _QUANTIZER_STATE)]
    if missing or unexpected:
        raise ValueError(f"checkpoint must fit the model, got missing {missing[:10]} and unexpected {unexpected[:10]}")
    loaded.hdrq_origin = {key: value for key, value in manifest.items() if key not in ("format", "layers")}
    return loaded.requires_grad_(False)
