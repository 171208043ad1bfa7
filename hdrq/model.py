"""Preparing a model: which layers it has, how many bits each gets, where quantizers are attached."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import nn
from torch.nn.utils import parametrize

from hdrq import checks, ops
from hdrq.quantizers import ActivationQuantizer, WeightQuantizer, integer_range
from hdrq.recipes import Recipe

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED, nn.Linear, nn.Embedding)
SAMPLED = 2**20  # elements of an input, of each call, that its scale is searched on
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
    """The quantizers of what modules read, by the name of the module; a shared one by its first reader's."""
    found: dict[int, str] = {}
    for name, quantizer in input_readers(model).items():
        found.setdefault(id(quantizer), name)
    return {name: cast(Any, model.get_submodule(name)).input_quantizer for name in found.values()}


def input_readers(model: nn.Module) -> dict[str, ActivationQuantizer]:
    """Every module whose input is quantized, by name, with its quantizer: modules that read one tensor share one."""
    modules: Iterable[tuple[str, Any]] = model.named_modules()
    return {n: m.input_quantizer for n, m in modules if hasattr(m, "input_quantizer")}


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
    """The convolutions, linear layers and embeddings of a model, subclasses too, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, WEIGHTED)}


def check_float(name: str, model: nn.Module) -> None:
    """``model`` is a module whose layers hold their weights themselves."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name} must be a torch.nn.Module, got {type(model).__name__}")
    for layer, module in weighted_layers(model).items():
        if "weight" not in module._parameters:
            raise ValueError(
                f"{name} must have plain weights, got a parametrized one (quantized already?) in {layer!r}"
            )


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put ``new`` in the place of the module called ``name``."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


