"""LSQ: a model whose scales learn with its weights, prepared as :func:`hdrq.quantize` prepares one, and made final."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import nn

from hdrq import checks, recipes
from hdrq.calibrate.data import Call, calibration_calls, check_call, data_hash, first_samples, run_all
from hdrq.calibrate.report import report_of
from hdrq.calibrate.settings import RunSettings
from hdrq.checkpoint.workdir import state_hash
from hdrq.methods.nearest import round_to_nearest
from hdrq.methods.post_training import fit
from hdrq.prepare.coverage import warn_of_float
from hdrq.prepare.float_model import check_module
from hdrq.prepare.observe import observe
from hdrq.quantizers.attach import first_tensor
from hdrq.quantizers.layers import input_quantizers, quantized_layers, weighted_layers
from hdrq.quantizers.modules import Quantizer
from hdrq.quantizers.provenance import origin, set_origin

INITS = ("lsq", "search")
EDGES = (8, "float", "same")
FACTORS = ("tensor", "channel")
LEAVE = 1e3  # no scale goes below this fraction of where it starts
ORIGINAL = ".parametrizations.weight.original"


@torch.inference_mode(False)
@torch.enable_grad()
def prepare(
    model: nn.Module,
    calibration: torch.Tensor | Iterable,
    *,
    bits: str | Mapping[str, str] = "W4A4",
    edges: int | str | None = None,
    per_channel: bool = False,
    init: str = "lsq",
    grad_factor: str = "tensor",
    batchnorm: str = "fold",
    seed: int = 0,
    **knobs: Any,
) -> nn.Module:
    """A copy of a model with LSQ's quantizers on its weights and on what its layers read, to be trained in any loop.

    It goes through what :func:`hdrq.quantize` does before it learns, so quantizers lie where that function puts them,
    and what :func:`convert` makes of the trained model saves, merges, exports and evaluates like any quantized model.
    With v the weight or activation, s its scale, and a range of integers ``[−Q_N, Q_P]``::

        v̂ = s·round(clip(v/s, −Q_N, Q_P))           ∂v̂/∂v = 1 where −Q_N ≤ v/s ≤ Q_P, else 0
        ∂v̂/∂s = g·(round(v/s) − v/s) inside, −g·Q_N below, g·Q_P above           g = 1/sqrt(N·Q_P)

    N counts the elements of the weight, or those of a channel (``grad_factor``); of an activation it counts those of
    one sample, along the first axis, so that g does not depend on how a batch is cut. No scale goes below a thousandth
    of where it starts: it is raised to that before it is used, so it is positive under any optimizer.

    Args:
        model: in evaluation mode, float32; it is left as it was. What does not require gradients stays so.
        calibration: as for :func:`hdrq.quantize`; ranges, signs and scales of activations are taken from it.
        bits: ``"W4A4"``, or patterns of layer names as for :func:`hdrq.quantize`.
        edges: what the first and the last layer that run have where ``bits`` is a string: 8 bits, as LSQ's paper;
            ``"float"``; or the ``"same"`` as the others. None is 8.
        per_channel: a weight scale for each output channel.
        init: scales at the start: ``"lsq"``, ``2·mean|v|/sqrt(Q_P)``, or ``"search"``, our range search.
        grad_factor: what N counts of a weight: the whole ``"tensor"``, as lsq-net, or a ``"channel"``, as MQBench. One
            scale for all makes no difference.
        batchnorm: ``"fold"`` before training, so that the grid that learns is the one that runs at the end; or
            ``"keep"``: it trains, and stays in float in the result.
        seed: of the elements that ranges are searched on.
        knobs: fields of :class:`hdrq.recipes.Recipe` that say where quantizers lie and how ranges are searched:
            ``activation_placement`` (here ``"input"``, where layers read, as LSQ has it), ``attention``,
            ``quantize_input``, ``group_size``, ``norm``, ``candidates``, ``range_samples``, and, with
            ``init="search"``, ``affine_activations``.

    Returns:
        The model in evaluation mode: call ``train()`` on it. Weights are latent: ``hdrq.quantizers.layers`` has them.

    Raises:
        TypeError, ValueError: "X must be …, got …"; a layer whose scale would be zero is named.

    Source: Esser et al., "Learned Step Size Quantization", ICLR 2020 (arXiv 1902.08153).
    """
    checks.choice("init", init, INITS)
    checks.choice("grad_factor", grad_factor, FACTORS)
    checks.choice("batchnorm", batchnorm, ("fold", "keep"))
    seed = checks.integer("seed", seed, 0, 2**63 - 1)
    plan = _plan(init, per_channel, knobs)
    check_module("model", model, bits)
    batches = calibration_calls(calibration)
    check_call(model, batches[0])
    if halves := [name for name, p in model.named_parameters() if p.dtype in (torch.float16, torch.bfloat16)]:
        raise ValueError(
            f"model must be float32 to be trained, got half types in {checks.listed(halves)}; "
            "model.float(), and autocast"
        )
    samples = first_samples(batches, plan.range_samples)
    policy = _with_edges(model, samples, bits, edges)
    with warnings.catch_warnings():
        if batchnorm == "keep":
            warnings.filterwarnings("ignore", "BatchNorm stays")
        quantized, full = fit(
            model,
            batches,
            None,
            plan,
            lambda _: [],
            RunSettings(seed),
            bits=policy,
            blocks=None,
            facts={"fingerprints": {"model": state_hash(model.state_dict()), "calibration": data_hash(batches)}},
            rounds=False,
            folds=batchnorm == "fold",
        )
    warn_of_float(quantized, full, cast(Any, report_of(quantized).coverage), policy)
    facts = {"init": init, "grad_factor": grad_factor, "batchnorm": batchnorm, "edges": edges}
    set_origin(quantized, {**origin(quantized), "qat": facts})
    if init == "lsq":
        _start_scales(quantized, samples)
    for name, quantizer in quantizers(quantized).items():
        quantizer.gradient = "clamp-first"
        quantizer.counts = grad_factor if name.endswith(".weight") else "sample"
        quantizer.floor = quantizer.scale.detach() / LEAVE
    _learn_again(quantized, model)
    return quantized


def convert(model: nn.Module) -> nn.Module:
    """Make a trained model final, in place: each weight goes to its grid, nothing learns. It is as of hdrq.quantize.

    Raises:
        ValueError: it has no quantizers, or a scale or a weight is not finite; the message names it.
    """
    found = quantizers(model)
    if not found:
        raise ValueError(f"model must be prepared by hdrq.qat.prepare, got a plain {type(model).__name__}")
    for name, quantizer in found.items():
        quantizer.raise_scale()
        if not quantizer.scale.isfinite().all():
            raise ValueError(f"scale of {name} must be finite to be converted, got one that is not: training diverged")
        quantizer.gradient, quantizer.counts, quantizer.floor = "round-first", "tensor", None
    for name, layer in quantized_layers(model).items():
        if not layer.latent.isfinite().all():
            raise ValueError(f"weight of {name} must be finite to be converted, got one that is not: training diverged")
    return round_to_nearest(model).eval()


def quantizers(model: nn.Module) -> dict[str, Quantizer]:
    """The quantizers of a model, each once: ``"NAME.weight"`` of layers, ``"NAME.input"`` of what modules read."""
    found: dict[str, Quantizer] = {}
    for name, layer in quantized_layers(model).items():
        if all(layer.weight_quantizer is not other for other in found.values()):
            found[f"{name}.weight"] = layer.weight_quantizer
    return found | {f"{name}.input": quantizer for name, quantizer in input_quantizers(model).items()}


def collapsed(model: nn.Module) -> list[str]:
    """The quantizers of a prepared model that have a scale at its floor, or one that is not finite."""
    found = quantizers(model).items()
    return [
        n for n, q in found if q.floor is not None and not bool((q.scale > q.floor).all() & q.scale.isfinite().all())
    ]


def _plan(init: str, per_channel: bool, knobs: Mapping[str, Any]) -> recipes.Recipe:
    base: dict[str, Any] = {"activation_placement": "input", "affine_activations": False, "per_channel": per_channel}
    taken = {"activation_placement", "attention", "quantize_input", "group_size", "norm", "candidates", "range_samples"}
    for knob in knobs:
        checks.choice("knob", knob, (*sorted(taken), "affine_activations"))
    plan = recipes.recipe(recipes.Recipe("lsq", iterations=0), **{**base, **knobs})
    if init == "lsq" and plan.affine_activations:
        raise ValueError('affine_activations must be False with init="lsq", which knows no zero point; init="search"')
    return plan


def _with_edges(
    model: nn.Module, samples: list[Call], bits: str | Mapping[str, str], edges: int | str | None
) -> str | Mapping[str, str]:
    """``bits`` with what the first and the last layer have written out."""
    if edges is None:
        return bits
    checks.choice("edges", edges, EDGES)
    if not isinstance(bits, str):
        raise ValueError(f"edges must be left out where bits has patterns, which say it, got {edges!r}")
    if edges == 8:
        return bits
    if edges == "same":
        return {"*": bits}
    called: dict[str, None] = {}
    observe(
        model,
        run_all(samples, "model must run on calibration"),
        before=lambda name, *_: called.setdefault(name),
        names=weighted_layers(model),
    )
    if not called:
        raise ValueError("model must run at least one convolution or linear layer on calibration, got none")
    return {next(iter(called)): "float", next(reversed(called)): "float", "*": bits}


@torch.no_grad()
def _start_scales(model: nn.Module, samples: list[Call]) -> None:
    """LSQ's scales: ``2·mean|v|/sqrt(Q_P)``, of weights, and of what is read while everything is in full precision."""
    found = quantizers(model)
    for name, layer in quantized_layers(model).items():
        quantizer, w = layer.weight_quantizer, layer.latent.detach().abs()
        if quantizer.group_size is not None:
            mean = w.unflatten(-1, (-1, quantizer.group_size)).mean(-1)
        elif quantizer.axis is not None:
            mean = w.movedim(quantizer.axis, 0).flatten(1).mean(1)
        else:
            mean = w.mean()
        _start(f"{name}.weight", quantizer, mean)
    read = {name: torch.zeros(2, dtype=torch.float64) for name in input_quantizers(model)}

    def add(name: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        x = first_tensor(args, kwargs, name)
        read[name] += torch.tensor([float(x.abs().sum(dtype=torch.float64)), x.numel()], dtype=torch.float64)

    for each in found.values():
        each.mode = "float"
    observe(model, run_all(samples), before=add, names=read)
    for each in found.values():
        each.mode = "round"
    for name, (total, count) in read.items():
        _start(f"{name}.input", found[f"{name}.input"], (total / count).float())


def _start(name: str, quantizer: Quantizer, mean: torch.Tensor) -> None:
    scale = (2 * mean / quantizer.qmax**0.5).reshape(quantizer.scale.shape)
    if not (scale > 0).all():
        zero = int((scale <= 0).sum())
        raise ValueError(
            f"scale of {name} must be positive, got {zero} of {scale.numel()} that are zero, since all of what it "
            'quantizes is; init="search", or keep that layer in "float"'
        )
    quantizer.scale.data.copy_(scale)


def _learn_again(quantized: nn.Module, model: nn.Module) -> None:
    """Let everything learn but what did not in the model that was given, and integers.

    A parameter of a new name, as of a folded bias, is frozen where all that the innermost module around it had was.
    """
    before = dict(model.named_parameters(remove_duplicate=False))

    def learns(name: str) -> bool:
        name = name.replace(ORIGINAL, ".weight")
        if name in before:
            return before[name].requires_grad
        if ".parametrizations.weight.0." in name or ".input_quantizer." in f".{name}":
            return True
        while name:
            name = name.rpartition(".")[0]
            inside = [p for key, p in before.items() if key.startswith(f"{name}." if name else "")]
            if inside:
                return any(p.requires_grad for p in inside)
        return True

    for name, p in quantized.named_parameters():
        p.requires_grad_(p.is_floating_point() and learns(name))
