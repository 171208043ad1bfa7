"""Loading models: quantized ones, which :func:`hdrq.save` wrote, and states in full precision."""

from __future__ import annotations

import copy
import json
import os
import pickle
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import parametrize

from hdrq import checks
from hdrq.checkpoint.architecture import build
from hdrq.checkpoint.format import TABLES, Reader, packs, scales_shape, statistics_specs
from hdrq.checkpoint.states import plain_state, state_differences, tensors_of
from hdrq.checks import listed
from hdrq.ops.packing import unpack
from hdrq.prepare.attention import restore_operands
from hdrq.prepare.float_model import check_float
from hdrq.prepare.folding import BATCHNORM
from hdrq.quantizers.attach import attach_input_quantizer
from hdrq.quantizers.layers import (
    TRANSPOSED,
    WEIGHTED,
    input_quantizers,
    input_readers,
    layer_kinds,
    quantized_layers,
    replace_module,
)
from hdrq.quantizers.modules import ActivationQuantizer, WeightQuantizer
from hdrq.quantizers.provenance import Statistics, set_origin, set_statistics

FOLDABLE = tuple(kind for kind in WEIGHTED if kind is not nn.Embedding)


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
        attach(result, file.manifest)
        assign(result, file.manifest, file.specs, file.tensor)
        set_statistics(result, {name: statistics(file, name) for name in file.manifest.get("statistics", {})})
    return result


@torch.no_grad()
def attach(model: nn.Module, manifest: Mapping[str, Any]) -> None:
    """Give a float model the structure that a manifest describes; :func:`assign` fills it."""
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
        scale = torch.ones(scales_shape(name, facts), dtype=torch.float32, device=layer.weight.device)
        zero_point = torch.zeros_like(scale) if facts.get("affine") else None
        qmin, qmax = facts["range"]
        weight_quantizer = WeightQuantizer(scale, qmin, qmax, facts["axis"], zero_point, facts.get("group_size"))
        parametrize.register_parametrization(layer, "weight", weight_quantizer)
    owners = quantized_layers(model)
    for name, owner in manifest["tied"].items():
        layer = model.get_submodule(name)
        if layer.weight is not owners[owner].latent:
            raise ValueError(
                f"model must tie the weight of {name} to that of {owner}, as the checkpoint has it, got two weights"
            )
        parametrize.register_parametrization(layer, "weight", owners[owner].weight_quantizer)
    device = next(model.parameters()).device
    for name, (qmin, qmax) in manifest["inputs"].items():
        quantizer = ActivationQuantizer(torch.ones(1, dtype=torch.float32, device=device), qmin, qmax)
        attach_input_quantizer(model.get_submodule(name), quantizer)
    for name, owner in manifest["shared"].items():
        attach_input_quantizer(model.get_submodule(name), input_readers(model)[owner])
    model.requires_grad_(False)


@torch.no_grad()
def assign(model: nn.Module, manifest: Mapping[str, Any], names, take: Callable[[str], torch.Tensor]) -> None:
    """Fill a model that has a manifest's structure with tensors, and note in it how the file says it was made.

    Args:
        names: of all the tensors.
        take: gives the tensor of a name.

    Raises:
        ValueError: a code or scale is out of its range; tensors are missing, unexpected or of another shape or dtype.
    """
    unread = set(names)

    def read(name: str) -> torch.Tensor:
        unread.remove(name)
        return take(name)

    def read_scale(name: str) -> torch.Tensor:
        scale = read(name)
        checks.scale_values(name, scale)
        return scale

    layers = quantized_layers(model)
    for name, facts in manifest["weights"].items():
        layer = layers[name]
        quantizer, (qmin, qmax) = layer.weight_quantizer, facts["range"]
        quantizer.qmin, quantizer.qmax = qmin, qmax
        codes = read(f"{name}.weight.codes")
        if packs(qmin, qmax):
            codes = unpack(codes, layer.latent.shape, signed=qmin < 0)
        checks.code_values(f"codes of {name}", codes, qmin, qmax)
        quantizer.scale.copy_(read_scale(f"{name}.weight.scale").view(quantizer.scale.shape))
        if quantizer.zero_point is not None:
            zero_point = read(f"{name}.weight.zero_point")
            checks.code_values(f"zero points of {name}", zero_point, qmin, qmax)
            quantizer.zero_point.copy_(zero_point.view(quantizer.zero_point.shape))
        layer.latent.copy_(quantizer.values(codes.to(layer.latent.device)))
    for name, activation in input_quantizers(model).items():
        activation.scale.copy_(read_scale(f"{name}.input.scale").view(activation.scale.shape))
        activation.qmin, activation.qmax = manifest["inputs"][name]
    tensors = {name: take(name) for name in unread}
    differences = state_differences(tensors, plain_state(model), dtypes=True)
    if differences:
        raise ValueError(f"checkpoint must fit the model, got {listed(differences)}")
    model.load_state_dict(tensors, strict=False)
    set_origin(model, {key: value for key, value in manifest.items() if key not in TABLES})
    set_statistics(model, {})


def statistics(source: Any, name: str) -> Statistics:
    """What a layer reads, of a source with a ``manifest`` that has it and a ``tensor`` of any name."""
    facts = source.manifest["statistics"][name]
    tensors = {each: source.tensor(each) for each in statistics_specs({"statistics": {name: facts}})}
    for each, value in tensors.items():
        checks.finite(each, value)
    return Statistics(facts, {each.rpartition(".")[2]: value for each, value in tensors.items()})


