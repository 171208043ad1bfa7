"""A quantized model of transformers as a folder of compressed-tensors, which vLLM and transformers read."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hdrq import checks
from hdrq.checkpoint.files import new_folder
from hdrq.checkpoint.format import TABLES
from hdrq.checkpoint.library import save_file
from hdrq.checkpoint.saving import state_of
from hdrq.export.folders.forms import Compressed
from hdrq.quantizers.layers import input_readers

LARGEST_SHARD = 5 * 2**30  # bytes
ACTIVATIONS = ("static", "drop")
VERSION = "0.20.0"  # of the layout of words


def to_compressed_tensors(
    model: nn.Module, folder: str | os.PathLike, *, activations: str = "static"
) -> dict[str, Any]:
    """Write a quantized model of transformers as a folder that ``AutoModel.from_pretrained`` and vLLM read.

    Codes and scales are the model's own: weights of 8 bits as ``int-quantized`` where inputs are quantized, else all as
    ``pack-quantized``; per tensor, per channel, or in groups; zero points. Inputs of linear layers have one scale and a
    zero point each. transformers computes the same answers as hdrq, in float; which layers vLLM has kernels for is its
    own matter (4 and 8 bits with float inputs, and 8 by 8 bits).

    Args:
        model: of :func:`hdrq.quantize`; a class of transformers, of which linear layers alone are quantized.
        folder: new or empty; it appears whole or not at all.
        activations: ``"static"`` with the scales of inputs, or ``"drop"``: weights alone, inputs in float.

    Returns:
        The ``quantization_config``.

    Raises:
        ValueError: a layer or an activation is quantized that the format has no place for; the message names it.
        OSError: it cannot be written.
    """
    checks.choice("activations", activations, ACTIVATIONS)
    manifest, tensors = state_of(model)
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "save_pretrained"):
        raise ValueError(f"model must be one of transformers, with its config, got {type(model).__name__}")
    _check_layers(model, manifest)
    inputs = _inputs(model, manifest) if activations == "static" else {}
    forms = {name: _form(name, facts, name in inputs) for name, facts in manifest["weights"].items()}
    section = _configuration(model, forms, inputs)
    with new_folder(folder) as new:
        _write_shards(new, tensors, forms, inputs, json.dumps(_facts(manifest), sort_keys=True))
        config.save_pretrained(new)
        settings = json.loads((new / "config.json").read_text(encoding="utf-8"))
        settings |= {"architectures": [type(model).__name__], "quantization_config": section}
        (new / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        generation: Any = getattr(model, "generation_config", None)
        if generation is not None:
            generation.save_pretrained(new)
    return section


def _facts(manifest: Mapping[str, Any]) -> dict[str, Any]:
    return {key: fact for key, fact in manifest.items() if key not in TABLES}


def _check_layers(model: nn.Module, manifest: Mapping[str, Any]) -> None:
    kinds = {name: model.get_submodule(name) for name in (*manifest["weights"], *manifest["tied"])}
    odd = [f"{name} ({_kind(module)})" for name, module in kinds.items() if not isinstance(module, nn.Linear)]
    odd += [f"{name}, tied to {owner}" for name, owner in manifest["tied"].items()]
    if odd:
        got = checks.listed(odd)
        raise ValueError(f'layers must be linear, with a weight of their own, got {got}; keep them in "float" by bits=')
    if manifest["folded"]:
        raise ValueError(f"model must have no BatchNorm that was folded, got {checks.listed(manifest['folded'])}")
    wide = [n for n, facts in manifest["weights"].items() if facts["range"][1] > 127 or facts["range"][0] >= 0]
    if wide:
        raise ValueError(f"weights must be signed, of 8 bits or less, got {checks.listed(wide)}")


def _kind(module: nn.Module) -> str:
    return type(module).__name__.removeprefix("Parametrized")


def _inputs(model: nn.Module, manifest: Mapping[str, Any]) -> dict[str, tuple[torch.Tensor, int, int]]:
    """The scale, the bits and the zero point of every linear layer's input."""
    readers = input_readers(model)
    odd = [name or "the model" for name in readers if name not in manifest["weights"]]
    if odd:
        raise ValueError(
            f"inputs of {checks.listed(odd)} are quantized, for which compressed-tensors has no place; quantize with "
            'activation_placement="input", attention=False, or export with activations="drop"'
        )
    missing = [name for name in manifest["weights"] if name not in readers]
    if missing:
        raise ValueError(
            f"inputs of {checks.listed(missing)} must be quantized there, got float, or quantized elsewhere; quantize "
            'with activation_placement="input", or export with activations="drop"'
        )
    inputs = {}
    for name, quantizer in readers.items():
        bits = (quantizer.qmax - quantizer.qmin).bit_length()
        if bits > 8:
            raise ValueError(
                f'input of {name} must have at most 8 bits, got {bits}; activations="drop" leaves it float'
            )
        inputs[name] = (quantizer.scale.detach().cpu().reshape(1), bits, -(2 ** (bits - 1)) - quantizer.qmin)
    return inputs


