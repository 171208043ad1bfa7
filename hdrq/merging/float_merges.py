"""Merges of models in full precision: average, task arithmetic and TIES, one tensor at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hdrq import checks
from hdrq.checkpoint.float_states import read_state
from hdrq.checkpoint.states import tensors_of
from hdrq.evaluate.averaging import weighted_mean

MERGES = ("average", "task-arithmetic", "ties")
SCALES = {"average": 1.0, "task-arithmetic": 0.3, "ties": 1.0}
TIES = {"keep": 0.2, "aggregate": "mean", "trim": "whole"}  # what it has where nothing is given
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")  # of BatchNorm
HALF = 2**15  # values of the lower half of a magnitude's 31 bits; the upper half has 2**16


@dataclass(frozen=True)
class FloatMerge:
    """How models in full precision are merged; every field has a default.

    With ``τ_k = θ_k − θ_0``, the difference of expert k from ``base``::

        "average"          Σ λ_k·θ_k
        "task-arithmetic"  θ_0 + scale·Σ λ_k·K·τ_k
        "ties"             θ_0 + scale·(Σ or mean over the experts that agree in sign of trimmed τ_k)

    TIES keeps of each τ the ``⌊keep·d⌋`` largest magnitudes of d, and all that are as large as the next one; takes for
    each element the sign of the sum of what is kept, and where that sum is 0 the sign of the sum of all signs; and
    combines the kept elements of that sign.

    Args:
        merge: one of :data:`MERGES`.
        weights: λ of each expert, which sum to 1; None for equal ones. Not for TIES.
        scale: None for 1 with TIES and 0.3 with task arithmetic. Not for the average.
        keep: TIES alone, as are the next two: the share of each τ that is kept, over 0; None for 0.2.
        aggregate: ``"mean"`` over the experts that agree, or ``"sum"``; None for the mean.
        trim: whether ``keep`` is a share of the ``"whole"`` τ or of each ``"tensor"``; None for the whole.

    Raises:
        TypeError, ValueError: "X must be …, got …".

    Source: Ilharco et al., "Editing Models with Task Arithmetic", ICLR 2023; Yadav et al., "TIES-Merging", NeurIPS
    2023, whose authors trim the whole τ and take the mean.
    """

    merge: str = "average"
    weights: Sequence[float] | None = None
    scale: float | None = None
    keep: float | None = None
    aggregate: str | None = None
    trim: str | None = None

    def __post_init__(self) -> None:
        checks.choice("merge", self.merge, MERGES)
        for name, default in TIES.items():
            given = getattr(self, name)
            if self.merge == "ties":
                object.__setattr__(self, name, default if given is None else given)
            elif given is not None:
                raise ValueError(f'{name} must be left out with merge="{self.merge}", which trims nothing, got {given}')
        if self.merge == "ties":
            checks.choice("aggregate", self.aggregate, ("mean", "sum"))
            checks.choice("trim", self.trim, ("whole", "tensor"))
            checks.real("keep", self.keep, 0.0, 1.0)
        if self.keep == 0:
            raise ValueError("keep must be over 0, got 0, which keeps nothing of any expert")
        if self.scale is not None:
            checks.real("scale", self.scale)
            if self.merge == "average":
                raise ValueError(f'scale must be left out with merge="average", got {self.scale}')
        if self.weights is not None and self.merge == "ties":
            raise ValueError('weights must be left out with merge="ties", whose experts vote, got some')

    def shares(self, count: int) -> list[float]:
        """λ of each of so many experts."""
        if self.weights is None:
            return [1 / count] * count
        checks.mixing_weights(self.weights, count)
        return [float(w) for w in self.weights]


State = Mapping[str, torch.Tensor]


def merge_float(experts: Sequence[Any], base: Any = None, **options: Any) -> dict[str, torch.Tensor]:
    """Merge models in full precision into one state dict, of the experts' dtypes.

    Tensors of floating point are merged in float64 (TIES: differences are float32) and rounded once; BatchNorm's
    running statistics are averaged by every merge, since a variance must stay positive. Other tensors must agree and
    stay, but for BatchNorm's count of batches. Files of safetensors are mapped, and one tensor of each is in memory at
    a time; TIES reads them four times, because the threshold of a whole τ is found exactly from two histograms of the
    bits of its magnitudes.

    Args:
        experts: one or more, each a module, a state dict, or a path that
            :func:`hdrq.checkpoint.float_states.read_state` reads.
        base: θ_0, the model that the experts were trained from; for task arithmetic and TIES.
        options: fields of :class:`FloatMerge`.

    Raises:
        FileNotFoundError, TypeError, ValueError: "X must be …, got …"; experts that differ in names, shapes or dtypes,
            or hold numbers that are not finite.
    """
    return dict(merged_floats(experts, base, **options))


def merged_floats(experts: Sequence[Any], base: Any = None, **options: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of :func:`merge_float` one after another, each with its name."""
    settings = checks.made_of(FloatMerge, options)
    experts = list(experts)
    checks.integer("the number of experts", len(experts), 1, 2**16)
    if (base is None) != (settings.merge == "average"):
        needs = "left out" if settings.merge == "average" else "the model that the experts were trained from"
        raise ValueError(
            f'base must be {needs} with merge="{settings.merge}", got {"none" if base is None else type(base).__name__}'
        )
    states = [float_state(f"experts[{k}]", expert) for k, expert in enumerate(experts)]
    origin = None if base is None else float_state("base", base)
    for k, other in enumerate([*states[1:], *([] if origin is None else [origin])], start=1):
        _check_alike(states[0], other, "base" if k == len(states) else f"experts[{k}]")
    shares = settings.shares(len(states))
    ties = _Ties(settings, states, origin) if settings.merge == "ties" and origin is not None else None
    for name, like in states[0].items():
        if not like.is_floating_point():
            yield name, like
            continue
        values = [_finite(name, state[name], k) for k, state in enumerate(states)]
        if origin is None or _is_statistic(name):
            value = weighted_mean(shares, values)
        elif ties is not None:
            value = origin[name].double() + ties.change(name)
        else:
            scale = SCALES["task-arithmetic"] if settings.scale is None else settings.scale
            start = _finite(name, origin[name], -1).double()
            value = start + scale * len(states) * weighted_mean(shares, [v.double() - start for v in values])
        value = value.to(like.dtype)
        if not value.isfinite().all():
            raise ValueError(
                f"{name} must stay finite in {checks.short(like.dtype)}, got a merge beyond it; less scale"
            )
        yield name, value


