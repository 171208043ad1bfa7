"""Freezing terms of the gradients of quantizers whose scales' gradients are, or are not, in disorder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from hdrq import checks
from hdrq.qat.lsq import quantizers
from hdrq.quantizers.layers import quantized_layers


@dataclass(frozen=True)
class FreezeRule:
    """What is watched, when a layer freezes, and what of its gradient is dropped then.

    The gradient of a step has two terms that sum up to it: that of the task, and that of flatness. With SAGM they are
    ``∇L(θ)/2`` and ``∇L(θ + ε)/2``; with SAM and ASAM ``∇L(θ)`` and ``∇L(θ + ε) − ∇L(θ)``.
    """

    period: int = 200  # K: the steps that a disorder is taken over
    tau: float = 0.25  # the threshold
    every: int | None = None  # steps between two decisions; None: a period. 1 decides at each step, for the next
    monitor: str = "task"  # the term of the scales' gradients that is watched, or "smooth"
    freeze: str = "task"  # the term that is dropped: "task", "smooth", "both", or "alternate", which watches nothing
    when: str = "below"  # freeze where the disorder is below tau, or "above" it; where it is tau, never
    target: str = "scale"  # what loses the term: the quantizer's scale, or all that learns in its "layer"
    granularity: str = "quantizer"  # what has one disorder: a quantizer, or a "layer": the mean of its quantizers'
    thaw: bool = True  # whether a frozen layer thaws when its disorder says so
    compensate: bool = False  # with SAGM, count what is left in full, not by half

    def __post_init__(self) -> None:
        checks.integer("period", self.period, 2, 2**20)
        checks.real("tau", self.tau, 0.0, 1.0)
        if self.every is not None:
            checks.integer("every", self.every, 1, self.period)
        checks.choice("monitor", self.monitor, ("task", "smooth"))
        checks.choice("freeze", self.freeze, ("task", "smooth", "both", "alternate"))
        checks.choice("when", self.when, ("below", "above"))
        checks.choice("target", self.target, ("scale", "layer"))
        checks.choice("granularity", self.granularity, ("quantizer", "layer"))
        for name in ("thaw", "compensate"):
            checks.choice(name, getattr(self, name), (False, True))
        if self.target == "layer" and self.granularity != "layer":
            raise ValueError(f'granularity must be "layer" with target="layer", got {self.granularity!r}')


PRESETS = {
    "gaqat_a": FreezeRule(),  # the task term of scales, where its disorder is low
    "gaqat_b": FreezeRule(freeze="smooth"),  # the flatness term of scales there
    "fqat": FreezeRule(tau=0.45, freeze="both", when="above", target="layer", granularity="layer"),  # unstable ones
    "alternate": FreezeRule(freeze="alternate"),  # one term for a period, then the other
    "forever": FreezeRule(thaw=False),  # as gaqat_a, and what froze stays frozen
}


def disorder(gradients: torch.Tensor) -> float:
    """The share of sign flips of a sequence of gradients, (K, …), over all elements: in [0, 1].

    ::

        δ = Σ_i Σ_k [sign g_i(k+1) ≠ sign g_i(k)] / Σ_i (K_i − 1)

    Zeros are ignored: a sign is compared with the last one that was not zero, and K_i counts those. Constant signs give
    0, alternating ones 1, independent symmetric ones ½ in the mean; positive factors change nothing. Where nothing can
    be compared it is NaN, and a freezer does not freeze.

    Source: written from the reviews of GAQAT; the paper's own formula could not be had (``docs/qat.md``).
    """
    checks.tensor("gradients", gradients, (torch.float64, *checks.FLOATS))
    if gradients.ndim == 0 or len(gradients) < 2:
        raise ValueError(f"gradients must be a sequence of two or more, got {tuple(gradients.shape)}")
    flips, compared = _flips(gradients.sign().flatten(1) if gradients.ndim > 1 else gradients.sign()[:, None])
    count = int(compared.sum())
    return int(flips.sum()) / count if count else float("nan")


class DisorderFreezer:
    """Watches the gradients of a prepared model's scales, and drops terms of the gradients of layers that it freezes.

    It is given to :class:`hdrq.qat.SAM`, ``ASAM`` or ``SAGM`` as ``freezer``, and works by itself from then on. Until
    the first ``period`` steps are done nothing is frozen. Then every ``every`` steps a decision is made for the steps
    that follow, from the disorder (:func:`disorder`) of the last ``period``. What is dropped is still recorded, so a
    layer thaws when its disorder says so. A parameter of which nothing is left has no gradient, and the optimizer
    leaves it as it is: no momentum, no weight decay.

    Args:
        model: as :func:`hdrq.qat.prepare` returns it.
        preset: ``"gaqat_a"``, ``"gaqat_b"``, ``"fqat"``, ``"alternate"`` or ``"forever"``. Which of them the paper
            means is not known (``docs/qat.md``); K and tau are guesses in all of them.
        rule: any fields of :class:`FreezeRule` in the place of the preset's.

    Attributes:
        history: for each decision a dict: ``step``, ``disorder`` by name (None where nothing could be compared), and
            ``frozen``, the names that are frozen for the steps that follow.

    Raises:
        TypeError, ValueError: "X must be …, got …": no quantizers, period under 2, tau outside [0, 1].
    """

    def __init__(self, model: nn.Module, preset: str = "gaqat_a", **rule: Any) -> None:
        base = PRESETS[checks.choice("preset", preset, tuple(PRESETS))]
        for name in rule:
            checks.choice("rule", name, tuple(FreezeRule.__dataclass_fields__))
        self.rule = replace(base, **rule)
        self.scales = {n: q.scale for n, q in quantizers(model).items() if q.scale.requires_grad}
        if not self.scales:
            raise ValueError(
                f"model must be prepared by hdrq.qat.prepare, got a {type(model).__name__} whose scales do not learn"
            )
        self.members: dict[str, list[str]] = {}
        for name in self.scales:
            owner = name.rpartition(".")[0] if self.rule.granularity == "layer" else name
            self.members.setdefault(owner, []).append(name)
        self.targets = {owner: self._learned(model, owner) for owner in self.members}
        self.steps = 0  # that were recorded
        self.frozen: list[str] = []
        self.history: list[dict[str, Any]] = []
        self._sizes = [scale.numel() for scale in self.scales.values()]
        self._signs: torch.Tensor | None = None  # int8, (period, elements of all scales): a ring

    def check(self, parameters: Sequence[nn.Parameter], averages: bool) -> None:
        """Refuse an optimizer that does not step all that may be frozen, or a rule that it has no terms for."""
        known = {id(p) for p in parameters}
        if missing := [name for name, scale in self.scales.items() if id(scale) not in known]:
            raise ValueError(
                f"optimizer must have the scales that freezer watches, got none of {checks.listed(missing)}"
            )
        if self.rule.compensate and not averages:
            raise ValueError("compensate must be False but with SAGM, whose terms count by half, got True")

    def step(self, terms: Callable[[nn.Parameter], tuple[torch.Tensor | None, torch.Tensor | None]]) -> None:
        """Drop what is frozen from the gradients that the optimizer is about to use, record, and decide.

        Args:
            terms: of a parameter's gradient: that of the task, and that of flatness; None for a zero.
        """
        dropped = self._dropped()
        for owner in self.members if self.rule.freeze == "alternate" else self.frozen:
            for p in self.targets[owner]:
                task, smooth = terms(p)
                left = {"task": smooth, "smooth": task, "both": None}[dropped]
                p.grad = 2 * left if left is not None and self.rule.compensate else left
        if self.rule.freeze != "alternate":
            self._record([terms(scale)[self.rule.monitor == "smooth"] for scale in self.scales.values()])
        self.steps += 1
        due = self.rule.every or self.rule.period
        if self.rule.freeze != "alternate" and self.steps >= self.rule.period and self.steps % due == 0:
            self._decide()

    def disorders(self) -> dict[str, float | None]:
        """The disorder over the last period, by name; None where nothing can be compared."""
        if self._signs is None:
            return dict.fromkeys(self.members)
        flips, compared = (t.tolist() for t in self._counts(self._signs))
        own = {n: f / c if c else None for n, f, c in zip(self.scales, flips, compared, strict=True)}
        found: dict[str, float | None] = {}
        for owner, names in self.members.items():
            known = [value for name in names if (value := own[name]) is not None]
            found[owner] = sum(known) / len(known) if known else None
        return found

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides what follows: numbers, names, and one tensor of signs, int8."""
        signs = torch.zeros(0, dtype=torch.int8) if self._signs is None else self._signs.clone()
        history = [dict(decision) for decision in self.history]
        return {"steps": self.steps, "frozen": list(self.frozen), "history": history, "signs": signs}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state.

        Raises:
            ValueError: it is of another model or another period.
        """
        signs, wanted = state["signs"], (self.rule.period, sum(self._sizes))
        unknown = [name for name in state["frozen"] if name not in self.members]
        if unknown or (signs.numel() and tuple(signs.shape) != wanted):
            got = f"{tuple(signs.shape)} signs" if not unknown else checks.listed(unknown)
            raise ValueError(f"state must be of a freezer of this model and rule, with {wanted} signs, got {got}")
        self.steps, self.frozen, self.history = state["steps"], list(state["frozen"]), list(state["history"])
        device = next(iter(self.scales.values())).device
        self._signs = signs.to(device, copy=True) if signs.numel() else None

    def _learned(self, model: nn.Module, owner: str) -> list[nn.Parameter]:
        """What loses a term where ``owner`` is frozen."""
        found: list[nn.Parameter] = [self.scales[name] for name in self.members[owner]]
        layer = quantized_layers(model).get(owner) if self.rule.target == "layer" else None
        if layer is not None:
            found += [
                p for p in (layer.latent, getattr(layer.module, "bias", None)) if p is not None and p.requires_grad
            ]
        return found

    def _dropped(self) -> str:
        """The term that is dropped in this step."""
        if self.rule.freeze != "alternate":
            return self.rule.freeze
        return ("smooth", "task")[self.steps // self.rule.period % 2]

    def _record(self, gradients: Sequence[torch.Tensor | None]) -> None:
        device = next(iter(self.scales.values())).device
        if self._signs is None:
            self._signs = torch.zeros(self.rule.period, sum(self._sizes), dtype=torch.int8, device=device)
        zeros = torch.zeros(max(self._sizes), device=device)
        row = [zeros[:n] if g is None else g.flatten() for g, n in zip(gradients, self._sizes, strict=True)]
        self._signs[self.steps % self.rule.period] = torch.cat(row).sign().to(torch.int8)

    def _counts(self, signs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Flips, and pairs that were compared, of each quantizer."""
        in_order = signs.roll(-(self.steps % self.rule.period), 0)
        of = torch.arange(len(self._sizes)).repeat_interleave(torch.tensor(self._sizes))
        both = [part.sum(0).cpu() for part in _flips(in_order)]
        flips, compared = (torch.zeros(len(self._sizes), dtype=torch.int64).index_add_(0, of, part) for part in both)
        return flips, compared

    def _decide(self) -> None:
        found = self.disorders()
        below = self.rule.when == "below"
        chosen = {n for n, d in found.items() if d is not None and (d < self.rule.tau if below else d > self.rule.tau)}
        kept = set() if self.rule.thaw else set(self.frozen)
        self.frozen = [name for name in self.members if name in chosen | kept]
        self.history.append({"step": self.steps, "disorder": found, "frozen": list(self.frozen)})


def _flips(signs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where, of signs (K, n), one differs from the last that was not zero, and where there is such a pair."""
    step = torch.arange(len(signs), device=signs.device)[:, None]
    last = torch.where(signs != 0, step, -1).cummax(0).values[:-1]
    before = signs.gather(0, last.clamp(min=0))
    compared = (signs[1:] != 0) & (last >= 0)
    return compared & (signs[1:] != before), compared
