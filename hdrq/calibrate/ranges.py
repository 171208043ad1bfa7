"""Scales at the start: searched on weights, and on what modules read from the calibration set."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.utils import parametrize

from hdrq import checks, ops
from hdrq.calibrate.data import Call, first_samples, run_all
from hdrq.calibrate.placement import place_quantizers
from hdrq.calibrate.ranks import ALONE, Ranks
from hdrq.prepare.observe import observe
from hdrq.quantizers.attach import attach_input_quantizer, first_tensor
from hdrq.quantizers.bits import BitWidths, integer_range
from hdrq.quantizers.layers import TRANSPOSED, output_axis
from hdrq.quantizers.modules import ActivationQuantizer, Quantizer, WeightQuantizer
from hdrq.recipes import Recipe

Q = TypeVar("Q", bound=Quantizer)
REACHING = 128  # samples, at least, that say which modules of a model are reached
COMPARED = 4  # samples that show whether modules read the same where they run one by one
SAMPLED = 2**20  # elements of what a module reads, of all samples together, that its scale is searched on


def reaching_samples(batches: list[Call], plan: Recipe) -> list[Call]:
    """The first samples: those that scales are searched on, and more where they are too few to reach all of a model."""
    return first_samples(batches, max(plan.range_samples, REACHING))


@torch.no_grad()
def attach_quantizers(
    model: nn.Module,
    calls: list[Call],
    bits: str | Mapping[str, str],
    plan: Recipe,
    blocks: Sequence[str],
    operands: Sequence[str] = (),
    seed: int = 0,
    ranks: Ranks = ALONE,
) -> dict[str, str]:
    """Give every layer that the calls reach quantizers for its weight and for its input, in place.

    Where inputs are quantized, by layers or by blocks, says :func:`hdrq.calibrate.placement.place_quantizers`. Scales
    are searched: a weight's on the weight, an input's on what is read while everything is in full precision. That is
    measured sample by sample, so that neither batches nor their order of sums have a say: of each sample elements are
    drawn at random, one of each stretch of equal length, and the smallest and the largest of all samples are added
    where elements were left out. An input that is nowhere negative is quantized unsigned. Another is quantized signed,
    or with a zero point where that lowers the error by a tenth: the range of integers is then ``[qmin − z, qmax − z]``.
    Operands have the bits of the layers nearest around them.

    Args:
        calls: the model's calls, with samples that reach all of it; scales are searched on ``range_samples`` of them.
        blocks: :func:`hdrq.prepare.units.find_blocks`.
        operands: more modules to quantize the inputs of (:func:`hdrq.prepare.attention.expose_operands`).
        seed: of the draw of elements.
        ranks: share the work: a sample is read, and a scale searched, by one of them. No bit depends on how many.

    Returns:
        For each block, where what it reads is quantized: at the ``"block"``, or at its ``"layers"``.

    Raises:
        ValueError: a layer cannot be quantized, or bits contradict each other; the message names it.
    """
    where = (plan.activation_placement, plan.quantize_input)
    placement = place_quantizers(model, run_all(calls), bits, *where, blocks, operands)
    weights = _weight_quantizers(model, placement.layers, plan, ranks)
    widths = {owner: width for owner, width in placement.inputs.values()}
    samples = _read_samples(model, first_samples(calls, plan.range_samples), list(widths), seed, ranks)

    def search(name: str) -> ActivationQuantizer:
        return _search_activation(name, samples[name], widths[name], plan)

    quantizers = _searched(model, widths, search, ranks)
    for name, quantizer in weights.items():
        parametrize.register_parametrization(model.get_submodule(name), "weight", quantizer)
    for name, (owner, _) in placement.inputs.items():
        attach_input_quantizer(model.get_submodule(name), quantizers[owner])
    return placement.blocks


def _weight_quantizers(
    model: nn.Module, policy: Mapping[str, BitWidths | None], plan: Recipe, ranks: Ranks
) -> dict[str, WeightQuantizer]:
    """A quantizer for the weight of each layer; layers that share a weight share the quantizer of the first."""
    widths = {name: width for name, width in policy.items() if width is not None}
    layers: dict[str, Any] = {name: model.get_submodule(name) for name in widths}
    first: dict[int, str] = {}
    owners = {name: first.setdefault(id(layer.weight), name) for name, layer in layers.items()}

    def search(name: str) -> WeightQuantizer:
        return search_weight(name, layers[name], widths[name].weight, plan)

    found = _searched(model, first.values(), search, ranks)
    return {name: found[owner] for name, owner in owners.items()}


def _searched(model: nn.Module, names: Iterable[str], search: Callable[[str], Q], ranks: Ranks) -> dict[str, Q]:
    """The quantizer of each name, searched by one of the ranks."""
    if ranks.size == 1:
        return {name: search(name) for name in names}
    device = next(model.parameters()).device
    found = ranks.dealt(list(names), lambda name: search(name).cpu())
    return {name: quantizer.to(device) for name, quantizer in found.items()}


def search_weight(name: str, layer: Any, bits: int, plan: Recipe) -> WeightQuantizer:
    """A quantizer for the weight of a layer called ``name``, its scale searched as the recipe says.

    Raises:
        ValueError: the weight is not finite, or its shape has no such groups or channels.
    """
    weight = layer.weight
    axis, group_size = None, None
    if plan.group_size is not None and weight.ndim == 2:
        group_size = _group_size(name, layer, plan.group_size)
    elif plan.per_channel or plan.group_size is not None:
        axis = output_axis(layer)
        if isinstance(layer, TRANSPOSED) and layer.groups > 1:
            raise ValueError(
                f"{name} must have one group for a scale for each output channel, got {layer.groups}: a transposed "
                "convolution's groups have their channels along one axis; per_channel=False, or keep it in float"
            )
    checks.finite(f"weight of {name}", weight)
    qmin, qmax = integer_range(bits, signed=True)
    options: Any = {"norm": plan.norm, "candidates": plan.candidates, "axis": axis, "group_size": group_size}
    if plan.affine_weights:
        scale, zero_point = ops.search_affine(weight, qmin, qmax, **options)
    else:
        scale, zero_point = ops.search_scale(weight, qmin, qmax, **options), None
    return WeightQuantizer(scale, qmin, qmax, axis, zero_point, group_size)


def _group_size(name: str, layer: Any, group_size: int) -> int:
    """The size of a layer's groups, if its weight can be cut into such."""
    inputs = layer.weight.shape[1 - output_axis(layer)]
    if output_axis(layer) != 0:
        raise ValueError(
            f"{name} must have its inputs along the last axis of its weight for group_size={group_size}, got a "
            f"{type(layer).__name__}, which has its outputs there; per_channel=True, or keep it in float"
        )
    if inputs % group_size:
        raise ValueError(
            f"group_size must divide the {inputs} inputs of {name}, got {group_size}; keep that layer in float, or "
            f"take a size that divides {inputs}"
        )
    return group_size


