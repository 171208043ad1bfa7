"""Scales at the start: searched on weights, and on what modules read from the calibration set."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.utils import parametrize

from hdrq import checks, ops
from hdrq.prepare.observe import observe
from hdrq.quantizers.attach import attach_input_quantizer, first_tensor
from hdrq.quantizers.bits import BitWidths, bit_policy, bits_around, integer_range
from hdrq.quantizers.layers import TRANSPOSED, output_axis, shared_weights, weighted_layers
from hdrq.quantizers.modules import ActivationQuantizer, WeightQuantizer
from hdrq.recipes import Recipe

SAMPLED = 2**20  # elements of an input, of each call, that its scale is searched on


@torch.no_grad()
def attach_quantizers(
    model: nn.Module, run, example, bits, plan: Recipe, blocks: Sequence[str], operands: Sequence[str] = ()
) -> None:
    """Give every layer that ``run(model)`` reaches quantizers for its weight and for its input, in place.

    Inputs are quantized where they are read, once for all that read the same tensor (q, k and v). With
    ``activation_placement="qdrop"`` blocks quantize what they read too, for all their branches, so that a residual is
    quantized. Scales are searched: a weight's on the weight, an input's on what is read in ``run``. An input that is
    nowhere negative is quantized unsigned. Another is quantized signed, or with a zero point where that lowers the
    error by a tenth: the range of integers is then ``[qmin − z, qmax − z]``. Operands have the bits of the layers
    nearest around them.

    Args:
        run, example: run the model on the samples that scales are searched on, and on one.
        blocks: :func:`hdrq.prepare.units.find_blocks`.
        operands: more modules to quantize the inputs of (:func:`hdrq.prepare.attention.expose_operands`).

    Raises:
        ValueError: a layer cannot be quantized; the message names it.
    """
    weighted = weighted_layers(model)
    at_blocks = [b for b in blocks if plan.activation_placement == "qdrop" and not _runs_its_children(model, b)]
    reads = _first_reads(model, example, list(dict.fromkeys([*at_blocks, *weighted, *operands])))
    layers = {name: weighted[name] for name in reads if name in weighted}
    if not layers:
        raise ValueError("model must run at least one convolution or linear layer on calibration, got none")
    policy = bit_policy(list(layers), bits, shared_weights(layers))
    _attach_to_weights(layers, policy, plan)
    owners = _input_owners(reads, policy)
    widths = {owner: width for owner, width in owners.values()}
    samples = _read_samples(model, run, list(widths))
    quantizers = {name: _search_activation(name, samples[name], width, plan) for name, width in widths.items()}
    for name, (owner, _) in owners.items():
        attach_input_quantizer(model.get_submodule(name), quantizers[owner])


def _runs_its_children(model: nn.Module, name: str) -> bool:
    """Whether a module is a container that may call each child in turn: a quantizer among them would be called too."""
    return isinstance(model.get_submodule(name), nn.Sequential | nn.ModuleList | nn.ModuleDict)


def _attach_to_weights(layers: Mapping[str, Any], policy: Mapping[str, BitWidths | None], plan: Recipe) -> None:
    """Give each layer a quantizer for its weight; layers that share a weight share the quantizer of the first."""
    tied: dict[int, WeightQuantizer] = {}
    for name, layer in layers.items():
        widths = policy[name]
        if widths is not None:
            weight = id(layer.weight)
            if weight not in tied:
                tied[weight] = _search_weight(name, layer, widths, plan)
            parametrize.register_parametrization(layer, "weight", tied[weight])


def _input_owners(
    reads: Mapping[str, list[_Read]], policy: Mapping[str, BitWidths | None]
) -> dict[str, tuple[str, int]]:
    """For each module whose input is quantized: the module whose quantizer that is, and its bits.

    Modules that read the same tensors at the same bits share the quantizer of the first of them. A module inside a
    block that reads what the block reads has none: the block's quantizer serves it.
    """
    first_of: dict[tuple, str] = {}
    owners: dict[str, tuple[str, int]] = {}
    for name, read in reads.items():
        widths = bits_around(name, policy)
        if widths is None or not read[0].floating:
            continue
        if any(name.startswith(f"{o}.") and reads[o][0] == read[0] for o in first_of.values()):
            continue
        owners[name] = first_of.setdefault((widths.activation, *read), name), widths.activation
    return owners


def _search_weight(name: str, layer: Any, bits: BitWidths, plan: Recipe) -> WeightQuantizer:
    weight = layer.weight
    axis = None
    if plan.per_channel:
        axis = output_axis(layer)
        if isinstance(layer, TRANSPOSED) and layer.groups > 1:
            raise ValueError(
                f"{name} must have one group for a scale for each output channel, got {layer.groups}: a transposed "
                "convolution's groups have their channels along one axis; per_channel=False, or keep it in float"
            )
    checks.finite(f"weight of {name}", weight)
    qmin, qmax = integer_range(bits.weight, signed=True)
    options: Any = {"norm": plan.norm, "candidates": plan.candidates, "axis": axis}
    if plan.affine_weights:
        scale, zero_point = ops.search_affine(weight, qmin, qmax, **options)
        return WeightQuantizer(scale, qmin, qmax, axis, zero_point)
    return WeightQuantizer(ops.search_scale(weight, qmin, qmax, **options), qmin, qmax, axis)


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


def _reading(model: nn.Module, run, names: list[str], see) -> None:
    """Call ``see(name, tensor)`` with the first tensor that each module is called with, while ``run(model)``."""

    def note(name, module, args, kwargs) -> None:
        see(name, first_tensor(args, kwargs, name))

    observe(model, run, before=note, names=names)


class _Read(NamedTuple):
    """A tensor that was read, by a number of its own: equal if it was the very same tensor."""

    number: int
    floating: bool


def _first_reads(model: nn.Module, example, names: list[str]) -> dict[str, list[_Read]]:
    """What modules read at each of their calls, in execution order."""
    alive: dict[int, tuple[weakref.ref, int]] = {}  # an address may be used again: by whom, the reference says
    seen: dict[str, list[_Read]] = {}

    def see(name: str, x: torch.Tensor) -> None:
        reference, number = alive.get(id(x), (None, -1))
        if reference is None or reference() is not x:
            number = sum(map(len, seen.values()))
            alive[id(x)] = weakref.ref(x), number
        seen.setdefault(name, []).append(_Read(number, x.is_floating_point()))

    _reading(model, example, names, see)
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
