"""AWQ: channels of large inputs get finer steps, by a scale that what comes before a layer takes back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from hdrq import tree
from hdrq.calibrate.least_squares import energy
from hdrq.calibrate.moments import Moments, moments_of_run
from hdrq.calibrate.ranges import SAMPLED, search_again
from hdrq.calibrate.report import LayerReport
from hdrq.calibrate.sequential import PARTS, Fitted, Journal, Unit
from hdrq.methods.layerwise import kind_of, own_name, restore, run_unit, state_of
from hdrq.methods.loss import AT_ONCE, UnitLoss, channel_axis, reported_samples
from hdrq.prepare.observe import observe, version_of
from hdrq.quantizers.layers import QuantizedLayer
from hdrq.quantizers.modules import Quantizer, WeightQuantizer
from hdrq.recipes import Recipe

STEPS = 20  # of alpha in [0, 1), and of the clipping in (½, 1]
SMALLEST = 1e-4  # of the scale of an input
TRIED = 4  # samples on which a fold is proven


@dataclass(frozen=True)
class AWQ:
    """Scale the inputs of linear layers for rounding to nearest, fold that into what comes before, and clip.

    Of the layers that read one tensor, with inputs X, ``a = mean |X|`` over all samples and positions, and Q the
    rounding to nearest at the steps that the largest magnitudes ask for::

        s(α) = max(a^α, 1e-4),  s ← s / √(max s · min s),    α = 0, 1/20, …, 19/20
        the first α with the least Σ_layers ‖(Q(W·diag s)·diag(s)⁻¹ − W)·Xᵀ‖²

    What comes before has its outputs divided by s, and W is multiplied by it, which leaves the unit in full precision
    what it was but for rounding: a norm, or a linear layer, the last in the unit for which that is proven, by trying it
    with powers of two, which move no bit where it is right. If there is none, the layers keep their inputs, and the
    report says so. Then each group of a weight is clipped to ``c·max|w|``, c = 1, 19/20, …, 11/20, the first with the
    least ``‖(Q(clamp(W)) − W)·Xᵀ‖²`` of the group's part of the outputs, which sets its scale; weights with one scale
    for each channel, or one in all, have that as their group.

    Statistics are those of the full-precision stream, as the paper has them. Scales of activations inside a unit of
    which something was folded are searched anew. Convolutions are rounded to nearest, and reported.

    Source: Lin et al., "AWQ", MLSys 2024. Its released code judges α by the outputs of attention or MLP in place of
    the layers' own, does not clip queries and keys, and takes at most 512 tokens for the clipping; here all are taken.
    """

    plan: Recipe
    model: nn.Module  # with its quantizers: what it shares between units cannot be scaled
    seed: int = 0

    fits = PARTS

    @torch.no_grad()
    def fit(self, unit: Unit, journal: Journal) -> Fitted:
        """Leave every weight of a unit finished; see the class."""
        loss, reported = UnitLoss(unit, channel_axis(unit)), reported_samples(unit.count)
        before = loss.measured(reported, AT_ONCE)
        layers = {own_name(unit, layer.name): layer for layer in unit.weights}
        served = {name: layer for name, layer in layers.items() if _is_linear(layer)}
        run = run_unit(unit, unit.full, 0, unit.count)
        inside = f"{unit.name}." if unit.name else ""
        every = self.model.named_parameters(remove_duplicate=False)
        outside = {id(p) for name, p in every if not name.startswith(inside)}
        notes: dict[str, str] = {}
        with _in_float(unit.module):
            moments = moments_of_run(unit.module, run, served)
            nearest = {name: _error(served[name], moments[name]) for name in moments}
            folded = False
            for names in _groups(unit, moments, layers):
                scale = self._scale([served[n] for n in names], moments[names[0]])
                if scale is None:
                    continue
                if _fold(unit, [served[n] for n in names], scale, outside):
                    folded = True
                    for name in names:
                        moments[name].hessian /= scale[:, None] * scale
                else:
                    notes |= dict.fromkeys(names, "its inputs keep their scale: nothing before it can take that back")
            if folded:
                self._search_activations(unit)
        reports = []
        for number, (name, layer) in enumerate(layers.items()):
            if name in moments:
                layer.weight_quantizer.scale.data.copy_(self._clipped(layer, moments[name]))
                error = _error(layer, moments[name])
                reports.append(LayerReport(layer.name, nearest[name], 0.0, error, note=notes.get(name, "")))
            else:
                why = f"rounded to nearest: {kind_of(layer)} is not a linear layer of its own weight, or never ran"
                reports.append(LayerReport(layer.name, note=why))
            layer.settle()
            journal.note(unit, number + 1, len(layers), reports[-1].error)
        after = loss.measured(reported, AT_ONCE)
        return Fitted(state_of(unit), {"loss_before": before, "loss_after": after}, tuple(reports))

    @torch.no_grad()
    def restore(self, unit: Unit, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put back what :meth:`fit` left."""
        restore(unit, tensors)

    def _scale(self, layers: Sequence[QuantizedLayer], moments: Moments) -> torch.Tensor | None:
        """s of the inputs of layers, float32; None for 1 in all of them."""
        mean = (cast(torch.Tensor, moments.magnitudes)[0] / moments.rows).float()
        h, best, found = moments.hessian[0].float(), float("inf"), None
        for step in range(STEPS):
            scale = (mean ** (step / STEPS)).clamp(min=SMALLEST)
            scale = scale / (scale.max() * scale.min()).sqrt()
            total = 0.0
            for layer in layers:
                weight = layer.latent.float()
                scaled = weight * scale
                quantizer = layer.weight_quantizer
                change = _rounded(scaled, _widest(quantizer, scaled), quantizer) / scale - weight
                total += float((change @ h * change).sum())
            if total < best:
                best, found = total, scale if step else None
        return found

    def _clipped(self, layer: QuantizedLayer, moments: Moments) -> torch.Tensor:
        """The scale of each group of a weight, in its quantizer's shape."""
        quantizer, weight = layer.weight_quantizer, layer.latent.float()
        widest = _widest(quantizer, weight)
        if not self.plan.clip:
            return widest
        rows, inputs = weight.shape
        size = quantizer.group_size or inputs
        h = moments.hessian[0].float()
        blocks = torch.stack([h[i : i + size, i : i + size] for i in range(0, inputs, size)])
        best, found = torch.full_like(widest, float("inf")), widest
        for step in range(STEPS // 2):
            scale = widest * (1 - step / STEPS)
            change = (_rounded(weight, scale, quantizer) - weight).view(rows, -1, size).transpose(0, 1)
            errors = (change @ blocks * change).sum(2).T  # (rows, groups)
            errors = errors.sum() if widest.numel() == 1 else errors
            better = errors.reshape(best.shape) < best
            best, found = torch.where(better, errors.reshape(best.shape), best), torch.where(better, scale, found)
        return found

    def _search_activations(self, unit: Unit) -> None:
        own = {
            own_name(unit, n).removesuffix("input_quantizer").removesuffix("."): q for n, q in unit.activations.items()
        }
        count = min(unit.count, self.plan.range_samples)
        calls = -(-count // AT_ONCE)
        search_again(
            unit.module, run_unit(unit, unit.full, 0, count), own, self.plan, max(1, SAMPLED // calls), self.seed
        )


def _is_linear(layer: QuantizedLayer) -> bool:
    return isinstance(layer.module, nn.Linear)


@contextmanager
def _in_float(module: nn.Module) -> Iterator[None]:
    """Inside, every quantizer of a module passes what it is given."""
    quantizers = [each for each in module.modules() if isinstance(each, Quantizer)]
    modes = [each.mode for each in quantizers]
    for each in quantizers:
        each.mode = "float"
    try:
        yield
    finally:
        for each, mode in zip(quantizers, modes, strict=True):
            each.mode = mode


def _widest(quantizer: WeightQuantizer, weight: torch.Tensor) -> torch.Tensor:
    """The scale, in the quantizer's shape, that clips nothing."""
    magnitudes = weight.abs()
    if quantizer.group_size is not None:
        largest = magnitudes.view(len(weight), -1, quantizer.group_size).amax(2)
    else:
        largest = magnitudes.amax() if quantizer.axis is None else magnitudes.amax(1)
    scale = largest * 2 / (quantizer.qmax - quantizer.qmin)
    return torch.where(scale > 0, scale, 1.0).view(quantizer.scale.shape)


def _rounded(weight: torch.Tensor, scale: torch.Tensor, quantizer: WeightQuantizer) -> torch.Tensor:
    step = quantizer.broadcast(scale, weight)
    return (weight / step).round_().clamp_(quantizer.qmin, quantizer.qmax).mul_(step)


def _error(layer: QuantizedLayer, moments: Moments) -> float:
    """The squared error of a layer's outputs, rounded to nearest at the scale that it has."""
    quantizer, weight = layer.weight_quantizer, layer.latent.double()
    return energy(_rounded(weight, quantizer.scale.double(), quantizer) - weight, moments.hessian[0]) / moments.rows


def _groups(unit: Unit, moments: Mapping[str, Any], layers: Mapping[str, QuantizedLayer]) -> list[list[str]]:
    """The linear layers that read one tensor, and read nothing else, in the order in which they run."""
    reads: dict[str, set[tuple[int, int]]] = {}
    alive = []

    def note(name: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        tensors = [x for x in tree.leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        alive.extend(tensors)
        reads.setdefault(name, set()).add((id(tensors[0]), version_of(tensors[0])))

    observe(unit.module, run_unit(unit, unit.full, 0, 1), before=note, names=moments)
    shared = {own_name(unit, layer.name) for layer in unit.layers} - layers.keys()
    groups: dict[frozenset, list[str]] = {}
    for name, read in reads.items():
        if name not in shared:
            groups.setdefault(frozenset(read), []).append(name)
    return list(groups.values())


def _fold(unit: Unit, layers: Sequence[QuantizedLayer], scale: torch.Tensor, outside: set[int]) -> bool:
    """Divide what comes before layers by the scale of their inputs, and multiply their columns; False if nothing can.

    That is the last module that ran before them and whose outputs nothing else hears of. Parameters that other units
    have too (``outside``, by id) stay.
    """
    if any(id(layer.latent) in outside for layer in layers):
        return False
    run = run_unit(unit, unit.full, 0, min(TRIED, unit.count))
    names = [own_name(unit, layer.name) for layer in layers]
    before: list[str] = []
    own = {id(layer.latent) for layer in layers}
    parameters = {name: _outputs_of(m, len(scale)) for name, m in unit.module.named_modules()}
    seen: dict[str, torch.Tensor] = {}

    def ran(name: str, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if name in names:
            seen[name] = output
        elif not seen and parameters[name] and not (own | outside) & {id(p) for p in parameters[name]}:
            before.append(name)

    want = [*_tensors(observe(unit.module, run, after=ran)), *seen.values()]
    powers = torch.ones_like(scale)
    powers[::3], powers[1::3] = 2.0, 0.5
    columns = [layer.latent for layer in layers]
    for name in dict.fromkeys(reversed(before)):
        rows = parameters[name]
        held = [p.clone() for p in (*rows, *columns)]
        seen.clear()
        _scaled(rows, columns, powers)
        got = [*_tensors(observe(unit.module, run, after=ran, names=[*names])), *seen.values()]
        for parameter, value in zip((*rows, *columns), held, strict=True):
            parameter.copy_(value)
        if len(got) == len(want) and all(torch.equal(a, b) for a, b in zip(got, want, strict=True)):
            _scaled(rows, columns, scale)
            return True
    return False


def _scaled(rows: Sequence[torch.Tensor], columns: Sequence[torch.Tensor], scale: torch.Tensor) -> None:
    for parameter in rows:
        parameter.div_(scale.to(parameter.dtype).view(-1, *(1 for _ in parameter.shape[1:])))
    for parameter in columns:
        parameter.mul_(scale.to(parameter.dtype))


def _outputs_of(module: Any, width: int) -> list[torch.Tensor]:
    """The parameters that have a row, or a number, for each output of a norm or a linear layer of this width."""
    weight = module.parametrizations.weight.original if _parametrized(module) else getattr(module, "weight", None)
    kind = isinstance(module, nn.Linear) or (isinstance(weight, torch.Tensor) and weight.ndim == 1)
    if not kind or not isinstance(weight, nn.Parameter) or len(weight) != width:
        return []
    bias = getattr(module, "bias", None)
    return [weight, *([bias] if isinstance(bias, torch.Tensor) else [])]


def _parametrized(module: Any) -> bool:
    return isinstance(getattr(module, "parametrizations", None), nn.ModuleDict) and "weight" in module.parametrizations


def _tensors(output: Any) -> list[torch.Tensor]:
    return [x for x in tree.leaves(output) if isinstance(x, torch.Tensor)]
