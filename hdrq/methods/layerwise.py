"""Layer after layer in closed form, from inputs behind all that is finished: GPTQ, and least squares of experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from hdrq import checks
from hdrq.calibrate.cache import Rows
from hdrq.calibrate.gptq import DAMPING, gptq
from hdrq.calibrate.least_squares import anchored, energy
from hdrq.calibrate.moments import Moments, moments_of_run
from hdrq.calibrate.report import LayerReport
from hdrq.calibrate.sequential import PARTS, Fitted, Journal, Unit
from hdrq.methods.loss import AT_ONCE, UnitLoss, channel_axis, reported_samples
from hdrq.prepare.observe import observe
from hdrq.quantizers.layers import QuantizedLayer
from hdrq.quantizers.modules import WeightQuantizer

WEIGHTINGS = ("count", "norm")
TARGETS = ("mean", "experts")  # of a merge: the mean of the weights, or what has the outputs of every model
BIASES = ("keep", "solve")
KINDS = "a linear layer or a convolution with the forward of its class"


class Target(NamedTuple):
    """What an expert has in the place of a layer."""

    weight: torch.Tensor
    bias: torch.Tensor | None


@dataclass(frozen=True)
class LayerWise:
    """Round each layer of a unit by GPTQ, or to the least squares of several experts first.

    Layers are taken in the order in which they run. A layer's inputs are what it reads behind everything that is
    finished: the quantized units, and the quantized layers before it in its own. One layer's second moments are in
    memory at a time, K² float64 for each task.

    Args:
        damping, act_order: of :func:`hdrq.calibrate.gptq.gptq`.
        tasks: the first sample of each task, and the one after its last; None for one task.
        experts: for each task, its expert's layers, by name; None: every target is the model itself.
        lam: see :func:`hdrq.calibrate.least_squares.anchored`.
        weighting: a_t: ``"count"``, 1 over the task's rows, or ``"norm"``, 1 over the Frobenius norm of its moments.
        solve_bias: whether biases are solved for with the weights, as the weight of an input that is always 1.
        moments: where they come from elsewhere than the unit's own inputs: of each task, of a unit's layer by name.
        search: gives a weight's quantizer the scale for what it now is; not called where nothing has moved it.
        rounds: whether weights are rounded at all.
    """

    damping: float
    act_order: bool
    tasks: Sequence[tuple[int, int]] | None = None
    experts: Sequence[Mapping[str, Target]] | None = None
    lam: float = 0.0
    weighting: str = "count"
    solve_bias: bool = False
    moments: Callable[[Unit, str], list[Moments] | None] | None = None
    search: Callable[[WeightQuantizer, torch.Tensor], None] | None = None
    rounds: bool = True

    @property
    def fits(self) -> tuple[str, ...]:
        """Weights, and where they are rounded the activations too, whose scales stay."""
        return PARTS if self.rounds else ("weights",)

    @torch.no_grad()
    def fit(self, unit: Unit, journal: Journal) -> Fitted:
        """Leave every weight of a unit finished; see the class."""
        loss, reported = UnitLoss(unit, channel_axis(unit)), reported_samples(unit.count)
        before = loss.measured(reported, AT_ONCE)
        reports = []
        for number, layers in enumerate(order := _in_order(unit)):
            reports.append(self.fit_layer(layers, self._moments(unit, layers)))
            journal.note(unit, number + 1, len(order), reports[-1].error)
        if self.experts is not None:
            losses = {"loss_before": sum(r.nearest for r in reports), "loss_after": sum(r.error for r in reports)}
        else:
            losses = {"loss_before": before, "loss_after": loss.measured(reported, AT_ONCE)}
        return Fitted(state_of(unit), losses, tuple(reports))

    @torch.no_grad()
    def restore(self, unit: Unit, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put back what :meth:`fit` left."""
        restore(unit, tensors)

    def fit_layer(self, layers: Sequence[QuantizedLayer], by_task: Sequence[Moments] | None) -> LayerReport:
        """Finish a weight, which several layers may share, for the moments of what they read on each task."""
        layer, name = layers[0], layers[0].name
        if by_task is None:
            if self.rounds:
                layer.settle()
            return LayerReport(name, note=f"rounded to nearest: {kind_of(layer)} is not {KINDS}, or never ran")
        solves_bias = self.solve_bias and len(layers) == 1 and layer.module.bias is not None
        wide = [m.with_ones() if solves_bias else m.hessian for m in by_task]
        for hessian in wide:
            if not hessian.sum().isfinite():
                checks.finite(f"inputs of {name}", hessian)
        shares = [self._share(m, hessian) for m, hessian in zip(by_task, wide, strict=True)]
        like, quantizer = by_task[0], layer.weight_quantizer
        groups = range(len(like.hessian))
        merged = _matrices(like, layer.latent, layer.module.bias if solves_bias else None)
        targets = [merged] * len(by_task)
        if self.experts is not None:
            own = [expert[name] for expert in self.experts]
            targets = [_matrices(like, t.weight, t.bias if solves_bias else None) for t in own]
        found = [anchored(merged[g], [t[g] for t in targets], [h[g] for h in wide], shares, self.lam) for g in groups]
        nearest = self._on_grid(layer, like) if self.rounds else None
        report: dict[str, Any] = {
            "unexcited": sum(one.unexcited for one in found),
            "best": sum(one.error for one in found),
            "nearest": sum(one.merged_error for one in found),
        }
        inputs = like.hessian.shape[-1]
        if nearest is not None:
            report["nearest"] = report["best"] + sum(
                energy(torch.cat([nearest[g], merged[g][:, inputs:]], 1) - found[g].weight, found[g].hessian)
                for g in groups
            )
        weights, hessians = [one.weight for one in found], [one.hessian for one in found]
        if solves_bias:  # the best bias of any weights is known, and what is left is an objective of weights alone
            hessians = [h[:-1, :-1] - h[:-1, -1:] * h[-1:, :-1] / h[-1, -1] for h in hessians]
        wanted = torch.stack([w[:, :inputs] for w in weights])
        if self.experts is not None:
            layer.latent.copy_(like.weight(wanted, layer.latent.shape))
            if self.rounds and self.search is not None:
                self.search(quantizer, layer.latent)
        fell_back = False
        if self.rounds:
            fell_back = self._round(layer, like, wanted, hessians)
        result = like.matrices(layer.latent.double())
        change = [result[g] - wanted[g] for g in groups]
        report["error"] = report["best"] + sum(energy(change[g], hessians[g]) for g in groups)
        if solves_bias:
            biases = [
                weights[g][:, -1] - change[g] @ found[g].hessian[:-1, -1] / found[g].hessian[-1, -1] for g in groups
            ]
            layer.module.bias.copy_(torch.cat(biases))
        return LayerReport(name, **report, note="rounded to nearest: H has no Cholesky factor" if fell_back else "")

    def _moments(self, unit: Unit, layers: Sequence[QuantizedLayer]) -> list[Moments] | None:
        """The moments of what a weight reads, of each task; of several layers that share it, their sum."""
        if self.moments is not None:
            parts = [self.moments(unit, layer.name) for layer in layers]
        else:
            parts = [unit_moments(unit, layer.name, self.tasks or [(0, len(unit.target.tensor))]) for layer in layers]
        if not all(parts):
            return None
        total, *others = (part for part in parts if part is not None)
        for other in others:
            for mine, more in zip(total, other, strict=True):
                mine.add(more)
        return total

    def _share(self, moments: Moments, hessian: torch.Tensor) -> float:
        size = float(moments.rows) if self.weighting == "count" else float(hessian.norm())
        return 1 / size if size else 1.0  # inputs that are always 0 have no say, whatever they count

    def _on_grid(self, layer: QuantizedLayer, like: Moments) -> torch.Tensor:
        quantizer = layer.weight_quantizer
        return like.matrices(quantizer.values(quantizer.codes(layer.latent)).double())

    def _round(self, layer: QuantizedLayer, like: Moments, wanted: torch.Tensor, hessians: Sequence) -> bool:
        """Round a weight, in place, and say whether any part of it fell back to nearest."""
        quantizer = layer.weight_quantizer
        grids = [_grid(quantizer, values, like, wanted) for values in (quantizer.scale, quantizer.zero_point)]
        found = [
            gptq(
                w,
                hessians[g],
                grids[0][g],  # type: ignore[index]
                quantizer.qmin,
                quantizer.qmax,
                zero_point=None if grids[1] is None else grids[1][g],
                damping=self.damping,
                act_order=self.act_order,
                zero_dead=False,
            )
            for g, w in enumerate(wanted)
        ]
        codes = like.weight(torch.stack([one.codes for one in found]), layer.latent.shape)
        layer.latent.copy_(quantizer.values(codes.contiguous()))
        return any(one.fell_back for one in found)


