"""Preparing a model: fold BatchNorm, attach quantizers, assign bits, find the blocks to reconstruct."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, ValuesView
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from hdrq import checks, ops
from hdrq.quantizers import ActivationQuantizer, WeightQuantizer, integer_range
from hdrq.recipes import Recipe

WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
BATCHNORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
EDGE_BITS = 8  # of the first and the last layer, unless a pattern of the caller's says otherwise


@dataclass(frozen=True)
class Bits:
    """Bit widths of a layer's weight and of its input, 2 to 16 each."""

    weight: int
    activation: int

    @classmethod
    def parse(cls, text: str) -> Bits:
        """``"W4A8"``: 4-bit weights, 8-bit activations."""
        match = re.fullmatch(r"W(\d+)A(\d+)", text) if isinstance(text, str) else None
        if match is None:
            raise ValueError(f'bits must be written like "W4A4", got {text!r}')
        weight, activation = (int(group) for group in match.groups())
        return cls(checks.bits("weight bits", weight), checks.bits("activation bits", activation))


@dataclass(frozen=True)
class QuantizedLayer:
    """A layer with its quantizers attached."""

    name: str
    module: Any

    @property
    def latent(self) -> nn.Parameter:
        """The weight before its quantizer; in a finished model, on the grid."""
        return self.module.parametrizations.weight.original

    @property
    def weight_quantizer(self) -> WeightQuantizer:
        return self.module.parametrizations.weight[0]


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """The layers of a model whose weights are quantized, by name, in the order of the module tree."""
    return {
        name: QuantizedLayer(name, module)
        for name, module in model.named_modules()
        if parametrize.is_parametrized(module, "weight")
        and isinstance(module.parametrizations.weight[0], WeightQuantizer)
    }


def input_quantizers(model: nn.Module) -> dict[str, ActivationQuantizer]:
    """The quantizers of what modules read, by the name of the module."""
    return {n: m.input_quantizer for n, m in model.named_modules() if hasattr(m, "input_quantizer")}


def origin(model: nn.Module) -> dict:
    """How a quantized model was made, as its checkpoint's manifest says it."""
    return model.__dict__.get("hdrq_origin", {})


def set_origin(model: nn.Module, facts: dict) -> None:
    """Say how a model was made."""
    model.__dict__["hdrq_origin"] = facts


@contextmanager
def hooks(handles: Iterable) -> Iterator[None]:
    """Remove hooks when the block ends."""
    handles = list(handles)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def weighted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The convolutions and linear layers of a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, WEIGHTED)}


