"""Adding changes to a quantized model, on its integers: adapters, and differences of other models' weights."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from hdrq import checks
from hdrq._version import __version__
from hdrq.calibrate.data import calibration_calls, data_hash
from hdrq.calibrate.gptq import DAMPING
from hdrq.calibrate.moments import MomentsInTurn
from hdrq.checkpoint.format import STRUCTURE, TABLES, packs
from hdrq.checkpoint.loading import assign, load
from hdrq.export.folders import is_folder
from hdrq.merging.assessment import CLIPPED
from hdrq.merging.changed import RULES, ChangedTensor, changed_float, changed_weight
from hdrq.merging.changes import Opened, changes_of, opened
from hdrq.merging.models import states_of
from hdrq.merging.sources import Source, check_out, hash_of, writer
from hdrq.merging.sources import opened as open_source
from hdrq.merging.tensors import Progress, no_progress
from hdrq.merging.weights import Agreed, Plain, Reordered, Rows, Total, Weights, weight_name
from hdrq.ops import pack
from hdrq.rng import CONTRACT, rng_state

AFTER_DRAWS = 2**16  # the step of the random stream that comes after all draws of a merge
LITTLE = 0.5  # of a change kept, below which a warning says so


@dataclass(frozen=True)
class AddSettings:
    """What decides the bits of a changed model, beside the model, the changes and the calibration data.

    Args:
        rule: one of :data:`hdrq.merging.changed.RULES`; see :func:`hdrq.merging.changed.changed_weight`.
        seed: of the random numbers. The i-th layer in the order of names draws from stream 64·i, at a step that counts
            the additions a model has behind it, so that a second one draws anew.
        damping: of rule ``"calibrated"``; see :func:`hdrq.calibrate.gptq.gptq`.

    Raises:
        TypeError, ValueError: "X must be …, got …".
    """

    rule: str = "systematic"
    seed: int = 0
    damping: float = DAMPING

    def __post_init__(self) -> None:
        checks.choice("rule", self.rule, RULES)
        checks.integer("seed", self.seed, 0, 2**63 - 1)
        checks.real("damping", self.damping, 0.0)


@dataclass(frozen=True)
class AddReport:
    """What became of a change, tensor by tensor; those that it leaves as they are have no part in it."""

    tensors: tuple[ChangedTensor, ...]

    @property
    def kept(self) -> float:
        """``⟨W' − W, δ⟩ / ⟨δ, δ⟩`` over all tensors; 1 for a change of nothing."""
        return self._mean("kept", 1) if self.tensors else 1.0

    @property
    def error(self) -> float:
        """``‖(W' − W) − δ‖₂ / ‖δ‖₂`` over all tensors."""
        return self._mean("error", 2) ** 0.5 if self.tensors else 0.0

    @property
    def clipped(self) -> float:
        """The share of elements that ranges clipped."""
        elements = sum(t.elements for t in self.tensors)
        return sum(t.clipped * t.elements for t in self.tensors) / max(elements, 1)

    def _mean(self, field: str, power: int) -> float:
        squares = sum(t.change**2 for t in self.tensors)
        return sum(getattr(t, field) ** power * t.change**2 for t in self.tensors) / squares

    def as_dict(self) -> dict:
        """For JSON."""
        total = {"kept": self.kept, "error": self.error, "clipped": self.clipped}
        return {"total": total, "tensors": [tensor.as_dict() for tensor in self.tensors]}


class Added(NamedTuple):
    """What :func:`add` returns."""

    model: nn.Module
    report: AddReport


@torch.no_grad()
def add(model: nn.Module, changes: Any, *, calibration: Any = None, **options: Any) -> Added:
    """Add changes of the weights to a quantized model, on its integers: no float original, no training.

    A quantized weight stays on its grid: its new value ``(I − z)·Δ + δ`` is rounded to an integer by a rule
    (:func:`hdrq.merging.changed.changed_weight`). Biases and other tensors in float take their change as it is. Scales
    of activations stay. A change of less than half a step is lost where it is rounded to nearest; the other rules keep
    it, and add noise.

    Args:
        model: a result of :func:`hdrq.quantize`, :func:`hdrq.merge` or :func:`hdrq.load`; left as it is.
        changes: one or several: a :class:`hdrq.merging.changes.Change`, a path of an adapter, or δ by tensors' names.
        calibration: data as for :func:`hdrq.quantize`, for rule ``"calibrated"`` and the errors on inputs.
        options: fields of :class:`AddSettings`: ``rule``, ``seed``, ``damping``.

    Returns:
        The changed model, and what became of the change. A warning names tensors that keep less than half of it, or
        are clipped.

    Raises:
        FileNotFoundError, TypeError, ValueError: "X must be …, got …"; a change that is not of this model.
    """
    settings = checks.made_of(AddSettings, options)
    (state,) = states_of([model])
    with ExitStack() as stack:
        plan = _Plan(state, changes, settings, stack, calibration, model)
        report: list[ChangedTensor] = []
        tensors = dict(plan.tensors(no_progress, report))
    result = copy.deepcopy(model)
    assign(result, plan.manifest(), tensors, tensors.__getitem__)
    return Added(result, _reported(report, settings))