def bit_policy(layers: list[str], bits: str | Mapping[str, str]) -> dict[str, Bits | None]:
    """The bits of each layer, in execution order: the first pattern of ``bits`` that matches decides. None: in float.

    A string is the pattern ``"*"``; then the first and the last layer take 8 bits. Patterns are those of a shell, and
    match a layer's name or that of a module it lies in: ``"stem"`` is for all of the stem.

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
    patterns = {pattern: None if text == "float" else Bits.parse(text) for pattern, text in bits.items()}
    for pattern, own in patterns.items():
        if own is not None and not any(matches(name, pattern) for name in layers):
            known = ", ".join(layers)
            raise ValueError(f"bits must have patterns that match a layer, got {pattern!r}; layers: {known}")
    policy = {}
    for name in layers:
        chosen = next((p for p in patterns if matches(name, p)), None)
        if chosen is None:
            raise ValueError(f'bits must have a pattern for every layer (end with "*"), got none for {name!r}')
        policy[name] = patterns[chosen]
    return policy


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern is for a module of this name, or for one that it lies in."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:i]), pattern) for i in range(1, len(parts) + 1)) or fnmatchcase(
        name, pattern
    )


@torch.no_grad()
def attach_quantizers(
    model: nn.Module, run, example, bits, plan: Recipe, blocks: Sequence[str], operands: Sequence[str] = ()
) -> None:
    """Give every layer that ``run(model)`` reaches quantizers for its weight and for its input, in place.

    Inputs are quantized where they are read, once for all that read the same tensor (q, k and v). With ``placement``
    ``"qdrop"`` blocks quantize what they read too, for all their branches, so that a residual is quantized. Scales are
    searched: a weight's on the weight, an input's on what is read in ``run``. An input that is nowhere negative is
    quantized unsigned; another signed or, where that lowers the error by a tenth, with a zero point, which is a range
    of integers of its own: ``[qmin − z, qmax − z]``. Operands have the bits of the layers nearest around them.

    Args:
        run, example: run the model on the samples that scales are searched on, and on one.
        blocks: :func:`hdrq.blocks.find_blocks`.
        operands: more modules to quantize the inputs of (:func:`hdrq.attention.expose_operands`).

    Raises:
        ValueError: a layer cannot be quantized; the message names it.
    """
    weighted = weighted_layers(model)
    readers = dict.fromkeys([*(blocks if plan.placement == "qdrop" else ()), *weighted, *operands])
    reads = _first_reads(model, example, list(readers))
    layers = [name for name in reads if name in weighted]
    if not layers:
        raise ValueError("model must run at least one convolution or linear layer on calibration, got none")
    policy = bit_policy(layers, bits)
    tied: dict[int, str] = {}  # the first of the layers that share a weight
    for name in layers:
        layer: Any = weighted[name]
        own, first = policy[name], tied.setdefault(id(layer.weight), name)
        if own is not None and first == name:
            parametrize.register_parametrization(layer, "weight", _search_weight(name, layer, own, plan))
        elif own is not None and own == policy[first]:
            quantizer = quantized_layers(model)[first].weight_quantizer
            parametrize.register_parametrization(layer, "weight", quantizer)
        elif own != policy[first]:
            raise ValueError(
                f"bits must agree where a weight is shared, got {own} for {name}, {policy[first]} for {first}"
            )
    owners: dict[tuple, str] = {}
    shared: dict[str, str] = {}
    ranges: dict[str, int] = {}
    for name, tensors in reads.items():
        own = _bits_around(name, policy)
        if own is None or not tensors[0].is_floating_point():
            continue
        key = (own.activation, *map(id, tensors))
        owner = next((o for o in owners.values() if name.startswith(f"{o}.") and reads[o][0] is tensors[0]), None)
        if owner is not None:
            continue  # the quantizer of the block around it serves it
        owner = owners.setdefault(key, name)
        shared[name] = owner
        ranges[owner] = own.activation
    samples = _read_samples(model, run, list(ranges))
    quantizers = {name: _search_activation(name, samples[name], bits, plan) for name, bits in ranges.items()}
    for name, owner in shared.items():
        attach_input_quantizer(model.get_submodule(name), quantizers[owner])


def _bits_around(name: str, policy: Mapping[str, Bits | None]) -> Bits | None:
    """The first of the layers in a module, or of those nearest around it, that is quantized."""
    inside = [bits for layer, bits in policy.items() if not name or layer == name or layer.startswith(f"{name}.")]
    if not inside:
        return _bits_around(name.rpartition(".")[0], policy)
    return next((bits for bits in inside if bits is not None), None)


def _search_weight(name: str, layer: Any, bits: Bits, plan: Recipe) -> WeightQuantizer:
    weight = layer.weight
    axis = None
    if plan.per_channel:
        axis = 1 if isinstance(layer, TRANSPOSED) else 0
        if isinstance(layer, TRANSPOSED) and layer.groups > 1:
            raise ValueError(
                f"{name} must have one group for a scale for each output channel, got {layer.groups}: a transposed "
                "convolution's groups have their channels along one axis; per_channel=False, or keep it in float"
            )
    checks.finite(f"weight of {name}", weight)
    qmin, qmax = integer_range(bits.weight, signed=True)
    scale = ops.search_scale(weight, qmin, qmax, norm=plan.norm, candidates=plan.candidates, axis=axis)
    return WeightQuantizer(scale, qmin, qmax, axis)


def _search_activation(name: str, x: torch.Tensor, bits: int, plan: Recipe) -> ActivationQuantizer:
    checks.finite(f"input of {name}", x)
    options: Any = {"norm": plan.norm, "candidates": plan.candidates}
    signed = bool((x < 0).any())
    qmin, qmax = integer_range(bits, signed)
    scale = ops.search_scale(x, qmin, qmax, **options)
    if signed and bits < 16:  # a range of 16 bits fits as it is only
        low, high = integer_range(bits, signed=False)
        affine, zero_point = ops.search_affine(x, low, high, **options)
        shift = int(zero_point)
        if _error(x, affine, low - shift, high - shift, plan) < 0.9 * _error(x, scale, qmin, qmax, plan):
            scale, qmin, qmax = affine, low - shift, high - shift
    return ActivationQuantizer(scale, qmin, qmax)


def _error(x: torch.Tensor, scale: torch.Tensor, qmin: int, qmax: int, plan: Recipe) -> float:
    return float((ops.fake_quantize(x, scale, qmin, qmax) - x).abs().double().pow(plan.norm).sum())


def attach_input_quantizer(module: nn.Module, quantizer: ActivationQuantizer) -> None:
    """Quantize the first tensor that a module is called with."""
    module.input_quantizer = quantizer
    module.register_forward_pre_hook(_quantize_input, with_kwargs=True)


def _quantize_input(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    where = _first_tensor(args, kwargs)
    if isinstance(where, int):
        return (*args[:where], module.input_quantizer(args[where]), *args[where + 1 :]), kwargs
    return args, {**kwargs, where: module.input_quantizer(kwargs[where])}


def _first_tensor(args: tuple, kwargs: Mapping) -> int | str:
    """The place or the name of the first tensor among a call's arguments."""
    named = [*enumerate(args), *kwargs.items()]
    where = next((key for key, value in named if isinstance(value, torch.Tensor)), None)
    if where is None:
        raise ValueError(f"a module to be quantized must be called with a tensor, got {[type(v) for _, v in named]}")
    return where


def _reading(model: nn.Module, run, names: list[str], see) -> None:
    """Call ``see(name, tensor)`` with the first tensor that each module is called with, while ``run(model)``."""

    def hook(name):
        def look(module, args, kwargs):
            where = _first_tensor(args, kwargs)
            see(name, args[where] if isinstance(where, int) else kwargs[where])

        return look

    handles = [model.get_submodule(n).register_forward_pre_hook(hook(n), with_kwargs=True) for n in names]
    with hooks(handles):
        run(model)


def _first_reads(model: nn.Module, example, names: list[str]) -> dict[str, list[torch.Tensor]]:
    """What modules read at each of their calls, the very tensors, in execution order."""
    seen: dict[str, list[torch.Tensor]] = {}
    _reading(model, example, names, lambda name, x: seen.setdefault(name, []).append(x))
    return seen


def _read_samples(model: nn.Module, run, names: list[str]) -> dict[str, torch.Tensor]:
    """Of what modules read, evenly spaced elements, few enough to keep for all of them, and the extremes."""
    seen: dict[str, list[torch.Tensor]] = {}

    def keep(name, x):
        flat = x.detach().flatten()
        few = flat[:: max(1, flat.numel() // SAMPLED)]
        seen.setdefault(name, []).append(torch.cat([few, *(v.reshape(1) for v in torch.aminmax(flat))]))

    _reading(model, run, names, keep)
    return {name: torch.cat(parts) for name, parts in seen.items()}
