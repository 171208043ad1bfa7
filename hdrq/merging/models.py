"""Merging whole quantized models, on their integers: in memory, or from file to file, one tensor at a time."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from hdrq import checks, ops
from hdrq._version import __version__
from hdrq.checkpoint.format import TABLES, Reader, Spec, Writer, packs
from hdrq.checkpoint.loading import assign
from hdrq.checkpoint.saving import state_of
from hdrq.evaluate.averaging import weighted_mean
from hdrq.merging import rules
from hdrq.merging.readiness import LayerReadiness, Readiness, examine
from hdrq.ops import MergedTensor
from hdrq.ops.merging import MODES, NOISES, SELECTIONS
from hdrq.quantizers.layers import quantized_layers
from hdrq.quantizers.modules import mean_range
from hdrq.quantizers.provenance import origin
from hdrq.rng import rng_state

RULES = ("noise", *rules.RULES)
Progress = Callable[[int, int, str], None]  # layers done, of how many, and the name of the next


def nothing(done: int, total: int, name: str) -> None:
    """No progress is shown."""


@dataclass(frozen=True)
class Plan:
    """Everything that decides the bits of a merge, but for the models.

    Args:
        weights: λ, one for each model, summing to 1; None for equal ones.
        draws: roundings tried for each weight, of which ``select`` says which is kept.
        seed: of the noise; stream 64·i serves the i-th layer in the order of names.
        noise, select, mode: as for :func:`hdrq.ops.merge`.
        rule: ``"noise"``, or one of :data:`hdrq.rules.RULES` in place of noise-sampled rounding.
        extrapolate: allow negative weights.
    """

    weights: Sequence[float] | None = None
    draws: int = 30
    seed: int = 0
    noise: str = "all"
    select: str = "min-cosine"
    mode: str = "exact"
    rule: str = "noise"
    extrapolate: bool = False

    def __post_init__(self) -> None:
        checks.integer("seed", self.seed, 0, 2**63 - 1)
        checks.integer("draws", self.draws, 1, 2**16)
        choices = {"noise": NOISES, "select": SELECTIONS, "mode": MODES, "rule": RULES}
        for name, known in choices.items():
            checks.choice(name, getattr(self, name), known)
        if self.rule != "noise" and self.extrapolate:
            raise ValueError(f'rule must be "noise" to extrapolate, got {self.rule!r}')


@torch.no_grad()
def merge(models: Sequence[nn.Module], **options: Any) -> nn.Module:
    """Average quantized models into one, with no data and no training; only integers, scales and biases are read.

    Each weight is merged by :func:`hdrq.ops.merge`, layer by layer. Scales of activations, biases and every other
    floating-point parameter and buffer are averaged with the same weights λ, in float64, rounded once; a range with a
    zero point lies where the merged values do; integer buffers must agree, but for BatchNorm's count of batches.

    Args:
        models: two or more results of :func:`hdrq.quantize`, of one architecture and one bit policy; left as they are.
        options: the fields of :class:`Plan`: ``weights``, ``draws``, ``seed``, ``noise``, ``select``, ``mode``,
            ``rule``, ``extrapolate``.

    Returns:
        A model of the class of the first.

    Raises:
        TypeError, ValueError: "X must be …, got …"; models that differ are refused with what differs.
    """
    models = list(models)
    merging = Merge(_states(models), Plan(**options))
    merged = copy.deepcopy(models[0])
    tensors = dict(merging.tensors())
    assign(merged, merging.manifest, tensors, tensors.__getitem__)
    return merged


def merge_files(
    paths: Sequence[str | os.PathLike],
    out: str | os.PathLike,
    *,
    report: bool = False,
    device: str = "cpu",
    progress: Progress = nothing,
    **options: Any,
) -> Readiness | None:
    """:func:`merge`, from files that :func:`hdrq.save` wrote to another: no architecture, and a few tensors of memory.

    The file has the bytes that saving the merge of the loaded models would give, but where layers share a weight: each
    name has noise of its own, and a loaded model the codes of the last.

    Args:
        out: the merged file, which appears whole or not at all.
        report: also say how well each layer merged, by noise-sampled rounding.
        device: where layers are merged.
        progress: is told of every layer.

    Raises:
        FileNotFoundError: no such file.
        OSError: ``out`` cannot be written.
        TypeError, ValueError: as :func:`merge`; a damaged file.
    """
    plan = Plan(**options)
    if report and plan.rule != "noise":
        raise ValueError(f'rule must be "noise" for a report, got {plan.rule!r}')
    with ExitStack() as stack:
        merging = Merge([stack.enter_context(Reader(path)) for path in paths], plan, device)
        layers: list[LayerReadiness] = []
        with Writer(out, merging.specs, merging.manifest) as file:
            for name, value in merging.tensors(progress, layers if report else None):
                file.write(name, value)
        return Readiness(tuple(layers)) if report else None


def readiness(
    models: Sequence[Any],
    *,
    device: str = "cpu",
    progress: Progress = nothing,
    **options: Any,
) -> Readiness:
    """Whether merging will work: what noise-sampled rounding does to each layer of models or of files; a verdict.

    Arguments and errors as :func:`merge_files`.
    """
    with ExitStack() as stack:
        if all(isinstance(model, str | os.PathLike) for model in models):
            sides: list[Side] = [stack.enter_context(Reader(path)) for path in models]
        else:
            sides = _states(models)
        merging, layers = Merge(sides, Plan(**options), device), []
        for number, name in enumerate(merging.names):
            progress(number, len(merging.names), name)
            layers.append(merging.readiness(name))
        return Readiness(tuple(layers))


@dataclass(frozen=True)
class State:
    """A model in memory, as its file would be."""

    manifest: dict[str, Any]
    tensors: Mapping[str, torch.Tensor]

    @property
    def specs(self) -> dict[str, Spec]:
        return {name: (value.dtype, tuple(value.shape)) for name, value in self.tensors.items()}

    def tensor(self, name: str) -> torch.Tensor:
        return self.tensors[name]


Side = Reader | State  # one of the models


def _states(models: Sequence[Any]) -> list[Side]:
    for k, model in enumerate(models):
        if not isinstance(model, nn.Module):
            raise TypeError(f"models must be torch.nn.Modules, got {type(model).__name__} as number {k}")
        if not quantized_layers(model) or not origin(model):
            raise ValueError(
                f"models must be results of hdrq.quantize, got a plain {type(model).__name__} as number {k}"
            )
    return [State(*state_of(model)) for model in models]


class Merge:
    """Models that are alike in all but their numbers, and what becomes of them: a manifest, and tensors in turn.

    Raises:
        TypeError, ValueError: "X must be …, got …"; what differs between the models.
    """

    def __init__(self, sides: Sequence[Side], plan: Plan, device: str | None = None) -> None:
        checks.integer("the number of models", len(sides), 2, 64)
        if device is not None:
            checks.device(device)
        self.plan, self.device = plan, device
        self.weights = checks.mixing_weights(plan.weights, len(sides), plan.extrapolate)
        _check_alike(sides)
        self._sides, first = sides, sides[0].manifest
        self.specs = dict(sides[0].specs)
        self.names = sorted(first["weights"])
        made = [{key: value for key, value in side.manifest.items() if key not in TABLES} for side in sides]
        how = {"folded": first["folded"], "merge": {**asdict(plan), "weights": list(self.weights)}, "models": made}
        if all("architecture" in facts and facts["architecture"] == made[0]["architecture"] for facts in made):
            how["architecture"] = made[0]["architecture"]
        tables = {key: first[key] for key in TABLES if key in first and key != "sha256"} | {"hdrq": __version__}
        self.manifest = {**tables, "inputs": {name: self._range(name) for name in first["inputs"]}, **how}

    def tensors(
        self, progress: Progress = nothing, layers: list[LayerReadiness] | None = None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor of the merged model, by name; ``layers`` are told how well each layer merged."""
        rest = dict.fromkeys(self.specs)
        for number, name in enumerate(self.names):
            progress(number, len(self.names), name)
            codes, scale = self._layer(name, layers)
            for part, value in (("codes", codes), ("scale", scale)):
                del rest[f"{name}.weight.{part}"]
                yield f"{name}.weight.{part}", value
        for name in rest:
            yield name, self._mean(name) if self.specs[name][0].is_floating_point else self._sides[0].tensor(name)

    def readiness(self, name: str) -> LayerReadiness:
        """How well a layer merges, by noise-sampled rounding."""
        found: list[LayerReadiness] = []
        self._sampled(name, *self._inputs(name), found)
        return found[0]

    def _layer(self, name: str, layers: list[LayerReadiness] | None) -> tuple[torch.Tensor, torch.Tensor]:
        """A layer's merged codes, as the file has them, and scale."""
        codes, scales = self._inputs(name)
        if self.plan.rule == "noise":
            return self._sampled(name, codes, scales, layers)[:2]
        if layers is not None:
            self._sampled(name, codes, scales, layers)
        qmin, qmax = self._facts(name)["range"]
        shape = self._facts(name)["shape"]
        plain = [ops.unpack(c, shape, signed=qmin < 0) if packs(qmin, qmax) else c for c in codes]
        axis = self._facts(name)["axis"]
        merged = rules.merge_rule(plain, scales, qmin, qmax, self.plan.rule, weights=self.weights, axis=axis)
        return ops.pack(merged.codes) if packs(qmin, qmax) else merged.codes, merged.scale

    def _sampled(self, name: str, codes, scales, layers: list[LayerReadiness] | None) -> MergedTensor:
        facts, plan = self._facts(name), self.plan
        qmin, qmax = facts["range"]
        common: Any = {"weights": self.weights, "axis": facts["axis"], "shape": facts["shape"]}
        merged = ops.merge(
            codes,
            scales,
            qmin,
            qmax,
            rng_state(plan.seed, stream=64 * self.names.index(name), device=codes[0].device),
            draws=plan.draws,
            noise=plan.noise,
            select=plan.select,
            mode=plan.mode,
            packed=packs(qmin, qmax),
            extrapolate=plan.extrapolate,
            **common,
        )
        if layers is not None:
            layers.append(examine(name, merged, codes, scales, qmin, qmax, **common))
        return merged

    def _facts(self, name: str) -> dict[str, Any]:
        return self._sides[0].manifest["weights"][name]

    def _inputs(self, name: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        codes, scales = (self._read(f"{name}.weight.{part}") for part in ("codes", "scale"))
        return codes, scales

    def _read(self, name: str) -> list[torch.Tensor]:
        values = (side.tensor(name) for side in self._sides)
        return [value if self.device is None else value.to(self.device) for value in values]

    def _mean(self, name: str) -> torch.Tensor:
        return weighted_mean(self.weights, self._read(name)).to(self.specs[name][0])

    def _range(self, name: str) -> list[int]:
        scales = self._read(f"{name}.input.scale")
        for scale in scales:
            checks.scale_values(f"{name}.input.scale", scale)
        ranges = [side.manifest["inputs"][name] for side in self._sides]
        return list(mean_range(self.weights, [float(scale) for scale in scales], ranges))


def _check_alike(sides: Sequence[Side]) -> None:
    first = _description(sides[0])
    integers = [name for name, (dtype, _) in sides[0].specs.items() if _must_agree(sides[0], name, dtype)]
    for k, side in enumerate(sides[1:], start=1):
        label = getattr(side, "path", f"number {k}")
        other = _description(side)
        wrong = [
            f"{name} ({first.get(name, 'missing')} in the first, {other.get(name, 'missing')} in {label})"
            for name in dict.fromkeys((*first, *other))
            if first.get(name) != other.get(name)
        ]
        wrong += [
            f"{name} (other integers in {label})"
            for name in integers
            if name in side.specs and not torch.equal(side.tensor(name), sides[0].tensor(name))
        ]
        if wrong:
            more = f" and {len(wrong) - 10} more" if len(wrong) > 10 else ""
            raise ValueError(f"models must be alike to be merged, got {'; '.join(wrong[:10])}{more}")


def _must_agree(side: Side, name: str, dtype: torch.dtype) -> bool:
    """What cannot be averaged, but for BatchNorm's count of batches, which nothing reads here."""
    codes = name.removesuffix(".weight.codes") in side.manifest["weights"] and name.endswith(".weight.codes")
    return not (codes or dtype.is_floating_point or name.endswith("num_batches_tracked"))


def _description(side: Side) -> dict[str, Any]:
    """What must agree between models: tensors, ranges, and where quantizers are."""
    facts: dict[str, Any] = {name: f"{shape} {dtype}" for name, (dtype, shape) in side.specs.items()}
    for name, weight in side.manifest["weights"].items():
        facts[f"{name}: weight range"] = (*weight["range"], weight["axis"])
    for name, (qmin, qmax) in side.manifest["inputs"].items():
        facts[f"{name}: input levels"] = qmax - qmin + 1
    for key in ("folded", "shared"):
        facts |= {f"{name}: {key}": other for name, other in side.manifest[key].items()}
    return facts