@torch.no_grad()
def add_file(
    path: str | os.PathLike,
    changes: Any,
    out: str | os.PathLike | None,
    *,
    model: nn.Module | str | None = None,
    calibration: Any = None,
    progress: Progress = no_progress,
    **options: Any,
) -> AddReport:
    """:func:`add` to a model in a file, into another file: one tensor at a time, and no architecture.

    Args:
        path: a file that :func:`hdrq.save` wrote, a folder that :class:`hdrq.export.folders.Folder` reads, or an ONNX
            file that :func:`hdrq.export.read_onnx` reads.
        out: the changed file, or, of a folder or an ONNX file, one like it, unless the name ends with ``.safetensors``;
            it appears whole or not at all. None: nothing is written, and the report says what would be.
        model: the architecture, as for :func:`hdrq.load`; needed with ``calibration``, and for an adapter of which the
            file does not say along which axis layers have their inputs.
        progress: is called before every quantized layer.

    Raises:
        FileNotFoundError, TypeError, ValueError: as :func:`add`; a damaged file.
        OSError: ``out`` cannot be written.
    """
    settings = checks.made_of(AddSettings, options)
    if out is not None:
        check_out(out, path)
    if is_folder(path) and model is not None:
        raise ValueError(f"model must be left out for a folder, got one for {path}; hdrq import makes a file of it")
    if calibration is not None and model is None:
        raise ValueError("model must be given with calibration, whose inputs layers must be shown, got None")
    network = None if model is None else load(path, model)
    report: list[ChangedTensor] = []
    with ExitStack() as stack:
        source: Any = open_source(path, stack)
        plan = _Plan(source, changes, settings, stack, calibration, network)
        if out is None:
            for _ in plan.tensors(progress, report):
                pass
        else:
            manifest = plan.manifest()
            with writer(out, source, source.specs, manifest) as file:
                for name, value in plan.tensors(progress, report):
                    file.write(name, value)
    return _reported(report, settings)


