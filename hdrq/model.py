"""Preparing a model: fold BatchNorm, attach quantizers, assign bits, find the blocks to reconstruct."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from hdrq import checks, ops
from hdrq.quantizers import ActivationQuantizer, WeightQuantizer, integer_range

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
    module: nn.Module

    @property
    def latent(self) -> nn.Parameter:
        """The weight before its quantizer; in a finished model, on the grid."""
        return self.module.parametrizations.weight.original

    @property
    def weight_quantizer(self) -> WeightQuantizer:
        return self.module.parametrizations.weight[0]

    @property
    def input_quantizer(self) -> ActivationQuantizer:
        return self.module.input_quantizer

    @property
    def quantizers(self) -> tuple[WeightQuantizer, ActivationQuantizer]:
        return self.weight_quantizer, self.input_quantizer


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """The layers of a model that carry quantizers, by name, in the order of the module tree."""
    return {
        name: QuantizedLayer(name, module)
        for name, module in model.named_modules()
        if parametrize.is_parametrized(module, "weight") and hasattr(module, "input_quantizer")
    }


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


# --- BatchNorm ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def fold_batchnorm(model: nn.Module, run) -> dict[str, str]:
    """Fold each BatchNorm into the layer whose output it reads, in place; ``run(model)`` executes the model.

    The pairs are found by running the model, so it does not matter how the modules are nested. A BatchNorm that reads
    no weighted layer's output directly stays as it is.

    Returns:
        What was folded: the names of the BatchNorms, each with the name of its layer.

    Raises:
        ValueError: folding changed the model's outputs by more than 1e-3 of their size.
    """
    pairs, before = _batchnorm_pairs(model, run)
    modules = dict(model.named_modules())
    for norm_name, layer_name in pairs.items():
        layer, norm = modules[layer_name], modules[norm_name]
        fuse = fuse_linear_bn_weights if isinstance(layer, nn.Linear) else fuse_conv_bn_weights
        statistics = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
        layer.weight, layer.bias = fuse(layer.weight, layer.bias, *statistics)
        replace_module(model, norm_name, nn.Identity())
    after = run(model)
    error = max((_relative(a, b) for a, b in zip(_tensors(after), _tensors(before), strict=True)), default=0.0)
    if error > 1e-3:
        raise ValueError(f"folding BatchNorm must leave the outputs as they are, got a relative change of {error:.2g}")
    return pairs


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put ``new`` in the place of the module called ``name``."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


def _batchnorm_pairs(model: nn.Module, run) -> tuple[dict[str, str], object]:
    made_by: dict[int, tuple[str, torch.Tensor]] = {}  # the tensors are kept alive, so that no id is used twice
    calls: Counter[str] = Counter()
    pairs: dict[str, str] = {}

    def layer_hook(name):
        def hook(module, args, output):
            calls[name] += 1
            made_by[id(output)] = (name, output)

        return hook

    def norm_hook(name):
        def hook(module, args, output):
            calls[name] += 1
            if id(args[0]) in made_by and module.track_running_stats:
                pairs[name] = made_by[id(args[0])][0]

        return hook

    handles = [m.register_forward_hook(layer_hook(n)) for n, m in weighted_layers(model).items()]
    handles += [
        m.register_forward_hook(norm_hook(n)) for n, m in model.named_modules() if isinstance(m, BATCHNORM)
    ]
    with hooks(handles):
        outputs = run(model)
    return {n: layer for n, layer in pairs.items() if calls[n] == 1 and calls[layer] == 1}, outputs


def _tensors(outputs) -> list[torch.Tensor]:
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    if isinstance(outputs, Mapping):
        outputs = outputs.values()
    return [t for item in outputs for t in _tensors(item)] if isinstance(outputs, Iterable) else []


def _relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp(min=1e-12))


# --- Quantizers --------------------------------------------------------------------------------------------------


def bit_policy(layers: list[str], bits: str | Mapping[str, str]) -> dict[str, Bits]:
    """The bits of each layer, in execution order: the first pattern of ``bits`` that matches its name decides.

    A string is the pattern ``"*"``; then the first and the last layer take 8 bits. Patterns are those of a shell.

    Raises:
        ValueError: a pattern matches no layer, or a layer no pattern.
    """
    if isinstance(bits, str):
        edge = Bits(EDGE_BITS, EDGE_BITS)
        inner = Bits.parse(bits)
        return {name: edge if name in (layers[0], layers[-1]) else inner for name in layers}
    patterns = {pattern: Bits.parse(text) for pattern, text in bits.items()}
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in layers):
            raise ValueError(f"bits must have patterns that match a layer, got {pattern!r}; layers: {', '.join(layers)}")
    policy = {}
    for name in layers:
        chosen = next((p for p in patterns if fnmatchcase(name, p)), None)
        if chosen is None:
            raise ValueError(f'bits must have a pattern for every layer (end with "*"), got none for {name!r}')
        policy[name] = patterns[chosen]
    return policy


@torch.no_grad()
def attach_quantizers(model: nn.Module, run, bits, *, norm: float, candidates: int, per_channel: bool) -> None:
    """Give every weighted layer that ``run(model)`` reaches a quantizer for its weight and one for its input, in place.

    Scales are searched: a weight's on the weight, an input's on what the layer reads in ``run``. An input that is
    nowhere negative is quantized unsigned, any other signed.
    """
    inputs = layer_inputs(model, run)
    policy = bit_policy(list(inputs), bits)
    for name, x in inputs.items():
        layer, width = model.get_submodule(name), policy[name]
        search = {"norm": norm, "candidates": candidates}

        qmin, qmax = integer_range(width.weight, signed=True)
        axis = 0 if per_channel else None
        scale = ops.search_scale(layer.weight, qmin, qmax, axis=axis, **search)
        parametrize.register_parametrization(layer, "weight", WeightQuantizer(scale, qmin, qmax, axis))

        qmin, qmax = integer_range(width.activation, signed=bool((x < 0).any()))
        attach_input_quantizer(layer, ActivationQuantizer(ops.search_scale(x, qmin, qmax, **search), qmin, qmax))


def attach_input_quantizer(layer: nn.Module, quantizer: ActivationQuantizer) -> None:
    """Quantize the first input of a layer."""
    layer.input_quantizer = quantizer
    layer.register_forward_pre_hook(_quantize_input)


def _quantize_input(layer: nn.Module, args: tuple) -> tuple:
    return (layer.input_quantizer(args[0]), *args[1:])


def layer_inputs(model: nn.Module, run) -> dict[str, torch.Tensor]:
    """What each weighted layer reads while ``run(model)``, in execution order."""
    seen: dict[str, list[torch.Tensor]] = {}

    def hook(name):
        return lambda module, args: seen.setdefault(name, []).append(args[0].detach())

    with hooks(m.register_forward_pre_hook(hook(n)) for n, m in weighted_layers(model).items()):
        run(model)
    return {name: torch.cat([x.flatten() for x in parts]) for name, parts in seen.items()}


# --- Blocks ------------------------------------------------------------------------------------------------------


def find_blocks(model: nn.Module, run) -> list[str]:
    """The units of reconstruction, in execution order.

    A block is the smallest module of a class of the model's own (not one of torch's) that occurs more than once and
    holds at least two quantized layers; layers outside every block are units by themselves.
    """
    layers = set(quantized_layers(model))
    holds = {
        name: sum(layer == name or layer.startswith(f"{name}.") for layer in layers)
        for name, _ in model.named_modules()
    }
    own = {n: m for n, m in model.named_modules() if n and not type(m).__module__.startswith("torch.") and holds[n] > 1}
    kinds = Counter(type(m) for m in own.values())
    repeated = [n for n, m in own.items() if kinds[type(m)] > 1]
    blocks = [n for n in repeated if not any(other.startswith(f"{n}.") for other in repeated)]
    units = blocks + [n for n in layers if not any(n.startswith(f"{block}.") for block in blocks)]

    order: dict[str, None] = {}

    def hook(name):
        return lambda module, args: order.setdefault(name)

    with hooks(model.get_submodule(n).register_forward_pre_hook(hook(n)) for n in units):
        run(model)
    return list(order)
