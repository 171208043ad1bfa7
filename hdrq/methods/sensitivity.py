"""How much the bits of each weight matter to the model's output, and which bits are best for a given size."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from glob import escape
from typing import Any

import numpy as np
import torch
from torch import nn

from hdrq import checks
from hdrq.calibrate.data import Call, calibration_calls, check_call, first_samples, run_all
from hdrq.calibrate.placement import place_quantizers
from hdrq.calibrate.ranges import reaching_samples, search_weight
from hdrq.checkpoint.workdir import CHOSEN
from hdrq.checks import listed
from hdrq.errors import MissingExtra
from hdrq.evaluate.metrics import floats_of
from hdrq.prepare.coverage import multiply_adds
from hdrq.prepare.float_model import check_module
from hdrq.prepare.offload import Offload
from hdrq.prepare.prepared import prepare
from hdrq.quantizers.bits import Budget, budget_of, check_bits, is_automatic, matches
from hdrq.quantizers.layers import shared_weights
from hdrq.recipes import Recipe
from hdrq.recipes import recipe as make_recipe

WIDTHS = (2, 3, 4, 5, 6, 8)
COSTS = ("weights", "macs")


@dataclass(frozen=True)
class LayerSensitivity:
    """What rounding one weight does to the output of a model whose other weights and activations are in float."""

    layers: tuple[str, ...]  # one, or all that share the weight
    weights: int  # elements
    macs: int  # multiply-adds for a sample, of all these layers
    errors: dict[int, float]  # bits: Σ‖y_q − y‖² / Σ‖y‖² of the output


@dataclass(frozen=True)
class Sensitivity:
    """What :func:`sensitivity` measured.

    Attributes:
        layers: the weights whose bits can be chosen, in the order of execution.
        budget: the mean bits that were asked for.
    """

    layers: tuple[LayerSensitivity, ...]
    budget: float
    _error: Callable[[Mapping[str, int]], float] = field(repr=False)
    _text: Callable[[Mapping[str, int]], dict[str, str]] = field(repr=False)

    def assign(self, budget: float | None = None, cost: str = "weights") -> dict[str, int]:
        """The bits of each layer whose summed errors are the least for at most ``budget`` bits in the mean::

            minimize Σ_l e_l(b_l)   subject to   Σ_l c_l·b_l ≤ budget·Σ_l c_l

        Errors of layers are added up, as if they were independent; :meth:`error` tells what they are together. HiGHS
        solves the integer program, through scipy, to within 1e-6 of the least sum.

        Args:
            budget: bits of a weight, or of the weight in a multiply-add, in the mean; None for what was asked for.
            cost: c_l, ``"weights"`` for a budget of size, ``"macs"`` for one of operations.

        Raises:
            ValueError: fewer bits than the narrowest width that was measured; multiply-adds could not be counted.
            MissingExtra: scipy is not installed.
        """
        checks.choice("cost", cost, COSTS)
        costs = [getattr(layer, cost) for layer in self.layers]
        if not any(costs):
            raise ValueError('cost must be "weights" for this model, got "macs", which could not be counted in it')
        narrowest = min(self.layers[0].errors)
        budget = self.budget if budget is None else budget
        checks.real("budget", budget, narrowest)
        chosen = _least(costs, [layer.errors for layer in self.layers], budget)
        return {name: bits for layer, bits in zip(self.layers, chosen, strict=True) for name in layer.layers}

    def mean_bits(self, widths: Mapping[str, int], cost: str = "weights") -> float:
        """``Σ_l c_l·b_l / Σ_l c_l`` of an assignment, which has all layers."""
        costs = [getattr(layer, checks.choice("cost", cost, COSTS)) for layer in self.layers]
        chosen = self._whole(widths)
        return sum(c * chosen[layer.layers[0]] for c, layer in zip(costs, self.layers, strict=True)) / max(
            sum(costs), 1
        )

    def bits(self, widths: Mapping[str, int]) -> dict[str, str]:
        """An assignment of all layers as ``bits`` of :func:`hdrq.quantize`, activations as they were given.

        Raises:
            ValueError: a layer without bits, or one that was not measured; bits outside [2, 16].
        """
        return self._text(self._whole(widths))

    def error(self, widths: Mapping[str, int]) -> float:
        """The output's relative squared error with several weights rounded at once.

        Raises:
            ValueError: a layer that was not measured; bits outside [2, 16].
        """
        return self._error(_checked(widths, self.layers))

    def _whole(self, widths: Mapping[str, int]) -> dict[str, int]:
        chosen = _checked(widths, self.layers)
        if missing := [name for layer in self.layers for name in layer.layers if name not in chosen]:
            raise ValueError(f"widths must have every layer that was measured, got none for {listed(missing)}")
        return chosen


def sensitivity(
    model: nn.Module,
    calibration: torch.Tensor | Iterable,
    recipe: str | Recipe = "hdrq",
    *,
    bits: str | Mapping[str, str] = "auto:4",
    widths: Sequence[int] = WIDTHS,
    samples: int = 128,
    preset: str = "paper",
    progress: Callable[[int, int, str], None] | None = None,
    **knobs,
) -> Sensitivity:
    """Round one weight after the other, to the nearest point of its grid, and measure what that does to the output.

    Activations stay in float, BatchNorm is folded. What a recipe that learns makes of few bits is better than this, in
    all layers; which layers need more bits is assumed to be the same.

    Args:
        model: in evaluation mode; it is left as it was.
        calibration: as :func:`hdrq.quantize` takes it.
        recipe, preset, knobs: whose scales are searched: one for a weight, for a channel or for a group.
        bits: ``"auto:4.5"``, or patterns of which some have that: their layers are measured. ``"auto:W4.5A4"`` has
            4-bit activations in :meth:`Sensitivity.bits`.
        widths: bits of weights, 2 to 16 each.
        samples: of ``calibration``, at most. The model runs on them once for each layer and each width.
        progress: called with the number of layers that are measured, of how many, and the name of the next.

    Raises:
        TypeError, ValueError: "X must be …, got …".
    """
    plan = make_recipe(recipe, preset, **knobs)
    check_bits(bits)
    check_module("model", model, bits)
    batches = calibration_calls(calibration)
    check_call(model, batches[0])
    return measure(model, batches, plan, bits, widths, samples, progress)


def measure(
    model: nn.Module,
    batches: list[Call],
    plan: Recipe,
    bits: str | Mapping[str, str],
    widths: Sequence[int] = WIDTHS,
    samples: int = 128,
    progress: Callable[[int, int, str], None] | None = None,
    offload: Offload | None = None,
) -> Sensitivity:
    """:func:`sensitivity` once its arguments are checked."""
    if not isinstance(widths, Sequence):
        raise TypeError(f"widths must be a sequence of bits, got {type(widths).__name__}")
    each = sorted({checks.bits("widths", width) for width in widths})
    if not each:
        raise ValueError("widths must be one or more, got none")
    probe = _Probe(model, batches, checks.integer("samples", samples, 1, 2**31), plan, bits, offload)
    checks.real("budget", probe.budget, min(each))
    found = []
    for done, names in enumerate(probe.groups):
        if progress is not None:
            progress(done, len(probe.groups), names[0])
        errors = {width: probe.error({names[0]: width}) for width in each}
        weight = probe.layer(names[0]).weight
        found.append(LayerSensitivity(names, weight.numel(), sum(probe.macs[n] for n in names), errors))
    if unheard := [layer.layers[0] for layer in found if not any(layer.errors.values())]:
        warnings.warn(
            f"the output of the model does not depend on the weights of {listed(unheard)}, which get the fewest bits",
            stacklevel=3,
        )
    return Sensitivity(tuple(found), probe.budget, probe.error, probe.text)


def chosen_bits(
    model: nn.Module,
    batches: list[Call],
    plan: Recipe,
    bits: str | Mapping[str, str],
    begun: Mapping[str, Any] | None = None,
    offload: Offload | None = None,
) -> dict[str, str]:
    """The bits of every layer under the budget of ``bits``.

    Args:
        begun: what the run that goes on began with, whose bits are taken without another measurement.
        offload: where the weights of copies lie; None for memory.

    Raises:
        ValueError: the budget cannot be met.
        MissingExtra: scipy is not installed.
    """
    if begun is not None and CHOSEN in begun:
        return dict(begun[CHOSEN])
    solver()  # missing, it is told before anything is measured
    found = measure(model, batches, plan, bits, offload=offload)
    return found.bits(found.assign())


def _without_budget(bits: str | Mapping[str, str]) -> str | Mapping[str, str]:
    """``bits`` with 8-bit weights where they are to be chosen."""

    def known(text: str) -> str:
        return f"W8A{Budget.parse(text).activation}" if is_automatic(text) else text

    return known(bits) if isinstance(bits, str) else {pattern: known(text) for pattern, text in bits.items()}


class _Probe:
    """A model in full precision some of whose weights can be rounded, and what it returned before."""

    def __init__(
        self,
        model: nn.Module,
        batches: list[Call],
        samples: int,
        plan: Recipe,
        bits: str | Mapping[str, str],
        offload: Offload | None,
    ) -> None:
        budget = budget_of(bits)
        if budget is None:
            raise ValueError(f'bits must ask for a budget, like "auto:4.5", for some layer, got {bits!r}')
        self.budget, self.plan, self.given = budget.weight, plan, bits
        reaching = run_all(reaching_samples(batches, plan))  # as a run takes them, so that it meets the same layers
        first = run_all(batches[:1], "model must run on calibration")
        ready = prepare(model, first, reaching, _without_budget(bits), attention=plan.attention, offload=offload)
        self.full = ready.full
        where = (_without_budget(bits), plan.activation_placement, plan.quantize_input, ready.units, ready.operands)
        self.placement = place_quantizers(ready.quantized, reaching, *where)
        reached = {name: self.layer(name) for name in self.placement.layers}
        tied = {name: tuple(names) for names in shared_weights(reached) for name in names}
        free = [name for name in reached if is_automatic(self._text_of(name))]
        self.groups = list(dict.fromkeys(tied.get(name, (name,)) for name in free))
        if fixed := [name for names in self.groups for name in names if name not in free]:
            raise ValueError(
                f"bits must have a budget for all layers that share a weight, or for none, got widths for "
                f"{listed(fixed)} and a budget for others"
            )
        if not self.groups:
            raise ValueError(f"bits must have a budget for a layer that calibration reaches, got {bits!r}")
        calls = first_samples(batches, samples)
        self.run = run_all(calls)
        self.outputs = self._measured()
        self.macs = self._multiply_adds(list(reached), sum(call.size for call in calls))

    def layer(self, name: str) -> Any:
        return self.full.get_submodule(name)

    def error(self, widths: Mapping[str, int]) -> float:
        """``Σ‖y_q − y‖² / Σ‖y‖²`` with the weights of ``widths`` rounded."""
        with self._rounded(widths):
            outputs = self._measured()
        wrong = sum(float((a - b)[a != b].square().sum()) for a, b in zip(outputs, self.outputs, strict=True))
        size = sum(float(y[y.isfinite()].square().sum()) for y in self.outputs)  # −∞ in both is a mask
        if not math.isfinite(wrong):
            raise ValueError(
                f"output of the model must stay finite where {listed(widths)} is rounded, got a number that is "
                'not; keep that in "float", or give other widths'
            )
        return wrong / max(size, 1e-300)

    def _measured(self) -> list[torch.Tensor]:
        """What the model returns for all calls, one after another."""
        found = [y.double() for output in self.run(self.full) for y in floats_of(output)]
        if not found:
            raise ValueError("output of the model must hold a floating-point tensor to be measured, got none")
        return found

    @contextmanager
    def _rounded(self, widths: Mapping[str, int]) -> Iterator[None]:
        before: dict[int, tuple[nn.Parameter, torch.Tensor]] = {}
        try:
            for name, width in widths.items():
                weight = self.layer(name).weight
                if id(weight) not in before:
                    quantizer = search_weight(name, self.layer(name), width, self.plan)
                    before[id(weight)] = weight, weight.data
                    weight.data = quantizer.rounded(weight.data).to(weight.dtype)
            yield
        finally:
            for weight, data in before.values():
                weight.data = data

    def text(self, widths: Mapping[str, int]) -> dict[str, str]:
        """``bits`` that name every layer that is reached, those inside another before it; then patterns of others."""
        texts = {}
        for name in sorted(self.placement.layers, key=lambda name: -name.count(".")):
            own = self.placement.layers[name]
            if own is None:
                texts[escape(name)] = "float"
            else:
                read = self.placement.reads[name]
                texts[escape(name)] = f"W{widths.get(name, own.weight)}A{own.activation if read is None else read}"
        given = {} if isinstance(self.given, str) else self.given
        return texts | {k: text for k, text in given.items() if k not in texts and not is_automatic(text)}

    def _text_of(self, name: str) -> str:
        """What ``bits`` says of a layer."""
        if isinstance(self.given, str):
            return self.given
        return next(text for pattern, text in self.given.items() if matches(name, pattern))

    def _multiply_adds(self, names: Sequence[str], samples: int) -> dict[str, int]:
        try:
            spent, _ = multiply_adds(self.full, self.run, names)
        except Exception as error:  # a model may do what no counter understands; sizes are known nevertheless
            warnings.warn(f"multiply-adds could not be counted: {type(error).__name__}: {error}", stacklevel=5)
            return dict.fromkeys(names, 0)
        return {name: spent[name] // samples for name in names}


def _checked(widths: Mapping[str, int], layers: Sequence[LayerSensitivity]) -> dict[str, int]:
    """An assignment of layers that were measured."""
    known = dict.fromkeys(name for layer in layers for name in layer.layers)
    if unknown := [repr(name) for name in widths if name not in known]:
        raise ValueError(f"widths must be of layers that were measured, got {listed(unknown)}; layers: {listed(known)}")
    return {name: checks.bits(f"widths of {name}", width) for name, width in widths.items()}


def solver() -> Any:
    """scipy's optimizers.

    Raises:
        MissingExtra: it is not installed.
    """
    try:
        from scipy import optimize
    except ImportError as error:
        raise MissingExtra('a choice of bits needs scipy; pip install "hdrq[cli]"') from error
    return optimize


def _least(costs: Sequence[int], errors: Sequence[Mapping[int, float]], budget: float) -> list[int]:
    """One width of each mapping, with the least summed errors whose summed costs keep within the budget.

    It is solved twice: HiGHS' tolerances are absolute, and the first solution says which errors are too large to be in
    the best, so that the others can be scaled by what the best may be.
    """
    pairs = [(row, width) for row, own in enumerate(errors) for width in own]
    largest = max(errors[row][width] for row, width in pairs)
    for _ in range(2):
        chosen = _solved(costs, errors, pairs, budget, largest or 1.0)
        largest = sum(errors[row][width] for row, width in chosen)
        pairs = [(row, width) for row, width in pairs if errors[row][width] <= largest]
    return [width for _, width in chosen]


def _solved(costs, errors, pairs: list[tuple[int, int]], budget: float, unit: float) -> list[tuple[int, int]]:
    optimize, total = solver(), sum(costs)
    once = np.zeros((len(errors) + 1, len(pairs)))
    once[[row for row, _ in pairs], range(len(pairs))] = 1.0
    once[-1] = [costs[row] * width / total for row, width in pairs]
    low, high = [*[1.0] * len(errors), -np.inf], [*[1.0] * len(errors), budget]
    result = optimize.milp(
        [errors[row][width] / unit for row, width in pairs],
        constraints=optimize.LinearConstraint(once, low, high),
        integrality=np.ones(len(pairs)),
        bounds=optimize.Bounds(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    if not result.success:
        raise ValueError(f"budget must be one that can be met, got {budget}: {result.message}")
    return [pair for pair, taken in zip(pairs, result.x, strict=True) if taken > 0.5]