class _Plan:
    """A model, the changes of each tensor of it, and how they are made."""

    def __init__(self, source: Source, changes: Any, settings: AddSettings, stack, calibration, model) -> None:
        self.source, self.settings, self.base = source, settings, Weights(source, model)
        if settings.rule == "calibrated" and calibration is None:
            raise ValueError('calibration must be given for rule "calibrated", which rounds for inputs, got None')
        found = changes_of(changes)
        self.changes = [opened(change, self.base, stack, number) for number, change in enumerate(found)]
        self.parts = _parts(self.changes, self.base)
        self.calls = None if calibration is None else calibration_calls(calibration)
        tied = source.manifest["tied"].values()  # what several layers read has no one input
        layers = [n for n in sorted(source.manifest["weights"]) if weight_name(n) in self.parts and n not in tied]
        self.moments = None if self.calls is None else MomentsInTurn(model, self.calls, layers)

    def tensors(self, progress: Progress, report: list[ChangedTensor]) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor of the changed model, with its name: layers in the order of names, then everything else."""
        rest = dict.fromkeys(self.source.specs)
        layers = sorted(self.base.layers, key=self.base.layers.__getitem__)
        for number, name in enumerate(layers):
            layer = self.base.layers[name]
            progress(number, len(layers), layer)
            if name in self.parts:
                del rest[f"{layer}.weight.codes"]
                yield f"{layer}.weight.codes", self._codes(number, name, report)
        for name in rest:
            if name not in self.parts:
                yield name, self.source.tensor(name)
                continue
            value, found = changed_float(name, Plain(self.source.tensor(name).cpu()), self._change(name))
            report.extend([] if found is None else [found])
            yield name, value

    def _codes(self, number: int, name: str, report: list[ChangedTensor]) -> torch.Tensor:
        """The new codes of a layer, as a file has them; when this returns, nothing else of it is held."""
        old, layer = self.base.quantized(name), self.base.layers[name]
        rng = rng_state(self.settings.seed, stream=64 * number, step=AFTER_DRAWS + additions(self.source.manifest))
        moments = self.moments.of(layer) if self.moments is not None and layer in self.moments.names else None
        if moments is not None:
            moments.hessian = moments.hessian.cpu()
        rule, damping, change = self.settings.rule, self.settings.damping, self._change(name)
        if old.order is not None:
            change = Reordered(change, old.order)
        codes, found = changed_weight(name, old, change, rule, rng, moments, damping)
        report.extend([] if found is None else [found])
        return pack(codes) if packs(*old.facts["range"]) else codes

    def _change(self, name: str) -> Rows:
        return Total([part() for part in self.parts[name]])

    def manifest(self) -> dict[str, Any]:
        """The manifest of the changed model, without the hashes of its tensors."""
        facts: dict[str, Any] = {"rule": self.settings.rule, "seed": self.settings.seed}
        if self.calls is not None and self.settings.rule == "calibrated":
            facts |= {"damping": self.settings.damping, "calibration": data_hash(self.calls)}
        facts["changes"] = [change.facts for change in self.changes]
        return added_manifest(self.source.manifest, facts, hash_of(self.source))


def added_manifest(parent: Mapping[str, Any], facts: Mapping[str, Any], digest: Any) -> dict[str, Any]:
    """The manifest of a model that was changed: the tables of its parent, what was added, and the parent's history.

    Args:
        facts: rule, seed, and of every change its scale and the SHA-256 of every file of it.
        digest: the SHA-256 of the parent's file, or of each of a folder's; None for a model in memory.
    """
    history = {key: fact for key, fact in parent.items() if key not in TABLES}
    history |= {} if digest is None else {"sha256": digest}
    kept = {key: parent[key] for key in (*STRUCTURE, "folded", "architecture", "coverage") if key in parent}
    return {**kept, "hdrq": __version__, "contract": CONTRACT, "added": dict(facts), "parent": history}


def additions(manifest: Mapping[str, Any]) -> int:
    """How many additions a model has behind it."""
    count, facts = 0, manifest
    while isinstance(facts, Mapping) and "added" in facts:
        count, facts = count + 1, facts.get("parent", {})
    return count


def _parts(changes: Sequence[Opened], base: Weights) -> dict[str, list[Callable[[], Rows]]]:
    """What each tensor of a model changes by; a weight that layers share has one name."""
    parts: dict[str, list[Callable[[], Rows]]] = {}
    for change in changes:
        own: dict[str, list[Callable[[], Rows]]] = {}
        for name, part in change.parts.items():
            own.setdefault(base.owners.get(name, name), []).append(part)
            if change.whole:
                own |= {n: [part] for n in base.same(name) if n in base.plain and n not in change.parts}
        for name, several in own.items():
            parts.setdefault(name, []).append(several[0] if len(several) == 1 else _agreed(name, several))
    return parts


def _agreed(name: str, parts: Sequence[Callable[[], Rows]]) -> Callable[[], Rows]:
    return lambda: Agreed(name, [part() for part in parts])


def _reported(report: list[ChangedTensor], settings: AddSettings) -> AddReport:
    """The report, and warnings of what it says that should not be overlooked."""
    found = AddReport(tuple(report))
    if not report:
        warnings.warn("the change is zero everywhere: the model is what it was", stacklevel=4)
    lost = [f"{t.name} ({t.kept:.0%})" for t in report if t.kept < LITTLE]
    if lost:
        way_out = '; rule="systematic" keeps it in the mean' if settings.rule == "nearest" else ""
        warnings.warn(f"less than half of the change is kept in {checks.listed(lost)}{way_out}", stacklevel=4)
    clipped = [f"{t.name} ({t.clipped:.0%})" for t in report if t.clipped > CLIPPED]
    if clipped:
        warnings.warn(
            f"more than {CLIPPED:.0%} of the weights are clipped to their range in {checks.listed(clipped)}; less "
            "scale, or more bits for those layers",
            stacklevel=4,
        )
    if settings.rule == "calibrated":
        other = [f"{t.name} ({t.rule})" for t in report if t.rule not in ("calibrated", "float")]
        if other:
            warnings.warn(f"rule calibrated could not serve {checks.listed(other)}, which took another", stacklevel=4)
    return found