def _search_activation(name: str, sampled: _Sampled, bits: int, plan: Recipe) -> ActivationQuantizer:
    x = sampled.joined
    checks.finite(f"input of {name}", x)
    options: Any = {"norm": plan.norm, "candidates": plan.candidates}
    signed = bool((x < 0).any())
    qmin, qmax = integer_range(bits, signed)
    if plan.range_union:
        scales = [ops.search_scale(part, qmin, qmax, **options) for part in sampled.parts if part.any()]
        scale = torch.stack(scales).amax(0) if scales else ops.search_scale(x, qmin, qmax, **options)
    else:
        scale = ops.search_scale(x, qmin, qmax, **options)
    if signed and plan.affine_activations and bits < 16:  # a range of 16 bits fits as it is only
        low, high = integer_range(bits, signed=False)
        affine, zero_point = ops.search_affine(x, low, high, **options)
        shift = int(zero_point)
        if _error(x, affine, low - shift, high - shift, plan) < 0.9 * _error(x, scale, qmin, qmax, plan):
            scale, qmin, qmax = affine, low - shift, high - shift
    return ActivationQuantizer(scale, qmin, qmax)


def search_again(
    module: nn.Module,
    run: Callable[[nn.Module], Any],
    quantizers: Mapping[str, ActivationQuantizer],
    plan: Recipe,
    count: int,
    seed: int = 0,
) -> None:
    """Give quantizers of what modules read the scale for what they read now, at the bits that they have.

    Args:
        module: holds the modules that ``quantizers`` names; it passes everything as it is.
        run: runs it on calibration data.
        count: elements that are kept of a call.
    """
    generator, samples = torch.Generator().manual_seed(seed), {name: _Sampled() for name in quantizers}

    def keep(name: str, layer: nn.Module, args: tuple, kwargs: dict) -> None:
        samples[name].add(first_tensor(args, kwargs, name), count, generator)

    observe(module, run, before=keep, names=quantizers)
    for name, quantizer in quantizers.items():
        if samples[name].parts:
            bits = (quantizer.qmax - quantizer.qmin + 1).bit_length() - 1
            found = _search_activation(name, samples[name], bits, plan)
            quantizer.scale.data.copy_(found.scale.view(quantizer.scale.shape))
            quantizer.qmin, quantizer.qmax = found.qmin, found.qmax