@dataclass(frozen=True)
class Guidance:
    """Where the integers of a merge go: to what several models compute, each on its own inputs.

    Args:
        target: ``"experts"`` rounds what has the models' outputs, ``"mean"`` the mean W_m of their weights.
        lam: the pull towards W_m (:func:`hdrq.calibrate.least_squares.anchored`); None for 0.01 with ``"experts"``,
            else 0.
        weighting, bias: of :func:`hdrq.methods.post_merge.post_merge`; None solves for biases with ``"experts"``.
        damping, act_order: of :func:`hdrq.calibrate.gptq.gptq`.

    Raises:
        TypeError, ValueError: "X must be …, got …".
    """

    target: str = "experts"
    lam: float | None = None
    weighting: str = "count"
    bias: str | None = None
    damping: float = DAMPING
    act_order: bool = False

    def __post_init__(self) -> None:
        guided = checks.choice("target", self.target, TARGETS) == "experts"
        bias, lam = (
            self.bias or ("solve" if guided else "keep"),
            (0.01 if guided else 0.0) if self.lam is None else self.lam,
        )
        object.__setattr__(self, "bias", checks.choice("bias", bias, BIASES))
        object.__setattr__(self, "lam", checks.real("lam", lam, 0.0))
        checks.choice("weighting", self.weighting, WEIGHTINGS)
        checks.real("damping", self.damping, 0.0)
        checks.choice("act_order", self.act_order, (False, True))

    def method(
        self, models: Sequence[Mapping[str, Target]], tasks: Sequence[tuple[int, int]] | None = None
    ) -> LayerWise:
        """What fits a merge of models with these layers."""
        experts = models if self.target == "experts" else None
        solves = self.bias == "solve"
        return LayerWise(self.damping, self.act_order, tasks, experts, cast(float, self.lam), self.weighting, solves)


