"""Loading quantized models, which :func:`hdrq.save` wrote."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from hdrq import checks
from hdrq.checkpoint.architecture import build
from hdrq.checkpoint.float_states import load_float
from hdrq.checkpoint.format import TABLES, Reader, packs, scales_shape, statistics_specs
from hdrq.checkpoint.library import SafetensorError, safe_open
from hdrq.checkpoint.states import plain_state, put_state, state_differences
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
    put_state(model, tensors)
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
    return load_float(architecture, file, arguments)


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


def float_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of floating-point data for a model: that of its first floating-point parameter."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
