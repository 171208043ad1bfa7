"""Loading quantized models, which :func:`hdrq.save` wrote."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from hdrq import checks
from hdrq.checkpoint.architecture import build
from hdrq.checkpoint.deferred import built_on_meta, give_parameters
from hdrq.checkpoint.float_states import load_float
from hdrq.checkpoint.format import TABLES, Reader, packs, scales_shape, statistics_specs
from hdrq.checkpoint.library import SafetensorError, safe_open
from hdrq.checkpoint.states import plain_state, put_state, state_differences
from hdrq.checks import listed
from hdrq.mapped import give_back_freed_memory
from hdrq.ops.packing import unpack
from hdrq.prepare.attention import restore_operands
from hdrq.prepare.copying import copy_model
from hdrq.prepare.float_model import check_float
from hdrq.prepare.folding import BATCHNORM
from hdrq.prepare.offload import Offload
from hdrq.quantizers.attach import attach_input_quantizer
from hdrq.quantizers.layers import (
    TRANSPOSED,
    WEIGHTED,
    input_readers,
    layer_kinds,
    quantized_layers,
    replace_module,
)
from hdrq.quantizers.modules import ActivationQuantizer, WeightQuantizer
from hdrq.quantizers.provenance import Statistics, set_origin, set_statistics

FACTORIES = str, type, FunctionType, MethodType, partial
FOLDABLE = tuple(kind for kind in WEIGHTED if kind is not nn.Embedding)


def load(
    path: str | os.PathLike,
    model: nn.Module | str | Callable[..., nn.Module] | None = None,
    model_args: Mapping[str, Any] | None = None,
    *,
    trust_architecture: bool = False,
    offload_folder: str | os.PathLike | None = None,
) -> nn.Module:
    """Read a quantized model; its outputs have the bits of the model that was saved.

    Args:
        path: a file that :func:`save` wrote.
        model: the float architecture, as it was before :func:`hdrq.quantize`, left as it is, or ``"module:factory"``,
            or a function that makes it, with ``model_args``. A checkpoint holds tensors, not code.
        model_args: the function's arguments; those that the file names with ``model``, where they are numbers.
        trust_architecture: where ``model`` is None, import and call the factory that the file names; where it is a
            name, give it any arguments of the file. That runs whatever they name: only for files whose writer is
            trusted.
        offload_folder: a folder on a disk, for weights that do not fit in memory: they are dequantized layer by layer
            into files of this folder, which the system maps, and need no memory of their own. None for memory.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no architecture, not a checkpoint of hdrq, a damaged one, or one that does not fit the architecture.
        OSError: the disk of ``offload_folder`` is full.
    """
    offload = Offload.of(offload_folder, {"model": model} if isinstance(model, nn.Module) else {})
    with Reader(path) as file:
        result = _architecture(model, model_args, file.manifest, trust_architecture, offload)
        placed = list(result.parameters())

        def take(name: str) -> torch.Tensor:
            if offload is not None:
                give_back_freed_memory()  # of what made the tensors before
            return file.tensor(name)

        try:
            attach(result, file.manifest)
            if offload is not None:
                offload.put_parameters(result, but=placed)  # what an attention was opened into
            assign(result, file.manifest, file.specs, take)
            set_statistics(result, {name: statistics(file, name) for name in file.manifest.get("statistics", {})})
        except ValueError as error:
            if file.path in str(error):
                raise
            raise ValueError(f"{error}, in {file.path}") from error
    return result


def _architecture(
    model: Any, arguments: Mapping[str, Any] | None, manifest: Mapping[str, Any], trusted: bool, offload: Offload | None
) -> nn.Module:
    """A copy of the model that was given, or one that is made; where it is offloaded its parameters have no values."""
    if arguments is not None and not isinstance(model, FACTORIES):
        raise ValueError(f"model_args must be left out without a function that makes the model, got {dict(arguments)}")
    if not (model is None or isinstance(model, FACTORIES)):
        check_float("model", model)
        return copy_model("model", model, offload)
    if model is None:
        known = manifest.get("architecture")
        if not (trusted and known):
            named = f"; the file names {known['factory']}: model= it, or trust_architecture=True" if known else ""
            raise ValueError(f"model must be the architecture that the checkpoint was made from, got None{named}")
        model = known["factory"]
    if arguments is None:
        arguments = arguments_for(model, manifest, trusted)
    if offload is None:
        made = build(model, **arguments)
    else:
        made = built_on_meta(model, **arguments)
        give_parameters(made, lambda name, parameter: offload.empty_like(parameter))
    check_float("model", made)
    return made


def arguments_for(
    architecture: str | Callable[..., nn.Module], manifest: Mapping[str, Any], trusted: bool = False
) -> dict[str, Any]:
    """The arguments that a manifest names for an architecture of that name, if it does.

    Raises:
        ValueError: an argument is no number, such as a path that a factory would read, and the file is not trusted.
    """
    known = manifest.get("architecture", {"factory": None})
    arguments = known["arguments"] if known["factory"] == architecture else {}
    odd = [name for name, value in arguments.items() if not _is_plain(value)]
    if odd and not trusted:
        raise ValueError(
            f"arguments of {architecture} must be numbers to be taken from a file, got others for {listed(odd)}; "
            "give the architecture as a module, or model_args, or trust_architecture=True"
        )
    return dict(arguments)


def _is_plain(value: Any) -> bool:
    """Whether a value is a number, or numbers: what names nothing."""
    return all(isinstance(each, int | float | None) for each in (value if isinstance(value, list) else [value]))


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
    activations = input_readers(model)
    for name, bounds in manifest["inputs"].items():
        activation = activations[name]
        activation.scale.copy_(read_scale(f"{name}.input.scale").view(activation.scale.shape))
        activation.qmin, activation.qmax = bounds
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


def load_either(
    file: str | os.PathLike,
    architecture: str,
    arguments: Mapping[str, Any],
    offload_folder: str | os.PathLike | None = None,
) -> nn.Module:
    """A model from a file of either kind: a quantized model, or a state of the architecture in full precision."""
    if _is_quantized(file):
        return load(file, architecture, arguments, offload_folder=offload_folder)
    return load_float(architecture, file, arguments, offload_folder=offload_folder)


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