def state_of(unit: Unit) -> dict[str, torch.Tensor]:
    """All that a unit holds, scales too; :func:`restore` puts it back."""
    return {n: v.detach().clone() for n, v in unit.module.state_dict().items() if isinstance(v, torch.Tensor)}


def restore(unit: Unit, tensors: Mapping[str, torch.Tensor]) -> None:
    unit.module.load_state_dict(dict(tensors), strict=False)


def kind_of(layer: QuantizedLayer) -> str:
    """What class a layer had before it got quantizers."""
    return type(layer.module).__name__.removeprefix("Parametrized")


def run_unit(unit: Unit, rows: Sequence[Rows], start: int, stop: int) -> Callable[[nn.Module], Any]:
    """A function that runs a unit's module on the samples from start to stop, and returns what the last part gave."""

    def run(module: nn.Module) -> Any:
        for first in range(start, stop, AT_ONCE):
            args, kwargs = unit.node.inputs.build([each.read(first, min(first + AT_ONCE, stop)) for each in rows])
            output = module(*args, **kwargs)
        return output

    return run


def unit_moments(unit: Unit, name: str, tasks: Sequence[tuple[int, int]]) -> list[Moments] | None:
    """The second moments of what a layer of a unit reads, behind the quantized prefix, on the samples of each task."""
    own = own_name(unit, name)
    runs = [run_unit(unit, unit.quantized, *task) for task in tasks]
    found = [moments_of_run(unit.module, run, [own], unit.ranks) for run in runs]
    return [moments[own] for moments in found] if all(own in moments for moments in found) else None


def own_name(unit: Unit, name: str) -> str:
    """A module's name inside its unit."""
    return name[len(unit.name) :].removeprefix(".")


def _in_order(unit: Unit) -> list[list[QuantizedLayer]]:
    """The layers of each weight of a unit, weights in the order in which they are first read."""
    layers = {own_name(unit, layer.name): layer for layer in unit.layers}
    order: dict[str, None] = {}

    run = run_unit(unit, unit.quantized, 0, 1)
    observe(unit.module, run, before=lambda name, *_: order.setdefault(name), names=layers)
    found: dict[int, list[QuantizedLayer]] = {}
    for name in [*order, *(name for name in layers if name not in order)]:
        found.setdefault(id(layers[name].latent), []).append(layers[name])
    return list(found.values())


def _matrices(like: Moments, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """A weight as (groups, N / groups, K) in float64, the bias as one more column."""
    matrices = like.matrices(weight.double())
    if bias is None:
        return matrices
    return torch.cat([matrices, bias.double().view(len(matrices), -1, 1)], 2)


def _grid(quantizer: WeightQuantizer, values: torch.Tensor | None, like: Moments, matrices: torch.Tensor):
    """Scales or zero points as :func:`hdrq.calibrate.gptq.gptq` takes them, for each group of a layer."""
    if values is None:
        return None
    groups, rows, inputs = matrices.shape
    if quantizer.group_size is not None:
        return values.view(groups, rows, inputs // quantizer.group_size)
    return values.view(groups, rows, 1) if quantizer.axis is not None else values.view(1, 1, 1).expand(groups, 1, 1)