def float_state(label: str, model: Any) -> State:
    """The tensors of a model in full precision.

    Raises:
        FileNotFoundError, TypeError, ValueError: "X must be …, got …".
    """
    if isinstance(model, nn.Module):
        return tensors_of(model)
    if isinstance(model, str | os.PathLike):
        return read_state(model)
    if not isinstance(model, Mapping):
        raise TypeError(f"{label} must be a module, a state dict or a path, got {type(model).__name__}")
    for name, value in model.items():
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{label} must be tensors by name, got {type(value).__name__} for {name!r}")
    return model


def _check_alike(one: State, other: State, label: str) -> None:
    differences = [f"{name} is in one alone" for name in sorted(one.keys() ^ other.keys())]
    for name in one:
        a, b = one[name], other.get(name)
        if b is None:
            continue
        if a.shape != b.shape or a.is_floating_point() != b.is_floating_point():
            forms = (f"{tuple(v.shape)} {checks.short(v.dtype)}" for v in (a, b))
            differences.append(f"{name} is {' and '.join(forms)}")
        elif not a.is_floating_point() and not _is_statistic(name) and not torch.equal(a, b.to(a.device)):
            differences.append(f"{name} has other integers")
    if differences:
        raise ValueError(f"{label} must be alike to experts[0], got {checks.listed(differences)}")


def _is_statistic(name: str) -> bool:
    return name.rpartition(".")[2] in STATISTICS


def _finite(name: str, value: torch.Tensor, number: int) -> torch.Tensor:
    return checks.finite(f"{name} of {'base' if number < 0 else f'experts[{number}]'}", value.detach().cpu())


class _Ties:
    """The thresholds of trimming and the sign of ties, and from them the change of each tensor."""

    def __init__(self, settings: FloatMerge, states: Sequence[State], base: State) -> None:
        self.settings, self.states, self.base = settings, states, base
        self.names = [n for n, value in base.items() if value.is_floating_point() and not _is_statistic(n)]
        groups = [self.names] if settings.trim == "whole" else [[name] for name in self.names]
        self.thresholds: dict[str, list[float]] = {}
        for group in groups:
            found = [self._threshold(k, group) for k in range(len(states))]
            self.thresholds |= dict.fromkeys(group, found)
        votes = sum(float(self._votes(self._trimmed(name)).sign().sum()) for name in self.names)
        self.majority = 1.0 if votes > 0 else -1.0 if votes < 0 else 0.0

    def change(self, name: str) -> torch.Tensor:
        """``scale·τ`` of a tensor, float64."""
        trimmed = self._trimmed(name)
        sign = self._votes(trimmed).sign()
        sign[sign == 0] = self.majority
        agree = [torch.where(t.sign() == sign, t, 0.0) for t in trimmed]
        total = sum((a.double() for a in agree), torch.zeros_like(sign))
        if self.settings.aggregate == "mean":
            total /= sum((a != 0).double() for a in agree).clamp(min=1)  # type: ignore[union-attr]
        scale = SCALES["ties"] if self.settings.scale is None else self.settings.scale
        return scale * total

    def _difference(self, k: int, name: str) -> torch.Tensor:
        start = _finite(name, self.base[name], -1)
        return (_finite(name, self.states[k][name], k).double() - start.double()).float()

    def _trimmed(self, name: str) -> list[torch.Tensor]:
        found = []
        for k, threshold in enumerate(self.thresholds[name]):
            tau = self._difference(k, name)
            found.append(torch.where(tau.abs() >= threshold, tau, 0.0))
        return found

    @staticmethod
    def _votes(trimmed: Sequence[torch.Tensor]) -> torch.Tensor:
        return sum((t.double() for t in trimmed), torch.zeros_like(trimmed[0], dtype=torch.float64))

    def _threshold(self, k: int, names: Sequence[str]) -> float:
        """The ``(d − ⌊keep·d⌋)``-th smallest magnitude: of numbers over 0, order is that of the bits."""

        def magnitudes() -> Iterator[torch.Tensor]:
            for name in names:
                yield self._difference(k, name).abs().flatten().view(torch.int32)

        count = sum(self.base[name].numel() for name in names)
        rank = count - int((self.settings.keep or 0.0) * count)  # from 1
        if rank < 1:
            return 0.0
        upper = sum(torch.bincount(m >> 15, minlength=2**16) for m in magnitudes()).cumsum(0)  # type: ignore[union-attr]
        high = int((upper < rank).sum())
        rank -= int(upper[high - 1]) if high else 0
        inside = (m[m >> 15 == high] & HALF - 1 for m in magnitudes())
        lower = sum(torch.bincount(m, minlength=HALF) for m in inside).cumsum(0)  # type: ignore[union-attr]
        bits = high << 15 | int((lower < rank).sum())
        return float(torch.tensor(bits, dtype=torch.int32).view(torch.float32))