def search_weight_scale(quantizer: WeightQuantizer, weight: torch.Tensor, plan: Recipe) -> None:
    """Give a weight's quantizer the scale, and zero point, for what the weight is now."""
    options: Any = {"norm": plan.norm, "candidates": plan.candidates, **quantizer.where}
    grid = (weight, quantizer.qmin, quantizer.qmax)
    if quantizer.zero_point is None:
        scale = ops.search_scale(*grid, **options)
    else:
        scale, zero_point = ops.search_affine(*grid, **options)
        quantizer.zero_point.copy_(zero_point.view(quantizer.zero_point.shape))
    quantizer.scale.data.copy_(scale.view(quantizer.scale.shape))


def _error(x: torch.Tensor, scale: torch.Tensor, qmin: int, qmax: int, plan: Recipe) -> float:
    return float((ops.fake_quantize(x, scale, qmin, qmax) - x).abs().double().pow(plan.norm).sum())


@dataclass
class _Sampled:
    """Elements of what a module read."""

    parts: list[torch.Tensor] = field(default_factory=list)  # of each sample, or of each call
    extremes: torch.Tensor | None = None  # the smallest and the largest of all
    cut: bool = False  # whether elements were left out

    @property
    def joined(self) -> torch.Tensor:
        """All of them, and the extremes where they may be missing."""
        return torch.cat([*self.parts, *([self.extremes] if self.cut and self.extremes is not None else [])])

    def to(self, device: torch.device | str) -> _Sampled:
        """The same on a device."""
        extremes = None if self.extremes is None else self.extremes.to(device)
        return _Sampled([part.to(device) for part in self.parts], extremes, self.cut)

    def add(self, x: torch.Tensor, count: int, generator: torch.Generator) -> None:
        """At most ``count`` elements of a tensor, drawn at random."""
        flat = x.detach().flatten()
        self.cut |= flat.numel() > count
        places = _drawn(flat.numel(), count, generator).to(flat.device) if flat.numel() > count else slice(None)
        self.parts.append(flat[places].clone())
        if flat.numel():
            found = torch.stack(torch.aminmax(flat))
            known = [] if self.extremes is None else [self.extremes]
            self.extremes = torch.stack(torch.aminmax(torch.cat([*known, found])))


