"""What share of a model is quantized: of its parameters, and of the multiply-adds of one sample."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import nn

from hdrq import checks
from hdrq.prepare.attention import quantized_operands
from hdrq.prepare.observe import observe
from hdrq.quantizers.bits import matches
from hdrq.quantizers.layers import input_quantizers, quantized_layers

aten = torch.ops.aten
FEW = 0.9  # share of the parameters below which a warning names what stays in full precision
SOME = 0.001  # share of the multiply-adds from which a warning names products of activations in full precision


def _recurrent(x, *weights) -> int:
    return 2 * x[0] * x[1] * sum(prod(w) for w in weights if len(w) == 2)


def _attention(q, k, v) -> int:
    return 2 * prod(q[:3]) * k[2] * (q[3] + v[3])


FORMULAS = {  # of operations that PyTorch's counter does not know, from their shapes: two for each multiply-add
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: _attention(q, k, v),
    aten.mkldnn_rnn_layer: lambda x, inner, hidden, *_, **__: _recurrent(x, inner, hidden),
    aten._cudnn_rnn: lambda x, weights, *_, **__: _recurrent(x, *weights),
    aten._trilinear: lambda x, weight, *_, **__: 2 * x[0] * prod(weight),
    aten.mv: lambda matrix, *_, **__: 2 * prod(matrix),
    aten.addmv: lambda _, matrix, *__, **___: 2 * prod(matrix),
}


@dataclass(frozen=True)
class Coverage:
    """How much of a model is quantized, each as (quantized, all).

    ``parameters`` are numbers that the prepared model holds: a weight that layers share counts once. ``macs`` are the
    multiply-adds of convolutions, matrix products and attentions for one sample; None where they cannot be counted.
    Those of a layer are quantized if its weight is, those of ``q·k`` and of ``softmax·v`` if both operands are.
    ``products`` are the modules that multiply activations outside of layers and of attentions whose operands are known.
    """

    parameters: tuple[int, int]
    macs: tuple[int, int] | None
    products: Mapping[str, int] = field(default_factory=dict, compare=False)  # multiply-adds of a sample, by name

    def __str__(self) -> str:
        parts = [f"{_share(*self.parameters)} of {self.parameters[1]:,} parameters"]
        parts += [] if self.macs is None else [f"{_share(*self.macs)} of {self.macs[1]:,} multiply-adds of a sample"]
        return ", ".join(parts)

    def as_dict(self) -> dict[str, list[int]]:
        """For the manifest."""
        macs = {} if self.macs is None else {"macs": list(self.macs)}
        return {"parameters": list(self.parameters), **macs}

    @classmethod
    def of_dict(cls, facts: Any) -> Coverage | None:
        """What :meth:`as_dict` gave; None for anything else."""
        pairs = [facts.get(name) for name in ("parameters", "macs")] if isinstance(facts, Mapping) else [None]
        counts = [p if isinstance(p, list) and [type(n) for n in p] == [int, int] else None for p in pairs]
        if counts[0] is None:
            return None
        return cls((counts[0][0], counts[0][1]), None if counts[1] is None else (counts[1][0], counts[1][1]))


def coverage(quantized: nn.Module, full: nn.Module, run: Callable, samples: int) -> Coverage:
    """How much of ``quantized`` is; ``run(full)`` runs the same model in full precision on so many samples."""
    weights = _weights(quantized, full)
    every = sum(p.numel() for p in full.parameters() if not checks.whole(p))
    try:
        own, total, products = _macs(quantized, full, run)
        macs, products = (own // samples, total // samples), {name: n // samples for name, n in products.items()}
    except Exception:  # a model may do what no counter understands; that is no reason to refuse it
        macs, products = None, {}
    return Coverage((sum(w.numel() for w in weights.values()), every), macs, products)


def _weights(quantized: nn.Module, full: nn.Module) -> dict[int, nn.Parameter]:
    """The parameters of ``full`` that are quantized in ``quantized``, by identity: layers may share one."""
    weights: list[Any] = [full.get_submodule(name).weight for name in quantized_layers(quantized)]
    return {id(weight): weight for weight in weights}


def _macs(quantized: nn.Module, full: nn.Module, run: Callable) -> tuple[int, int, dict[str, int]]:
    layers, attentions = quantized_layers(quantized), quantized_operands(quantized)
    known = {*layers, *attentions}
    spent, total = multiply_adds(full, run, known)
    own: float = sum(spent[name] for name in layers)
    for name, labels in attentions.items():  # its two products are of one size
        own += spent[name] * (({"q", "k"} <= {*labels}) + ({"softmax", "v"} <= {*labels})) / 2
    weighted = {name for name, module in full.named_modules() if any(p.ndim > 1 for p in module.parameters(False))}
    products = {name: n for name, n in spent.items() if n and name not in known and name not in weighted}
    return round(own), total, products


@torch.no_grad()
def multiply_adds(model: nn.Module, run: Callable, known: Collection[str]) -> tuple[defaultdict[str, int], int]:
    """The multiply-adds of ``run(model)`` that each module does itself, by name, and those of the whole model.

    What modules inside one that is ``known`` do is its own, unless they are known too.
    """
    from torch.utils.flop_counter import FlopCounterMode  # imports triton

    spent: defaultdict[str, int] = defaultdict(int)
    running: list[tuple[str, int]] = []  # whose a call is, and what the counter said when it began

    def enter(name, module, args, kwargs) -> None:
        caller = running[-1][0] if running else ""
        running.append((caller if caller in known and name not in known else name, counter.get_total_flops()))

    def leave(name, module, args, kwargs, output) -> None:
        owner, before = running.pop()
        spent[owner] += (own := counter.get_total_flops() - before)
        if running:
            spent[running[-1][0]] -= own

    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        observe(model, run, before=enter, after=leave)
    return defaultdict(int, {name: n // 2 for name, n in spent.items()}), counter.get_total_flops() // 2


def warn_of_float(quantized: nn.Module, full: nn.Module, found: Coverage, bits: str | Mapping[str, str]) -> None:
    """Warn where much stays in full precision that no pattern ``"float"`` of ``bits`` asks for; name the largest."""
    weights = _weights(quantized, full)
    kept = _kept_float(bits)
    left = {
        name: p.numel()
        for name, p in full.named_parameters()
        if p.ndim > 1 and id(p) not in weights and not checks.whole(p) and not any(matches(name, k) for k in kept)
    }
    if sum(left.values()) <= (1 - FEW) * found.parameters[1]:
        return
    largest = sorted(left, key=lambda name: -left[name])
    shown = checks.listed(f"{name!r} ({left[name]:,})" for name in largest)
    warnings.warn(
        f"{_share(*found.parameters)} of the parameters are quantized; the largest of the others are {shown}, in no "
        'layer of a known class that calibration reaches; bits={"NAME": "float", …} says that this is meant',
        stacklevel=6,
    )


def warn_of_products(quantized: nn.Module, found: Coverage, bits: str | Mapping[str, str]) -> None:
    """Warn of products of activations whose operands nothing quantizes, in a model that quantizes activations.

    Those in modules that a pattern ``"float"`` of ``bits`` asks for are left out. So is a module that holds a matrix
    itself: the counter does not tell its products of activations from those of the matrix.
    """
    if found.macs is None or not input_quantizers(quantized):
        return
    kept, least = _kept_float(bits), SOME * found.macs[1]
    large = {name: n for name, n in found.products.items() if n >= least and not any(matches(name, k) for k in kept)}
    if large:
        shown = checks.listed(repr(name or "the model itself") for name in sorted(large, key=lambda name: -large[name]))
        warnings.warn(
            f"{_share(sum(large.values()), found.macs[1])} of the multiply-adds are products of activations that stay "
            f"in full precision, in {shown}: attentions of an unknown structure; attention=False, or the pattern "
            '"float", says that it is meant',
            stacklevel=6,
        )


def _kept_float(bits: str | Mapping[str, str]) -> list[str]:
    """The patterns that ask for full precision."""
    return [pattern for pattern, text in bits.items() if text == "float"] if isinstance(bits, Mapping) else []


def _share(part: int, whole: int) -> str:
    return f"{part / max(whole, 1):.1%}"
