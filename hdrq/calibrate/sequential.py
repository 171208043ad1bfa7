"""The sequential walk: every unit of a model in forward order, each fitted behind the quantized prefix.

The walk knows no method. For each unit it knows what the unit read, in full precision and behind the units that are
quantized already, and what it returned; it keeps that in a cache, and reports and resumes. A :class:`Method` is given
one :class:`Unit` at a time and leaves it quantized.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol, cast

import torch
from torch import nn

from hdrq.calibrate.cache import Cache, Rows
from hdrq.calibrate.data import Call
from hdrq.calibrate.progress import Step
from hdrq.calibrate.propagate import Activations
from hdrq.calibrate.ranks import ALONE, Ranks
from hdrq.calibrate.replay import check_replay, representative
from hdrq.calibrate.report import BlockReport, LayerReport
from hdrq.calibrate.settings import DEFAULT, RunSettings
from hdrq.calibrate.trace import Node, trace
from hdrq.checkpoint.workdir import Workdir, state_hash
from hdrq.prepare.observe import observe
from hdrq.quantizers.layers import QuantizedLayer, input_readers, quantized_layers
from hdrq.quantizers.modules import ActivationQuantizer

PARTS = ("weights", "activations")  # "outputs" too: quantizers of what later units read, in place of those of inputs
LossRow = tuple[str, int, float]  # the unit, the iteration, the reconstruction loss


@dataclass(frozen=True)
class Unit:
    """One unit of a model, and all that a method may fit it by. Rows have one entry for each calibration sample.

    Where ranks share the samples, these are this rank's, and a method leaves the unit the same on all of them.
    """

    index: int
    node: Node  # its name, and how its arguments and results are made of rows
    module: nn.Module  # quantized; what it computes is the method's to choose
    reference: nn.Module  # the same unit in full precision
    layers: list[QuantizedLayer]  # its quantized layers that no earlier unit has fitted
    activations: Mapping[str, ActivationQuantizer]  # its quantizers of activations, by name, likewise
    quantized: list[Rows]  # its inputs behind the quantized prefix
    full: list[Rows]  # its inputs in full precision
    target: Rows  # its output in full precision
    output: ActivationQuantizer | None = (
        None  # later units read its output through this alone; where outputs are fitted
    )
    entry: ActivationQuantizer | None = (
        None  # it quantizes its first input; an earlier unit has fitted it as its output
    )
    ranks: Ranks = ALONE  # share the samples
    samples: int | None = None  # of all ranks together; None for those of the rows

    @property
    def name(self) -> str:
        return self.node.name

    @property
    def count(self) -> int:
        """How many calibration samples there are, on all ranks together."""
        return len(self.target.tensor) if self.samples is None else self.samples

    @property
    def weights(self) -> list[QuantizedLayer]:
        """One layer for each weight: of layers that share a weight, the first."""
        first: dict[int, QuantizedLayer] = {}
        for layer in self.layers:
            first.setdefault(id(layer.latent), layer)
        return list(first.values())


@dataclass(frozen=True)
class Fitted:
    """What a method says of a unit that it has fitted."""

    tensors: dict[str, torch.Tensor]  # enough for :meth:`Method.restore`
    losses: dict[str, float]  # loss_before and loss_after
    layers: tuple[LayerReport, ...] = ()


class Method(Protocol):
    """How one unit is quantized."""

    @property
    def fits(self) -> Sequence[str]:
        """Which of :data:`PARTS` it fits; a unit that it is given has no others."""

    def fit(self, unit: Unit, journal: Journal) -> Fitted:
        """Leave the unit quantized, for good."""

    def restore(self, unit: Unit, tensors: Mapping[str, torch.Tensor]) -> None:
        """Leave the unit as :meth:`fit` left it when it returned these tensors."""


@dataclass
class Journal:
    """Where a method notes how far it is: losses for whoever watches, its state for whoever resumes.

    Args:
        units: how many there are, through all walks.
        part: what is added to a unit's name in losses, where a walk fits a part of it.
        progress: is told of every step that is noted; None for nobody.
        workdir: the work folder; None for none.
        every: iterations between two states that are kept inside a unit; 0 for none.
    """

    units: int
    part: str = ""
    progress: Callable[[Step], None] | None = None
    workdir: Workdir | None = None
    every: int = 0
    losses: list[LossRow] = field(default_factory=list)

    @classmethod
    def of(cls, settings: RunSettings, units: int, part: str, losses: Sequence[LossRow]) -> Journal:
        """The journal of a run in which ``losses`` were noted before."""
        every = settings.checkpoint_every if settings.workdir else 0
        return cls(units, part, settings.progress or None, settings.workdir, every, list(losses))  # type: ignore[arg-type]

    def note(self, unit: Unit, iteration: int, iterations: int, loss: float) -> None:
        """The loss after so many iterations."""
        self.losses.append((unit.name + self.part, iteration, loss))
        if self.progress is not None:
            self.progress(Step(unit.name + self.part, unit.index, self.units, iteration, iterations, loss))

    def keep(self, unit: Unit, tensors: Mapping[str, torch.Tensor], iteration: int, loss_before: float) -> None:
        """Keep the state of a unit that is not finished."""
        if self.workdir is not None:
            facts = {"index": unit.index, "iteration": iteration, "loss_before": loss_before, "losses": self.losses}
            self.workdir.save_current(tensors, facts)

    def kept(self, unit: Unit) -> tuple[dict[str, torch.Tensor], int, float] | None:
        """The state that :meth:`keep` kept of a unit: tensors, iteration, and the loss before the first."""
        found = None if self.workdir is None else self.workdir.load_current(unit.index)
        if found is None:
            return None
        tensors, facts = found
        self.losses = [tuple(row) for row in facts["losses"]]
        return tensors, facts["iteration"], facts["loss_before"]

    def finish(self, unit: Unit, fitted: Fitted) -> None:
        """Keep a finished unit."""
        if self.workdir is not None:
            facts = {"losses": self.losses, "report": fitted.losses, "layers": [asdict(one) for one in fitted.layers]}
            self.workdir.save_block(unit.index, fitted.tensors, facts)
            self.workdir.write_losses(self.losses)

    def finished(self, unit: Unit) -> Fitted | None:
        """What :meth:`finish` kept of a unit, in an earlier run."""
        found = None if self.workdir is None else self.workdir.load_block(unit.index)
        if found is None:
            return None
        tensors, facts = found
        self.losses = [tuple(row) for row in facts["losses"]]
        return Fitted(tensors, facts["report"], tuple(LayerReport(**one) for one in facts.get("layers", ())))


def walk(
    full: nn.Module,
    model: nn.Module,
    names: Sequence[str],
    batches: list[Call],
    method: Method,
    cache: Cache,
    settings: RunSettings = DEFAULT,
    *,
    walks: tuple[int, int] = (0, 1),
    losses: Sequence[LossRow] = (),
    teachers: Sequence[nn.Module] | None = None,
) -> tuple[list[BlockReport], list[LossRow]]:
    """Fit every unit of ``model``, in place, in forward order; what is finished already is taken from the work folder.

    Args:
        full: the model in full precision.
        model: a copy of it with quantizers.
        names: the units (:func:`hdrq.prepare.units.find_blocks`).
        batches: of all ranks; each runs its own.
        settings: ``progress`` is a callable or None.
        walks: the number of this walk among how many over the same units. Units are numbered through all of them.
        losses: those that earlier walks noted.
        teachers: one model in full precision for each batch, of whose units inputs and outputs are kept in place of
            those of ``full``.

    Returns:
        A report of each unit that had something to fit, and the losses that were noted, the earlier ones first.

    Raises:
        ValueError: a unit that was fitted is not the same on all ranks.
    """
    ranks, samples = settings.ranks, sum(call.size for call in batches)
    nodes = trace(full, list(names), batches[0], representative(full, names, batches[0]))
    batches = ranks.share(batches)
    teaching = [full] * len(batches) if teachers is None else list(teachers)
    for each in dict.fromkeys(teaching):
        check_replay(each, nodes, [call for call, own in zip(batches, teaching, strict=True) if own is each])
    in_full, behind_quantized = Activations(teaching, nodes, batches, cache), Activations(model, nodes, batches, cache)
    apart = _behind_others(model, nodes, batches[0].at(torch.tensor([0])))
    number, count = walks
    part = f": {method.fits[0]}" if count > 1 else ""
    journal = Journal.of(settings, count * len(nodes), part, losses)
    fitted_before: set[int] = set()
    reports = []
    for index, node in enumerate(nodes):
        began = time.perf_counter()
        inputs = in_full.inputs(index)
        differs = bool(node.needs) or index in apart or teachers is not None
        quantized = behind_quantized.inputs(index) if differs else inputs
        target = in_full.run(index, inputs)[node.outputs.main]

        module, reference = model.get_submodule(node.name), full.get_submodule(node.name)
        output = entry = None
        if "outputs" in method.fits:
            output, entry = _reader(model, nodes, index), _entry(module)
            entry = entry if id(entry) in fitted_before and node.needs else None
        layers, activations = _unfitted(model, node.name, fitted_before, method.fits)
        if output is not None:
            activations[f"{node.name}.output_quantizer"] = output
            fitted_before.add(id(output))
        if layers or activations:
            place, placed = number * len(nodes) + index, replace(node, inputs=behind_quantized.layout(index, model))
            rows = (quantized, inputs, target)
            unit = Unit(place, placed, module, reference, layers, activations, *rows, output, entry, ranks, samples)
            with nullcontext() if settings.offload is None else settings.offload.in_memory(module):
                fitted = _fit(unit, method, journal)
            if ranks.size > 1:
                ranks.check_same({f"block {node.name or 'model'}": state_hash(module.state_dict())})
            seconds = time.perf_counter() - began
            reports.append(BlockReport(node.name + part, **fitted.losses, seconds=seconds, layers=fitted.layers))

        behind_quantized.run(index, quantized)
        for activations_of in (in_full, behind_quantized):
            activations_of.forget(index)
    return reports, journal.losses


@torch.no_grad()
def _behind_others(model: nn.Module, nodes: Sequence[Node], call: Call) -> set[int]:
    """The units that are called behind a quantizer that is in no unit, or runs while the unit that has it does not.

    An embedding of positions is no unit, and DiT's last layers call an embedding inside its first block.
    """
    units = {node.name: k for k, node in enumerate(nodes)}
    readers = {*quantized_layers(model), *input_readers(model)}
    running: list[str] = []
    found: set[int] = set()
    others = False

    def enter(name: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        nonlocal others
        if name in units and others:
            found.add(units[name])
        others |= name in readers and name not in units and not any(_is_in(name, unit) for unit in running)
        running.extend([name] if name in units else [])

    def leave(name: str, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if name in units:
            running.remove(name)

    observe(model, call, before=enter, after=leave, names={**units, **dict.fromkeys(readers)})
    return found


def _is_in(name: str, unit: str) -> bool:
    return not unit or name.startswith(f"{unit}.")


def _entry(module: nn.Module) -> ActivationQuantizer | None:
    """The quantizer of what a unit reads."""
    return cast(Any, module._modules.get("input_quantizer"))


def _reader(model: nn.Module, nodes: Sequence[Node], index: int) -> ActivationQuantizer | None:
    """The quantizer through which alone later units read what a unit returns; None where there is no such one."""
    main = (index, nodes[index].outputs.main)
    found: dict[int, ActivationQuantizer] = {}
    for node in nodes[index + 1 :]:
        if index in node.needs:
            quantizer = _entry(model.get_submodule(node.name))
            places = [place for place, read in enumerate(node.reads or ()) if read == main]
            if quantizer is None or places != [0]:
                return None
            found[id(quantizer)] = quantizer
    return next(iter(found.values())) if len(found) == 1 else None


def _fit(unit: Unit, method: Method, journal: Journal) -> Fitted:
    """Fit a unit, or restore it as an earlier run fitted it."""
    finished = journal.finished(unit)
    if finished is not None:
        method.restore(unit, finished.tensors)
        return finished
    fitted = method.fit(unit, journal)
    journal.finish(unit, fitted)
    return fitted


def _unfitted(
    model: nn.Module, name: str, fitted: set[int], parts: Sequence[str]
) -> tuple[list[QuantizedLayer], dict[str, ActivationQuantizer]]:
    """The quantizers of a unit that no earlier unit has fitted: a shared layer is fitted once. ``fitted`` grows."""
    layers = [
        layer
        for layer_name, layer in quantized_layers(model).items()
        if (layer_name == name or layer_name.startswith(f"{name}.")) and id(layer.latent) not in fitted
    ]
    modules = model.get_submodule(name).named_modules(prefix=name)
    activations = {n: q for n, q in modules if isinstance(q, ActivationQuantizer) and id(q) not in fitted}
    layers = layers if "weights" in parts else []
    activations = activations if "activations" in parts else {}
    fitted |= {id(layer.latent) for layer in layers} | {id(q) for q in activations.values()}
    return layers, activations
