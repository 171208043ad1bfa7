"""How much the bits of each weight matter to the model's output, and which bits are best for a given size."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from hdrq import checks
from hdrq.calibrate.data import Call, calibration_calls, check_call, first_samples, run_all
from hdrq.calibrate.placement import Placement, place_quantizers
from hdrq.calibrate.ranges import search_weight
from hdrq.errors import MissingExtra
from hdrq.evaluate.metrics import logits_of
from hdrq.prepare.coverage import multiply_adds
from hdrq.prepare.float_model import check_module
from hdrq.prepare.prepared import Prepared, prepare
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
        error: the output's relative squared error with several weights rounded at once; it takes ``{layer: bits}``.
    """

    layers: tuple[LayerSensitivity, ...]
    budget: float
    error: Callable[[Mapping[str, int]], float] = field(repr=False)
    _text: Callable[[Mapping[str, int]], dict[str, str]] = field(repr=False)

    def assign(self, budget: float | None = None, cost: str = "weights") -> dict[str, int]:
        """The bits of each layer whose summed errors are the least for at most ``budget`` bits in the mean::

            minimize Σ_l e_l(b_l)   subject to   Σ_l c_l·b_l ≤ budget·Σ_l c_l

        Errors of layers are added up, as if they were independent; :attr:`error` tells what they are together. The
        integer program is solved to its optimum, by HiGHS through scipy.

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
        """``Σ_l c_l·b_l / Σ_l c_l`` of an assignment."""
        costs = [getattr(layer, checks.choice("cost", cost, COSTS)) for layer in self.layers]
        spent = sum(c * widths[layer.layers[0]] for c, layer in zip(costs, self.layers, strict=True))
        return spent / max(sum(costs), 1)

    def bits(self, widths: Mapping[str, int]) -> dict[str, str]:
        """An assignment as ``bits`` of :func:`hdrq.quantize`: every layer by name, activations as they were given."""
        return self._text(widths)


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
) -> Sensitivity:
    """:func:`sensitivity` once its arguments are checked."""
    each = sorted({checks.bits("widths", width) for width in widths})
    if not each:
        raise ValueError("widths must be one or more, got none")
    calls = first_samples(batches, checks.integer("samples", samples, 1, 2**31))
    probe = _Probe(model, calls, plan, bits)
    found = []
    for done, names in enumerate(probe.groups):
        if progress is not None:
            progress(done, len(probe.groups), names[0])
        errors = {width: probe.error({names[0]: width}) for width in each}
        weight = probe.layer(names[0]).weight
        found.append(LayerSensitivity(names, weight.numel(), sum(probe.macs[n] for n in names), errors))
    return Sensitivity(tuple(found), probe.budget, probe.error, probe.text)


def chosen_bits(
    model: nn.Module, batches: list[Call], plan: Recipe, bits: str | Mapping[str, str]
) -> str | Mapping[str, str]:
    """``bits`` with the widths of every layer where a budget is asked for; as they are where none is.

    Raises:
        ValueError: the budget cannot be met.
    """
    if budget_of(bits) is None:
        return bits
    found = measure(model, batches, plan, bits)
    return found.bits(found.assign())


def _without_budget(bits: str | Mapping[str, str]) -> str | Mapping[str, str]:
    """``bits`` with 8-bit weights where they are to be chosen."""

    def known(text: str) -> str:
        return f"W8A{Budget.parse(text).activation}" if is_automatic(text) else text

    return known(bits) if isinstance(bits, str) else {pattern: known(text) for pattern, text in bits.items()}


class _Probe:
    """A model in full precision some of whose weights can be rounded, and what it returned before."""

    def __init__(self, model: nn.Module, calls: list[Call], plan: Recipe, bits: str | Mapping[str, str]) -> None:
        budget = budget_of(bits)
        if budget is None:
            raise ValueError(f'bits must ask for a budget, like "auto:4.5", for some layer, got {bits!r}')
        self.budget, run = budget.weight, run_all(calls, "model must run on calibration")
        self.plan, self.given, self.run = plan, bits, run
        ready = prepare(model, run_all(calls[:1]), run, _without_budget(bits), attention=plan.attention)
        self.full = ready.full
        self.placement = _placement(ready, run, plan, _without_budget(bits))
        reached = {name: self.layer(name) for name in self.placement.layers}
        tied = {name: tuple(names) for names in shared_weights(reached) for name in names}
        free = [name for name in reached if is_automatic(self._text_of(name))]
        self.groups = list(dict.fromkeys(tied.get(name, (name,)) for name in free))
        if not self.groups:
            raise ValueError(f"bits must have a budget for a layer that calibration reaches, got {bits!r}")
        self.outputs = [logits_of(y, "output of the model").double() for y in run(self.full)]
        self.macs = self._multiply_adds(list(reached), sum(call.size for call in calls))

    def layer(self, name: str) -> Any:
        return self.full.get_submodule(name)

    def error(self, widths: Mapping[str, int]) -> float:
        """``Σ‖y_q − y‖² / Σ‖y‖²`` with the weights of ``widths`` rounded."""
        with self._rounded(widths):
            outputs = [logits_of(y, "output of the model").double() for y in self.run(self.full)]
        wrong = sum(float((a - b).square().sum()) for a, b in zip(outputs, self.outputs, strict=True))
        return wrong / max(sum(float(y.square().sum()) for y in self.outputs), 1e-300)

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
        """``bits`` that name every layer that is reached; then the patterns that were given, for modules of others."""
        texts = {}
        for name, own in self.placement.layers.items():
            if name in widths and own is not None:
                read = self.placement.inputs.get(name, (name, own.activation))[1]
                texts[name] = f"W{widths[name]}A{read}"
            else:
                texts[name] = "float" if own is None else f"W{own.weight}A{own.activation}"
        given = _without_budget(self.given)
        return texts if isinstance(given, str) else {**texts, **{k: v for k, v in given.items() if k not in texts}}

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


def _placement(ready: Prepared, run: Callable, plan: Recipe, bits: str | Mapping[str, str]) -> Placement:
    where = (plan.activation_placement, plan.quantize_input)
    return place_quantizers(ready.quantized, run, bits, *where, ready.units, ready.operands)


def _least(costs: Sequence[int], errors: Sequence[Mapping[int, float]], budget: float) -> list[int]:
    """One width of each mapping, with the least summed errors whose summed costs keep within the budget."""
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import coo_array
    except ImportError as error:
        raise MissingExtra('a choice of bits needs scipy; pip install "hdrq[cli]"') from error
    pairs = [(row, width) for row, own in enumerate(errors) for width in own]
    values = [errors[row][width] for row, width in pairs]
    largest = max(values) or 1.0
    rows = [row for row, _ in pairs] + [len(errors)] * len(pairs)
    columns = [*range(len(pairs))] * 2
    total = sum(costs)
    spent = [1.0] * len(pairs) + [costs[row] * width / total for row, width in pairs]
    matrix = coo_array((spent, (rows, columns)), shape=(len(errors) + 1, len(pairs)))
    once = [1.0] * len(errors)
    within = LinearConstraint(matrix.tocsr(), [*once, -float("inf")], [*once, budget])
    options = {"mip_rel_gap": 0.0}
    scaled = [value / largest for value in values]
    result = milp(scaled, constraints=within, integrality=[1] * len(pairs), bounds=Bounds(0, 1), options=options)
    if not result.success:
        raise ValueError(f"budget must be one that can be met, got {budget}: {result.message}")
    return [width for (_, width), taken in zip(pairs, result.x, strict=True) if taken > 0.5]