def _form(name: str, facts: Mapping[str, Any], quantized_input: bool) -> Compressed:
    """How a weight lies in the folder."""
    low, high = facts["range"]
    bits = (high - low).bit_length()
    tensors = {"scale": f"{name}.weight_scale"}
    if bits == 8 and quantized_input:
        tensors["weight"] = f"{name}.weight"
    else:
        tensors |= {"packed": f"{name}.weight_packed", "shape": f"{name}.weight_shape"}
    if facts.get("affine"):
        tensors["zero_point"] = f"{name}.weight_zero_point"
    shape = (facts["shape"][0], facts["shape"][1])
    axis = None if facts["axis"] is None else facts["axis"] % 2
    return Compressed(name, tensors, bits, shape, facts.get("group_size"), axis, bool(facts.get("affine")))


def _configuration(model: nn.Module, forms: Mapping[str, Compressed], inputs: Mapping[str, tuple]) -> dict[str, Any]:
    groups: dict[str, list[str]] = {}  # by what all layers of a group share
    for name, form in forms.items():
        strategy = "group" if form.group_size else "tensor" if form.axis is None else "channel"
        weights = _arguments(form.bits, strategy, not form.affine, form.group_size)
        scheme: dict[str, Any] = {"weights": weights, "input_activations": None, "output_activations": None}
        if name in inputs:
            _, bits, zero = inputs[name]
            scheme["input_activations"] = _arguments(bits, "tensor", zero == 0, None)
        scheme["format"] = "pack-quantized" if form.in_words else "int-quantized"
        groups.setdefault(json.dumps(scheme), []).append(name)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    schemes = [
        {"targets": names if len(groups) > 1 else ["Linear"], **json.loads(key)} for key, names in groups.items()
    ]
    formats = {scheme["format"] for scheme in schemes}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "version": VERSION,
        "config_groups": {f"group_{k}": scheme for k, scheme in enumerate(schemes)},
        "ignore": [name for name in linear if name not in forms],
        "kv_cache_scheme": None,
    }


def _arguments(bits: int, strategy: str, symmetric: bool, group_size: int | None) -> dict[str, Any]:
    facts = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy}
    return {**facts, "group_size": group_size, "dynamic": False}


def _write_shards(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    forms: Mapping[str, Compressed],
    inputs: Mapping[str, tuple],
    facts: str,
) -> None:
    """The tensors in files of at most ``LARGEST_SHARD`` bytes, and their index where they are several."""
    places: list[tuple[str, int, int]] = []  # of each tensor: its name, its shard, its bytes
    shard: dict[str, torch.Tensor] = {}

    def close(number: int) -> None:
        save_file(shard, folder / f"{number}.part", metadata={"format": "pt", "hdrq": facts})
        shard.clear()

    number = size = 0
    for name, tensor in _tensors(tensors, forms, inputs):
        if shard and size + tensor.nbytes > LARGEST_SHARD:
            close(number)
            number, size = number + 1, 0
        size += tensor.nbytes
        dense = tensor.detach().cpu().contiguous()
        whole = dense.untyped_storage().nbytes() == dense.nbytes  # a part of another is refused by safetensors
        shard[name] = dense if whole else dense.clone()
        places.append((name, number, tensor.nbytes))
    close(number)
    count = number + 1
    names = [f"model-{k + 1:05}-of-{count:05}.safetensors" for k in range(count)] if number else ["model.safetensors"]
    for k, name in enumerate(names):
        (folder / f"{k}.part").rename(folder / name)
    if number:
        index = {own: names[k] for own, k, _ in places}
        text = json.dumps({"metadata": {"total_size": sum(size for *_, size in places)}, "weight_map": index}, indent=2)
        (folder / "model.safetensors.index.json").write_text(text + "\n", encoding="utf-8")


def _tensors(tensors, forms, inputs) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the folder; one that is tied to another is left out, since transformers ties it again."""
    written: set[int] = set()
    parts = {f"{name}.weight.{part}" for name in forms for part in ("codes", "scale", "zero_point")}
    parts |= {name for name in tensors if name.endswith(".input.scale")}
    for name in (n for n in tensors if n not in parts):
        tensor = tensors[name]
        if not (tensor.numel() and tensor.data_ptr() in written):
            written.add(tensor.data_ptr())
            yield name, tensor
    for name, form in forms.items():
        codes, scale = tensors[f"{name}.weight.codes"].cpu(), tensors[f"{name}.weight.scale"].cpu()
        zero = tensors[f"{name}.weight.zero_point"].cpu() if form.affine else None
        own = form.written(codes, scale, zero, {form.tensors["scale"]: torch.float32})
        if form.in_words:
            own[form.tensors["shape"]] = torch.tensor(form.shape)
        yield from own.items()
        if name in inputs:
            step, _, zero_point = inputs[name]
            yield f"{name}.input_scale", step.clone()  # modules that read one tensor share it
            if zero_point:
                yield f"{name}.input_zero_point", torch.tensor([zero_point], dtype=torch.int8)
