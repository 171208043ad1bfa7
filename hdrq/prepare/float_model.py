"""The model in full precision that quantization starts from: checked, copied, folded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from hdrq.checks import FLOATS, listed
from hdrq.prepare.attention import replace_attention
from hdrq.prepare.copying import copy_model
from hdrq.prepare.folding import fold_batchnorm
from hdrq.prepare.offload import Offload
from hdrq.prepare.repeatable import check_repeatable, trained
from hdrq.quantizers.bits import matches
from hdrq.quantizers.layers import quantized_layers, weighted_layers

DISTRIBUTED = (nn.parallel.DistributedDataParallel,)  # they hold process groups, which no copy has
REMOVE = (  # what computes a weight leaves these attributes in the layer, and this takes it away
    ("weight_mask", "torch.nn.utils.prune.remove"),
    ("weight_g", "torch.nn.utils.remove_weight_norm"),
    ("weight_orig", "torch.nn.utils.remove_spectral_norm"),
)


def check_float(name: str, model: Any) -> None:
    """``model`` is an eager module that is not quantized and holds its weights."""
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule) or _is_exported(model):
        kind, eager = type(model).__name__, ""
        if _is_exported(model):
            kind, eager = f"an exported program ({kind})", "; give the eager model that it was exported from"
        elif type(model).__module__.startswith(("torch.jit", "torch._C", "torch.export")):
            kind, eager = f"{kind} of {type(model).__module__}", "; give the eager model that it was made from"
        raise TypeError(f"{name} must be a torch.nn.Module, got {kind}{eager}")
    if isinstance(model, DISTRIBUTED):
        kind = type(model).__name__
        raise TypeError(f"{name} must be a module by itself, got {kind} around one; give {name}.module")
    if odd := [(where, x) for where, x in _tensors(model) if is_traceable_wrapper_subclass(x)]:
        shown = listed(f"{type(x).__name__} in {where!r}" for where, x in odd)
        raise TypeError(
            f"{name} must hold plain tensors, got {shown}; gather a sharded model on one device, or give a model that "
            "is not quantized"
        )
    if found := next(iter(quantized_layers(model)), None):
        raise ValueError(f"{name} must have plain weights, got a parametrized one (quantized already?) in {found!r}")
    if absent := [place for place, tensor in _tensors(model) if tensor.is_meta]:
        raise ValueError(
            f"{name} must hold its weights, got tensors on the meta device (offloaded, or not loaded): "
            f"{listed(absent)}; load the model whole, without device_map or offloading, and call {name}.to(device); "
            "or by hdrq.load_float with an offload_folder, where it does not fit in memory"
        )
    if lazy := [place for place, tensor in _tensors(model) if isinstance(tensor, UninitializedParameter)]:
        raise ValueError(f"{name} must have initialized weights, got {listed(lazy)}; run it on a batch first")


def check_module(name: str, model: Any, bits: str | Mapping[str, str] = "") -> None:
    """``model`` is a module in full precision and in evaluation mode, and its layers hold weights to quantize.

    A layer that the first matching pattern of ``bits`` keeps in full precision is taken as it is.
    """
    check_float(name, model)
    for layer, module in model.named_modules():
        scripted = isinstance(module, torch.jit.ScriptModule)
        holds = layer and (scripted or _is_exported(module)) and next(iter(module.parameters()), None) is not None
        if holds and not _stays(layer, bits):
            kind = "a ScriptModule" if scripted else "an exported program"
            raise TypeError(f"{name} must be eager to be quantized, got {kind} in {layer!r}; give it in its eager form")
    for layer, module in weighted_layers(model).items():
        if not _stays(layer, bits):
            _check_weight(name, layer, module)
    check_evaluated(name, model)


def check_evaluated(name: str, model: nn.Module) -> None:
    """``model`` is in evaluation mode, and so is every module in it that computes something else while it trains."""
    if model.training:
        raise ValueError(f"{name} must be in evaluation mode, got training mode; call {name}.eval()")
    if wrong := [module for module, matters in trained(model).items() if matters]:
        shown = listed(repr(module) for module in wrong)
        raise ValueError(f"{name} must be in evaluation mode, got training mode in {shown}; call {name}.eval()")


def _check_weight(name: str, layer: str, module: Any) -> None:
    """A layer holds its weight itself, in a type that can be quantized."""
    instead = f'or keep it in full precision with bits={{"{layer}": "float", …}}'
    if "weight" not in module._parameters:
        remove = next((f"{way}(layer{_argument(way)})" for key, way in REMOVE if hasattr(module, key)), None)
        if parametrize.is_parametrized(module, "weight"):
            remove = 'torch.nn.utils.parametrize.remove_parametrizations(layer, "weight")'
        remove = remove or "giving it a parameter called weight"
        raise ValueError(
            f"{name} must have plain weights, got a parametrized one in {layer!r}; make it plain by {remove}, {instead}"
        )
    if module.weight.dtype not in FLOATS:
        way = f"call {name}.float()" if module.weight.dtype == torch.float64 else "convert it to float32"
        raise ValueError(
            f"{name} must have weights of float32, bfloat16 or float16, got {module.weight.dtype} in {layer!r}; "
            f"{way}, {instead}"
        )


def _argument(way: str) -> str:
    return ', "weight"' if way.endswith("prune.remove") else ""


def _stays(layer: str, bits: str | Mapping[str, str]) -> bool:
    """Whether a layer stays in full precision: the first pattern that matches says so."""
    patterns = bits if isinstance(bits, Mapping) else {}
    return next((text for pattern, text in patterns.items() if matches(layer, pattern)), None) == "float"


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _is_exported(model: Any) -> bool:
    """Whether a model is a graph of PyTorch's operations, where layers are no modules any more."""
    if not isinstance(model, torch.fx.GraphModule):
        return False
    return any(isinstance(node.target, torch._ops.OpOverload) for node in model.graph.nodes)


def device_of(model: nn.Module) -> torch.device:
    """Where a model's first parameter is."""
    return next(model.parameters()).device


def prepare_float(
    model: nn.Module,
    run: Callable,
    name: str = "model",
    *,
    fold: bool = True,
    offload: Offload | None = None,
) -> tuple[nn.Module, dict[str, str]]:
    """A copy of a model with BatchNorm folded, its packed attentions replaced and no gradients; what was folded.

    Args:
        run: ``run(model)`` executes the model on an example, and returns its outputs.
        name: the model's, in messages.
        fold: whether BatchNorm is folded.
        offload: where the weights of the copy lie; None for memory.

    Raises:
        TypeError: the model cannot be copied.
        ValueError: two runs give different outputs.
    """
    full = copy_model(name, model, offload).requires_grad_(False)
    copied = list(full.parameters())
    check_repeatable(name, full, run)
    replace_attention(full, run)
    folded = fold_batchnorm(full, run) if fold else {}
    if offload is not None:
        offload.put_parameters(full, but=copied)
    return full, folded