def _read_samples(
    model: nn.Module, calls: Sequence[Call], names: list[str], seed: int, ranks: Ranks = ALONE
) -> dict[str, _Sampled]:
    """Elements of what modules read, few enough to keep for all of them.

    Each sample runs by itself. A model that cannot do that, or whose modules then read something else, is run as the
    calls are, and a warning says why.

    Raises:
        ValueError: the calls do not reach a module.
    """
    count = sum(call.size for call in calls)
    why = _needs_others(model, calls[0].at(torch.arange(min(calls[0].size, COMPARED))), names)
    if why:
        return _sampled_whole(model, calls, names, seed, why)
    shared = None if ranks.size == 1 else _sampled_by(ranks, model, calls, names, max(1, SAMPLED // count), seed)
    if shared is not None:
        return shared
    alone = (call.at(torch.tensor([k])) for call in calls for k in range(call.size))
    try:
        samples = _sampled(model, alone, names, max(1, SAMPLED // count), seed)
        why = f"does not reach {checks.listed(name for name in names if name not in samples)}"
    except Exception as error:  # whatever the model raises
        samples, why = {}, f"raises {type(error).__name__}: {checks.short_reason(error)}"
    return samples if samples.keys() == set(names) else _sampled_whole(model, calls, names, seed, why)


def _needs_others(model: nn.Module, call: Call, names: list[str]) -> str:
    """Why the samples of a call cannot be run one by one, in words; "" where modules read the same then."""
    try:
        whole = _sampled(model, [call], names, 1, 0)
        alone = _sampled(model, (call.at(torch.tensor([k])) for k in range(call.size)), names, 1, 0)
    except Exception as error:  # whatever the model raises
        return f"raises {type(error).__name__}: {checks.short_reason(error)}"
    if alone.keys() != whole.keys():
        return ""  # modules that not all samples reach are looked at for all of them
    for name in whole:
        got, want = alone[name].extremes, whole[name].extremes
        if got is None or want is None:
            continue
        bound = max(1e-3, 16 * torch.finfo(want.dtype).eps) * float(want.abs().max())
        if not float((got - want).abs().max()) <= bound:
            return f"reads other values in {name}, so samples depend on each other, or lie along another axis"
    return ""


def _sampled_whole(
    model: nn.Module, calls: Sequence[Call], names: list[str], seed: int, why: str
) -> dict[str, _Sampled]:
    """Elements of what modules read in the calls as they are; ``why`` no sample runs by itself."""
    samples = _sampled(model, calls, names, max(1, SAMPLED // len(calls)), seed)
    warnings.warn(
        "scales of activations depend on how calibration is cut into batches, since the model on one sample "
        f"{why}; batches of the size that the model will be used with are the best",
        stacklevel=9,
    )
    if missing := [name for name in names if name not in samples]:
        raise ValueError(
            f"range_samples must be as many as reach every quantizer, got {sum(call.size for call in calls)}, which do "
            f"not reach {checks.listed(missing)}"
        )
    return samples


def _sampled(model: nn.Module, calls: Iterable[Call], names: list[str], count: int, seed: int) -> dict[str, _Sampled]:
    generator = torch.Generator().manual_seed(seed)
    samples: dict[str, _Sampled] = {}

    def keep(name: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        samples.setdefault(name, _Sampled()).add(first_tensor(args, kwargs, name), count, generator)

    for call in calls:
        observe(model, call, before=keep, names=names)
    return samples


def _sampled_by(
    ranks: Ranks, model: nn.Module, calls: Sequence[Call], names: list[str], count: int, seed: int
) -> dict[str, _Sampled] | None:
    """What :func:`_sampled` gives, each sample read by one of the ranks; None where samples are not read alike.

    A rank makes the draws of others' samples too, as if they were the first, so that its own are those of one process.
    """
    alone = [call.at(torch.tensor([k])) for call in calls for k in range(call.size)]
    generator = torch.Generator().manual_seed(seed)
    reads: list[list[tuple[str, int]]] = []
    samples: dict[str, _Sampled] = {}

    def keep(name: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        x = first_tensor(args, kwargs, name)
        reads[-1].append((name, x.numel()))
        samples.setdefault(name, _Sampled()).add(x, count, generator)

    try:
        for number, call in enumerate(alone):
            if number and number % ranks.size != ranks.rank:
                for _, length in reads[0]:
                    if length > count:
                        _drawn(length, count, generator)
                continue
            reads.append([])
            observe(model, call, before=keep, names=names)
            if number == 0 and ranks.rank:
                samples.clear()
    except Exception:  # whatever the model raises: it runs on batches then, or says so there
        reads.append([])
    alike = all(each == reads[0] for each in reads) and {name for name, _ in reads[0]} == set(names)
    if not all(ranks.gather(alike)) or len({tuple(each) for each in ranks.gather(reads[0])}) > 1:
        return None
    device = next(model.parameters()).device
    found = {name: ranks.gather(samples.get(name, _Sampled()).to("cpu")) for name in names}
    return {name: _in_turn(parts, len(alone)).to(device) for name, parts in found.items()}


def _in_turn(found: Sequence[_Sampled], count: int) -> _Sampled:
    """What ranks have read of ``count`` samples, of which each has every ``len(found)``-th, in the samples' order."""
    calls = sum(len(one.parts) for one in found) // count  # of each sample
    turns = [divmod(number, len(found)) for number in range(count)]
    parts = [part for turn, rank in turns for part in found[rank].parts[turn * calls : (turn + 1) * calls]]
    extremes = torch.cat([one.extremes for one in found if one.extremes is not None])
    return _Sampled(parts, torch.stack(torch.aminmax(extremes)), any(one.cut for one in found))


def _drawn(length: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """``count`` places among ``length``, in order: one at random in each of as many stretches of equal length."""
    start = torch.arange(count, dtype=torch.float64)
    place = (start + torch.rand(count, dtype=torch.float64, generator=generator)) * (length / count)
    return place.long().clamp_(max=length - 1)
