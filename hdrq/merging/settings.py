"""The settings of a merge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hdrq import checks
from hdrq.merging import rules
from hdrq.ops.merging import MODES, NOISES, SELECTIONS

RULES = ("noise", *rules.RULES)


@dataclass(frozen=True)
class MergeSettings:
    """Everything that decides the bits of a merged model, except the models that are merged.

    Args:
        weights: λ, one for each model, summing to 1; None for equal ones.
        draws: how many roundings of each layer are tried; ``select`` says which is kept.
        seed: of the noise; stream 64·i serves the i-th layer in the order of names.
        noise, select, mode: as for :func:`hdrq.ops.merge`.
        rule: ``"noise"`` for noise-sampled rounding, or one of :data:`hdrq.merging.rules.RULES` in its place.
        extrapolate: allow negative weights.

    Raises:
        TypeError, ValueError: "X must be …, got …".
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

    def weights_of(self, count: int) -> tuple[float, ...]:
        """λ of each of ``count`` models, as float32 numbers.

        Raises:
            TypeError, ValueError: ``weights`` are not as many, do not sum to 1, or are negative without
                ``extrapolate``.
        """
        return checks.mixing_weights(self.weights, count, self.extrapolate)
