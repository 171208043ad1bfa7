"""Merging whole quantized models, on their integers."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn

from hdrq import checks, ops
from hdrq.model import input_quantizers, origin, quantized_layers, set_origin
from hdrq.rng import rng_state


@torch.no_grad()
def merge(
    models: Sequence[nn.Module],
    *,
    weights: Sequence[float] | None = None,
    draws: int = 30,
    seed: int = 0,
    noise: str = "all",
) -> nn.Module:
    """Average quantized models into one, with no data and no training; only integers, scales and biases are read.

    Each weight is merged by :func:`hdrq.ops.merge`, layer by layer. Scales of activations, biases and every other
    floating-point parameter and buffer are averaged with the same weights λ, in float64, rounded once; integer buffers
    must agree, but for BatchNorm's count of batches.

    Args:
        models: two or more results of :func:`hdrq.quantize`, of one architecture and one bit policy; left as they are.
        weights: λ, not negative, summing to 1; None for equal ones.
        draws: roundings tried for each weight, of which the best aligned is kept.
        seed: of the noise; stream 64·i serves the i-th layer.
        noise: ``"all"``, ``"odd"`` (means nearer to a tie than to an integer) or ``"none"`` (half to even).

    Returns:
        A model of the class of the first.

    Raises:
        TypeError, ValueError: "X must be …, got …"; models that differ are refused with what differs.
    """
    models = list(models)
    checks.integer("the number of models", len(models), 2, 64)
    seed = checks.integer("seed", seed, 0, 2**63 - 1)
    lam = checks.mixing_weights(weights, len(models))
    _check_alike(models)
    merged = copy.deepcopy(models[0])
    how = {
        "folded": origin(models[0])["folded"],
        "merge": {"weights": lam, "draws": draws, "seed": seed, "noise": noise},
        "models": [origin(model) for model in models],
    }
    set_origin(merged, how)
    _merge_ranges(merged, models, lam)
    _average_floats(merged, models, lam)
    layers = [quantized_layers(model) for model in models]
    for i, (name, target) in enumerate(quantized_layers(merged).items()):
        inputs = [each[name] for each in layers]
        quantizer = target.weight_quantizer
        result = ops.merge(
            [layer.weight_quantizer.codes(layer.latent) for layer in inputs],
            [layer.weight_quantizer.scale for layer in inputs],
            quantizer.qmin,
            quantizer.qmax,
            rng_state(seed, stream=64 * i, device=quantizer.scale.device),
            weights=lam,
            draws=draws,
            noise=noise,
            axis=quantizer.axis,
        )
        quantizer.scale.copy_(result.scale.reshape(quantizer.scale.shape))
        target.latent.copy_(quantizer.values(result.codes))
    return merged


@torch.no_grad()
def average(
    models: Sequence[nn.Module], weights: Sequence[float] | None = None, *, extrapolate: bool = False
) -> nn.Module:
    """The plain weighted average of models, parameters and buffers: what merging aims at, in full precision.

    Raises:
        TypeError, ValueError: "X must be …, got …"; weights that are negative, but to ``extrapolate``.
    """
    models = list(models)
    checks.integer("the number of models", len(models), 1, 64)
    lam = checks.mixing_weights(weights, len(models), extrapolate)
    shapes = [{name: tuple(value.shape) for name, value in model.state_dict().items()} for model in models]
    for k, other in enumerate(shapes):
        if other != shapes[0]:
            wrong = sorted(name for name, _ in other.items() ^ shapes[0].items())
            raise ValueError(f"models must have one architecture, got number {k} different in {', '.join(wrong[:10])}")
    merged = copy.deepcopy(models[0])
    _average_floats(merged, models, lam)
    return merged


def _merge_ranges(merged: nn.Module, models: list[nn.Module], lam: Sequence[float]) -> None:
    """A range of integers that has a zero point inside, ``[−z, 2^b − 1 − z]``, lies where the merged values do:
    ``low* = round(Σ λ_k·s_k·low_k / Σ λ_k·s_k)``, its width as it is. Equal ranges stay."""
    inputs = [list(input_quantizers(model).values()) for model in models]
    for target, *own in zip(input_quantizers(merged).values(), *inputs, strict=True):
        steps = [w * float(each.scale) for w, each in zip(lam, own, strict=True)]
        low = round(sum(step * each.qmin for step, each in zip(steps, own, strict=True)) / sum(steps))
        target.qmin, target.qmax = low, low + target.qmax - target.qmin


def _average_floats(merged: nn.Module, models: list[nn.Module], lam: Sequence[float]) -> None:
    states = [model.state_dict() for model in models]
    for name, value in merged.state_dict().items():
        if value.is_floating_point():
            value.copy_(sum(w * state[name].double() for w, state in zip(lam, states, strict=True)))


def _check_alike(models: list[nn.Module]) -> None:
    for k, model in enumerate(models):
        if not isinstance(model, nn.Module):
            raise TypeError(f"models must be torch.nn.Modules, got {type(model).__name__} as number {k}")
        if not quantized_layers(model) or not origin(model):
            raise ValueError(
                f"models must be results of hdrq.quantize, got a plain {type(model).__name__} as number {k}"
            )
    first = _description(models[0])
    for k, model in enumerate(models[1:], start=1):
        other = _description(model)
        wrong = [
            f"{name} ({first.get(name, 'missing')} in the first, {other.get(name, 'missing')} in number {k})"
            for name in dict.fromkeys((*first, *other))
            if first.get(name) != other.get(name)
        ]
        theirs = _integers(model)
        wrong += [
            f"{name} (other integers)"
            for name, value in _integers(models[0]).items()
            if name in theirs and not torch.equal(value, theirs[name])
        ]
        if wrong:
            more = f" and {len(wrong) - 10} more" if len(wrong) > 10 else ""
            raise ValueError(f"models must be alike to be merged, got {'; '.join(wrong[:10])}{more}")


def _integers(model: nn.Module) -> dict[str, torch.Tensor]:
    """What cannot be averaged, but for BatchNorm's count of batches, which nothing reads here."""
    state = model.state_dict().items()
    return {n: v for n, v in state if not v.is_floating_point() and not n.endswith("num_batches_tracked")}


def _description(model: nn.Module) -> dict:
    """What must agree between models: shapes, dtypes and ranges."""
    facts: dict = {name: f"{tuple(v.shape)} {v.dtype}" for name, v in model.state_dict().items()}
    for name, layer in quantized_layers(model).items():
        weight = layer.weight_quantizer
        facts[f"{name}: weight range"] = (weight.qmin, weight.qmax, weight.axis)
    for name, activation in input_quantizers(model).items():
        facts[f"{name}: input levels"] = activation.qmax - activation.qmin + 1
    return facts
