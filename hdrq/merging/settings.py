"""The settings of a merge."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hdrq import checks
from hdrq.checks import listed
from hdrq.merging import rules
from hdrq.ops.merging import DRAWING, MODES, NOISES, SELECTIONS, rule_of
from hdrq.quantizers.bits import BitWidths, check_patterns, matches

RULES = ("systematic", "noise", *rules.RULES)
DRAWS = 30
PRESETS = ("paper", "official")


@dataclass(frozen=True)
class MergeSettings:
    """Everything that decides the bits of a merged model, except the models that are merged.

    Args:
        weights: λ, one for each model, summing to 1; None for equal ones. Or those of parts of the models, by patterns
            of which the first that matches a module, or one that it lies in, decides: ``{"stem": (0.8, 0.2), "*":
            (0.5, 0.5)}``. They hold for all that a module has: codes, scales, biases, and the quantizer of what it
            reads, but where several modules share that, the first of them decides. Layers that share a weight must
            have the same.
        rule: ``"systematic"`` or ``"noise"``, as for :func:`hdrq.ops.merge`, or one of
            :data:`hdrq.merging.rules.RULES`; None for ``"noise"`` where an option of its own is given, else
            ``"systematic"``.
        tau: of rule ``"systematic"``.
        draws: of rule ``"noise"``: how many roundings of each layer are tried (None: 30); ``select`` says which is
            kept.
        seed: of the random numbers; stream 64·i serves the i-th layer in the order of names.
        noise, select, mode: of rule ``"noise"``, as for :func:`hdrq.ops.merge`.
        extrapolate: allow negative weights, and with rule ``"requantize"`` weights of any sum. With weights
            (1, m, −m), models A, B and C give ``A + m·(B − C)``.
        bits: of the result, like ``"W4A8"``, where the models differ in bits; where they do not, theirs.

    Raises:
        TypeError, ValueError: "X must be …, got …".
    """

    weights: Sequence[float] | Mapping[str, Sequence[float]] | None = None
    rule: str | None = None
    tau: float | None = None
    draws: int | None = None
    seed: int = 0
    noise: str | None = None
    select: str | None = None
    mode: str | None = None
    extrapolate: bool = False
    bits: str | None = None

    def __post_init__(self) -> None:
        drawing = {name: getattr(self, name) for name in DRAWING}
        object.__setattr__(self, "rule", rule_of(self.rule, self.tau, drawing, RULES))
        checks.integer("seed", self.seed, 0, 2**63 - 1)
        if self.tau is not None:
            checks.real("tau", self.tau, 0.0, 0.5)
        if self.rule == "noise":
            for name, default in {**DRAWING, "draws": DRAWS}.items():
                object.__setattr__(self, name, default if drawing[name] is None else drawing[name])
            checks.integer("draws", self.draws, 1, 2**16)
            for name, known in {"noise": NOISES, "select": SELECTIONS, "mode": MODES}.items():
                checks.choice(name, getattr(self, name), known)
        if self.rule in ("half-up", "half-away") and self.extrapolate:
            raise ValueError(f"rule must be one that extrapolates, got {self.rule!r}")
        if self.bits is not None:
            BitWidths.parse(self.bits)

    @classmethod
    def of(cls, count: int, preset: str | None = None, **options: Any) -> MergeSettings:
        """The settings of a merge of ``count`` models; see :func:`hdrq.merge`.

        Raises:
            TypeError, ValueError: "X must be …, got …"; ``"official"`` for more than two models.
        """
        if preset is None:
            return checks.made_of(cls, options)
        checks.choice("preset", preset, PRESETS)
        if preset == "official" and count != 2:
            raise ValueError(f'preset must be None or "paper" for {count} models, got "official", which merges two')
        chosen: dict[str, Any] = {"rule": "noise"} if count == 2 else {"rule": "half-even"}
        if preset == "official":
            chosen |= {"noise": "odd", "draws": 100, "select": "official"}
        return checks.made_of(cls, {**chosen, **options})

    def weights_of(self, count: int, names: Iterable[str]) -> dict[str, tuple[float, ...]]:
        """λ of each of ``count`` models, as float32 numbers, for each of their tensors.

        Raises:
            TypeError, ValueError: ``weights`` are not as many, do not sum to 1, or are negative without
                ``extrapolate``; a pattern matches no tensor, or a tensor no pattern.
        """
        any_sum = self.extrapolate and self.rule == "requantize"

        def mixing(weights: Any) -> tuple[float, ...]:
            return checks.mixing_weights(weights, count, self.extrapolate, any_sum)

        if not isinstance(self.weights, Mapping):
            return dict.fromkeys(names, mixing(self.weights))
        check_patterns("weights", self.weights)
        known = {pattern: mixing(own) for pattern, own in self.weights.items()}
        chosen = {name: next((p for p in known if matches(name, p)), None) for name in names}
        if missing := [name for name, pattern in chosen.items() if pattern is None]:
            raise ValueError(f'weights must be given for every tensor (end with "*"), got none for {listed(missing)}')
        if unused := [pattern for pattern in known if pattern not in chosen.values()]:
            raise ValueError(
                f"weights must have patterns that match a module that none before matches, got "
                f"{listed(map(repr, unused))}"
            )
        return {name: known[str(pattern)] for name, pattern in chosen.items()}