def check_float(name: str, model: nn.Module) -> None:
    """``model`` is a module whose convolutions and linear layers hold their weights themselves."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name} must be a torch.nn.Module, got {type(model).__name__}")
    for layer, module in weighted_layers(model).items():
        if "weight" not in module._parameters:
            raise ValueError(
                f"{name} must have plain weights, got a parametrized one (quantized already?) in {layer!r}"
            )


# --- BatchNorm ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def fold_batchnorm(model: nn.Module, run) -> dict[str, str]:
    """Fold each BatchNorm into the layer whose output it reads, in place; ``run(model)`` executes the model.

    The pairs are found by running the model, so it does not matter how the modules are nested. A BatchNorm that reads
    no weighted layer's output, channel by channel and unchanged, stays as it is.

    Returns:
        What was folded: the names of the BatchNorms, each with the name of its layer.

    Raises:
        ValueError: folding changed the model's outputs by more than 1e-3 of their size, or 4 roundings of half types.
    """
    pairs, before = _batchnorm_pairs(model, run)
    modules = dict(model.named_modules())
    for norm_name, layer_name in pairs.items():
        layer, norm = modules[layer_name], modules[norm_name]
        fuse = fuse_linear_bn_weights if isinstance(layer, nn.Linear) else fuse_conv_bn_weights
        gain = torch.ones_like(norm.running_var) if norm.weight is None else norm.weight
        shift = torch.zeros_like(norm.running_mean) if norm.bias is None else norm.bias
        statistics = (norm.running_mean, norm.running_var, norm.eps, gain, shift)
        layer.weight, layer.bias = fuse(layer.weight, layer.bias, *statistics)
        replace_module(model, norm_name, nn.Identity())
    after = run(model)
    error = max((_relative(a, b) for a, b in zip(_tensors(after), _tensors(before), strict=True)), default=0.0)
    roundings = [4 * torch.finfo(t.dtype).eps for t in _tensors(before) if t.is_floating_point()]
    if error > max([1e-3, *roundings]):
        raise ValueError(f"folding BatchNorm must leave the outputs as they are, got a relative change of {error:.2g}")
    return pairs


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put ``new`` in the place of the module called ``name``."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


def _batchnorm_pairs(model: nn.Module, run) -> tuple[dict[str, str], object]:
    made_by: dict[int, tuple[str, torch.Tensor, int]] = {}  # tensors are kept alive, so that no id is used twice
    calls: Counter[str] = Counter()
    pairs: dict[str, str] = {}

    def layer_hook(name):
        def hook(module, args, output):
            calls[name] += 1
            if output.ndim == 2 or not isinstance(module, nn.Linear):  # channels on axis 1, where BatchNorm has them
                made_by[id(output)] = (name, output, output._version)

        return hook

    def norm_hook(name):
        def hook(module, args, output):
            calls[name] += 1
            layer, _, version = made_by.get(id(args[0]), (None, None, None))
            if layer is not None and args[0]._version == version and module.track_running_stats:
                pairs[name] = layer

        return hook

    handles = [m.register_forward_hook(layer_hook(n)) for n, m in weighted_layers(model).items()]
    handles += [m.register_forward_hook(norm_hook(n)) for n, m in model.named_modules() if isinstance(m, BATCHNORM)]
    with hooks(handles):
        outputs = run(model)
    return {n: layer for n, layer in pairs.items() if calls[n] == 1 and calls[layer] == 1}, outputs


def _tensors(outputs) -> list[torch.Tensor]:
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    if isinstance(outputs, Mapping):
        outputs = outputs.values()
    return [t for item in outputs for t in _tensors(item)] if isinstance(outputs, tuple | list | ValuesView) else []


def _relative(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.double(), b.double()
    return float((a - b).norm() / b.norm().clamp(min=1e-12))


# --- Quantizers --------------------------------------------------------------------------------------------------


def bit_policy(layers: list[str], bits: str | Mapping[str, str]) -> dict[str, Bits]:
    """The bits of each layer, in execution order: the first pattern of ``bits`` that matches its name decides.

    A string is the pattern ``"*"``; then the first and the last layer take 8 bits. Patterns are those of a shell.

    Raises:
        TypeError: ``bits`` is neither a string nor a mapping.
        ValueError: a pattern matches no layer, or a layer no pattern.
    """
    if not isinstance(bits, str | Mapping):
        raise TypeError(f'bits must be a string like "W4A4" or a mapping from patterns, got {type(bits).__name__}')
    if isinstance(bits, str):
        edge = Bits(EDGE_BITS, EDGE_BITS)
        inner = Bits.parse(bits)
        return {name: edge if name in (layers[0], layers[-1]) else inner for name in layers}
    patterns = {pattern: Bits.parse(text) for pattern, text in bits.items()}
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in layers):
            known = ", ".join(layers)
            raise ValueError(f"bits must have patterns that match a layer, got {pattern!r}; layers: {known}")
    policy = {}
    for name in layers:
        chosen = next((p for p in patterns if fnmatchcase(name, p)), None)
        if chosen is None:
            raise ValueError(f'bits must have a pattern for every layer (end with "*"), got none for {name!r}')
        policy[name] = patterns[chosen]
    return policy


@torch.no_grad()
def attach_quantizers(model: nn.Module, run, bits, plan: Recipe) -> None:
    """Give every weighted layer that ``run(model)`` reaches quantizers for its weight and for its input, in place.

    Tensors are quantized where they enter: a block (:func:`find_blocks`) quantizes what it reads, once for all its
    branches, so that a residual is quantized too, as in QDrop; inside it, a layer that reads anything else has a
    quantizer of its own. Scales are searched: a weight's on the weight, an input's on what is read in ``run``. An input
    that is nowhere negative is quantized unsigned, any other signed.
    """
    blocks = find_blocks(model, run)
    readers = dict.fromkeys([*blocks, *weighted_layers(model)])
    inputs = module_inputs(model, run, list(readers))
    layers = [name for name in inputs if name in weighted_layers(model)]
    if not layers:
        raise ValueError("model must run at least one convolution or linear layer on calibration, got none")
    policy = bit_policy(layers, bits)
    for name in layers:
        qmin, qmax = integer_range(policy[name].weight, signed=True)
        layer: Any = model.get_submodule(name)
        axis = 0 if plan.per_channel else None
        checks.finite(f"weight of {name}", layer.weight)
        scale = ops.search_scale(layer.weight, qmin, qmax, norm=plan.norm, candidates=plan.candidates, axis=axis)
        parametrize.register_parametrization(layer, "weight", WeightQuantizer(scale, qmin, qmax, axis))
    for name, parts in inputs.items():
        block = next((b for b in blocks if name.startswith(f"{b}.")), None)
        if block is not None and inputs[block][0] is parts[0]:
            continue  # the block's own quantizer serves it
        first = next(layer for layer in layers if layer == name or layer.startswith(f"{name}."))
        x = torch.cat([part.flatten() for part in parts])
        checks.finite(f"input of {name}", x)
        qmin, qmax = integer_range(policy[first].activation, signed=bool((x < 0).any()))
        scale = ops.search_scale(x, qmin, qmax, norm=plan.norm, candidates=plan.candidates)
        attach_input_quantizer(model.get_submodule(name), ActivationQuantizer(scale, qmin, qmax))


def attach_input_quantizer(module: nn.Module, quantizer: ActivationQuantizer) -> None:
    """Quantize the first input of a module."""
    module.input_quantizer = quantizer
    module.register_forward_pre_hook(_quantize_input)


def _quantize_input(module: Any, args: tuple) -> tuple:
    return (module.input_quantizer(args[0]), *args[1:])


def module_inputs(model: nn.Module, run, names: list[str]) -> dict[str, list[torch.Tensor]]:
    """The first argument of modules at each of their calls while ``run(model)``, in execution order."""
    seen: dict[str, list[torch.Tensor]] = {}

    def hook(name):
        def keep(module, args):
            if not args:
                raise ValueError(f"{name} must be called with its input as a positional argument, got keywords only")
            seen.setdefault(name, []).append(args[0])

        return keep

    with hooks(model.get_submodule(n).register_forward_pre_hook(hook(n)) for n in names):
        run(model)
    return seen


# --- Blocks ------------------------------------------------------------------------------------------------------


def find_blocks(model: nn.Module, run) -> list[str]:
    """The units of reconstruction, in execution order.

    A block is the smallest module of a class of the model's own (not one of torch's) that occurs more than once and
    holds at least two weighted layers that ``run(model)`` reaches; layers outside every block are units by themselves.
    """
    weighted = weighted_layers(model)
    own = {n: m for n, m in model.named_modules() if n and not type(m).__module__.startswith("torch.")}
    order: dict[str, None] = {}

    def hook(name):
        return lambda module, args: order.setdefault(name)

    with hooks(model.get_submodule(n).register_forward_pre_hook(hook(n)) for n in {**own, **weighted}):
        run(model)
    layers = [n for n in order if n in weighted]
    own = {n: own[n] for n in order if n in own and sum(layer.startswith(f"{n}.") for layer in layers) > 1}
    kinds = Counter(type(m) for m in own.values())
    repeated = [n for n, m in own.items() if kinds[type(m)] > 1]
    blocks = [n for n in repeated if not any(other.startswith(f"{n}.") for other in repeated)]
    alone = [n for n in layers if not any(n.startswith(f"{block}.") for block in blocks)]
    return [n for n in order if n in blocks or n in alone]