def _check_modules(model: nn.Module, manifest: Mapping[str, Any]) -> None:
    """Check that the model has every module that the manifest names, and that each is of the right kind."""
    modules = dict(model.named_modules())
    wanted: list[tuple[str, tuple[type, ...] | type]] = [(name, BATCHNORM) for name in manifest["folded"]]
    wanted += [(name, FOLDABLE) for name in manifest["folded"].values()]
    wanted += [(name, layer_kinds()) for name in (*manifest["weights"], *manifest["tied"])]
    wanted += [(name, nn.Module) for name in (*manifest["inputs"], *manifest["shared"])]
    wrong = dict.fromkeys(name for name, kind in wanted if not isinstance(modules.get(name), kind))
    if wrong:
        raise ValueError(f"checkpoint must fit the model, got modules that it does not have: {listed(wrong)}")


def load_either(file: str | os.PathLike, architecture: str, arguments: Mapping) -> nn.Module:
    """A model from a file of either kind: a quantized model, or a state of the architecture in full precision."""
    if _is_quantized(file):
        return load(file, build(architecture, **arguments))
    return load_float(architecture, arguments, str(file))


def manifest_of(file: str | os.PathLike) -> dict[str, Any]:
    """The manifest of a quantized model; empty for a state in full precision."""
    if not _is_quantized(file):
        return {}
    with Reader(file) as reader:
        return reader.manifest


def _is_quantized(file: str | os.PathLike) -> bool:
    if not os.path.isfile(file) or str(file).endswith((".json", ".bin", ".pt", ".pth")):
        return False
    try:
        with safe_open(file, framework="pt") as opened:
            return "hdrq" in (opened.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise ValueError(f"files must be safetensors, got {file}: {error}") from error


def load_float(architecture: str, arguments: Mapping, weights: str | None) -> nn.Module:
    """The architecture in full precision, with the state in the file ``weights``; with its own where that is None."""
    model = build(architecture, **arguments)
    if weights is not None:
        wanted = tensors_of(model)
        state = _without_prefix(read_state(weights), wanted, weights)
        for name in wanted.keys() - state.keys():
            if name.rpartition(".")[2] == "num_batches_tracked":
                state[name] = wanted[name]  # decides nothing in evaluation
        for name in state.keys() - wanted.keys():
            if name.rpartition(".")[2] in ("total_ops", "total_params"):
                del state[name]  # counters that a profiler left
        differences = state_differences(state, wanted, dtypes=False)
        if differences:
            raise ValueError(f"{weights} must have the tensors of {architecture}, got {listed(differences)}")
        model.load_state_dict(state, strict=False)
    return model.eval()


def float_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of floating-point data for a model: that of its first floating-point parameter."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


PREFIXES = ("module.", "_orig_mod.")  # of DataParallel, and of torch.compile
IN_FOLDER = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def read_state(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """The tensors of a state: of one file, of an index of shards, or of a folder that holds either.

    Of a ``.bin``, ``.pt`` or ``.pth`` file tensors alone are read, ``torch.load(weights_only=True)``: no code is run.

    Raises:
        FileNotFoundError: no such file; a shard that the index names is missing.
        ValueError: it is no state; the file is named.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in IN_FOLDER if (path / name).is_file()]
        if not found:
            raise ValueError(f"weights must be a file, or a folder with {' or '.join(IN_FOLDER)}, got {path}")
        path = found[0]
    if not path.is_file():
        raise FileNotFoundError(f"weights must be a file that exists, got {path}")
    try:
        if path.suffix == ".json":
            names = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
            shards = {str(name) for name in names.values()}
            outside = sorted(name for name in shards if Path(name).name != name)
            if outside:
                raise ValueError(f"shards must lie beside the index, got {listed(outside)}")
            parts = [read_state(path.parent / name) for name in sorted(shards)]
            state = {name: value for part in parts for name, value in part.items()}
            missing = sorted(names.keys() - state.keys())
            if missing:
                raise ValueError(f"its shards must hold all that it names, got none for {listed(missing)}")
            return state
        if path.suffix in (".bin", ".pt", ".pth"):
            state = torch.load(path, map_location="cpu", weights_only=True)
            if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
                held = ", ".join(map(str, state)) if isinstance(state, dict) else type(state).__name__
                raise ValueError(f"it must be a state dict of tensors, and holds {held[:200]}")
            return dict(state)
        return load_file(path)
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged pickle raises anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, pickle.UnpicklingError):
            reason = "it is damaged, or holds more than tensors, which is not read because a pickle can run code"
        raise ValueError(
            f"weights must be a safetensors file, a state dict or an index, got {path}: {reason}"
        ) from error


def _without_prefix(state: dict[str, torch.Tensor], wanted: Mapping, path) -> dict[str, torch.Tensor]:
    """A state whose names do not begin with what a wrapper put before all of them; a warning says so."""
    for _ in range(4):
        for prefix in PREFIXES:
            own = any(name.startswith(prefix) for name in wanted)
            if state and not own and all(name.startswith(prefix) for name in state):
                warnings.warn(f"{path} has the prefix {prefix!r} before every name: it is taken off", stacklevel=3)
                state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state
