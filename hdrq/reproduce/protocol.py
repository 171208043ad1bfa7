"""The protocol, written before any result was looked at: what is compared, and how each method's rates are chosen.

All methods read the same calibration images of a target in the same order, for the same number of iterations a block.
Rates are chosen by one rule: of three, a factor of three apart, the one whose quantized network is nearest to full
precision on calibration images that it does not learn from; on networks of a seed that no table has. Test images choose
nothing. The first and the last layer have 8 bits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

BITS = ("W4A4", "W3A3", "W2A4")
ITERATIONS = 400
FACTORS = (1 / 3, 1.0, 3.0)  # of the rate that a method has by itself
RATE_SEED = 1000  # of the networks that rates are chosen on
RATE_BITS = "W3A3"
HELD_OUT = 100  # of the calibration images, on which rates are chosen

RULES: dict[str, dict[str, Any]] = {
    "nearest": {"rule": "half-even"},
    "noise, first": {"rule": "noise", "draws": 1},
    "noise, best of 30": {"rule": "noise", "draws": 30},
    "systematic": {"rule": "systematic"},
}

TAUS = {f"systematic, tau {tau}": {"rule": "systematic", "tau": tau} for tau in (0.0, 0.05, 0.25, 0.5)}  # beside 0.1
RULE_SETS = {"table": RULES, "tau": TAUS}


@dataclass(frozen=True)
class Method:
    """A way to quantize: a recipe of :func:`hdrq.quantize`, its preset and its knobs."""

    recipe: str
    preset: str = "paper"
    knobs: dict[str, Any] = field(default_factory=dict)

    @property
    def learned(self) -> bool:
        return self.recipe not in ("full precision", "rtn")


METHODS = {
    "full precision": Method("full precision"),
    "RTN": Method("rtn"),
    "BRECQ": Method("brecq"),
    "QDrop": Method("qdrop"),
    "HDRQ, paper": Method("hdrq"),
    "HDRQ, official": Method("hdrq", "official"),
    # The paper's Table 3, one part after another: QDrop's loop on weights, noise in it, and the distance to the source.
    "weights": Method("hdrq", knobs={"distance": 0.0, "fake_quant_fraction": 1.0}),
    "weights, noise": Method("hdrq", knobs={"distance": 0.0}),
    "weights, distance": Method("hdrq", knobs={"fake_quant_fraction": 1.0}),
}
TABLE = ("full precision", "RTN", "BRECQ", "QDrop", "HDRQ, paper", "HDRQ, official")


@dataclass(frozen=True)
class Study:
    """One question: what is varied, and at which bit widths. Every combination is a job.

    Args:
        question: the title of its tables.
        knobs: of the recipe, one set for each job.
        iterations: other numbers have their own rates.
        rules: the name of those that models are merged by.
        beside: methods of the table that it is compared with, the first of them by differences.
    """

    question: str
    methods: tuple[str, ...]
    bits: tuple[str, ...] = BITS
    knobs: tuple[dict[str, Any], ...] = ({},)
    iterations: int = ITERATIONS
    rules: str = "table"
    beside: tuple[str, ...] = ()


_ONE = ("HDRQ, paper",)
STUDIES = {
    "table": Study("How methods compare", TABLE),
    "increments": Study(
        "One part after another",
        ("weights", "weights, noise", "weights, distance"),
        ("W3A3", "W2A4"),
        beside=("QDrop", *_ONE),
    ),
    "distance": Study(
        "The pull towards the source (λ, 0.05 by itself)",
        *(_ONE, ("W3A3",), tuple({"distance": value} for value in (0.0, 1e-2, 1e-1, 5e-1))),
        beside=_ONE,
    ),
    "noise": Study(
        "Which noise, and where",
        *(_ONE, ("W3A3",), ({"noise": "empirical"}, {"noise_activations": True})),
        beside=_ONE,
    ),
    "tau": Study("How near to a tie coins are drawn", ("QDrop", *_ONE), ("W3A3",), rules="tau"),
    "longer": Study("More iterations", ("QDrop", *_ONE), ("W3A3",), iterations=2000, beside=("QDrop", *_ONE)),
}
QUICK = Study("In minutes", ("full precision", "RTN", "QDrop", "HDRQ, paper"), ("W3A3",))  # with the recipes' own rates
