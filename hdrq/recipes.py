"""Recipes as data: what is learned while a block is reconstructed, and how. Knobs are the fields of :class:`Recipe`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from hdrq import checks

NAMES = ("rtn", "brecq", "qdrop", "hdrq", "gptq", "awq")
METHODS = ("learned", "gptq", "awq")
PRESETS = ("paper", "official")
LEARNS = ("weights", "rounding", "activations")
FULL_LENGTH = 20_000  # iterations that the recipes' own rates are for
SHORT = 400  # the fewest that larger rates were measured for
RENAMED = {"tail": "fake_quant_fraction", "placement": "activation_placement"}  # accepted for one release


def knob(default: Any, text: str) -> Any:
    """A field, and what is said of it."""
    return field(default=default, metadata={"text": text})


@dataclass(frozen=True)
class Recipe:
    """How a model is quantized. The defaults are HDRQ's, as the paper has it.

    Each block is learned for ``iterations`` steps; with 0 steps it is rounded to nearest. ``learns`` says what is
    learned of a weight:

    - ``learns="weights"``: the weight and its scale, first with noise in place of rounding and, for the last
      ``fake_quant_fraction`` of the steps, with the real fake-quantizer. This is HDRQ; without noise and distance it
      is QDrop's loop on weights.
    - ``learns="rounding"``: whether each weight is rounded up or down, its scale fixed: ``(floor(w/Δ) + h(α))·Δ`` with
      α learned, and ``rounding_weight·Σ(1 − |2h − 1|^β)`` added to the loss; at the end h is 0 or 1. BRECQ and QDrop.
    - ``learns="activations"``: the scales of activations alone, by ``mean Σ_channels |B_q(x) − y|^norm``.

    With ``method="gptq"`` or ``"awq"`` nothing is learned: one pass over the blocks fits each layer in closed form
    (:class:`hdrq.methods.layerwise.LayerWise`, :class:`hdrq.methods.awq.AWQ`).

    Scales of activations are learned with the weights, or, with ``activation_walk``, after those of all blocks.
    """

    name: str
    learns: str = knob("weights", 'or "rounding", AdaRound\'s α; or "activations", their scales alone')
    iterations: int = knob(20_000, "steps for each block; 0: rounded to nearest")
    fake_quant_fraction: float = knob(
        0.175, "share of the iterations, at the end, that fake-quantize; 1 is all of them: no noise"
    )
    noise: str = knob("uniform", 'of weights: "uniform" or "empirical"')
    noise_activations: bool = knob(False, "noise on activations too, while weights have it")
    batch_size: int = knob(32, "samples of a step")
    judged_samples: int = knob(
        32, "nothing is learned from them, a unit's best state is chosen on them; at most an eighth"
    )
    weight_lr: float = knob(1e-3, "Adam, of weights and their scales, or of α; recipe() raises it for fewer iterations")
    weight_schedule: str = knob("cosine", 'of that rate after its warm-up: "cosine", to 0, or "constant"')
    warmup: float = knob(0.2, "share of the iterations over which the weights' rate rises from 1e-3 of itself")
    scale_step: float = knob(0.01, "bound on the rate of a scale, as a share of the scale it starts from")
    weight_step: float = knob(0.1, "bound on the rate of a weight, as a share of its scale; 0: none")
    activation_walk: float = knob(
        0.0, "share of the iterations, of a second walk over the blocks for activations' scales"
    )
    activation_lr: float = knob(4e-5, "Adam, cosine, of the activations' scales; scale_step bounds it too")
    bias_lr: float = knob(0.0, "Adam, cosine, of the biases of quantized layers; 0: they stay as they are")
    distance: float = knob(5e-2, "λ of Σ ‖W − W_src‖₂, not squared")
    rounding_weight: float = knob(0.01, "of AdaRound's loss")
    rounding_warmup: float = knob(0.2, "share of the iterations, at the start, without AdaRound's loss")
    beta_start: float = knob(20.0, "AdaRound's β after that warm-up …")
    beta_end: float = knob(2.0, "… and at the end")
    beta_schedule: str = knob("linear", '"linear", as the code of BRECQ and QDrop has it, or "cosine", as AdaRound\'s')
    input_keep: float = knob(0.5, "QDrop: probability that an input of the block is the quantized prefix's")
    activation_keep: float = knob(0.5, "QDrop: probability that an activation is quantized")
    norm: float = knob(2.4, "exponent of the range search")
    candidates: int = knob(100, "clip thresholds of the range search")
    range_samples: int = knob(128, "calibration samples that the scales of activations are searched on")
    range_union: bool = knob(False, "a search on each of those samples, of which the widest range is taken")
    quantize_input: bool = knob(True, "quantize what the model itself is called with")
    affine_activations: bool = knob(True, "zero points of activations that take both signs, where they lower the error")
    learn_outputs: bool = knob(False, "what a block reads is quantized and learned by the block that returns it")
    activation_placement: str = knob(
        "qdrop",
        'of quantizers: where layers read ("input"), and where blocks read, unless a norm or a concatenation reads '
        'that first ("qdrop") or always ("block")',
    )
    attention: bool = knob(
        True, "quantize q, k, v and softmax too, where they are modules' (hdrq.prepare.attention says which)"
    )
    per_channel: bool = knob(False, "a weight scale for each output channel")
    group_size: int | None = knob(None, "inputs of a linear layer that share a weight scale; other layers: per channel")
    affine_weights: bool = knob(False, "zero points of weights, where rounding is learned or to nearest")
    method: str = knob("learned", 'in so many iterations; or in closed form: "gptq", "awq"')
    damping: float = knob(0.01, "GPTQ: of H, as a share of the mean of its diagonal")
    act_order: bool = knob(False, "GPTQ: columns in the order of descending diag H; groups stay where they are")
    clip: bool = knob(True, "AWQ: search the clipping of each group for its outputs")

    def __post_init__(self) -> None:
        checks.integer("iterations", self.iterations, 0, 2**31)
        checks.choice("method", self.method, METHODS)
        for label, fixed in (("recipe", self.name == "rtn" and "rtn"), ("method", self.in_closed_form and self.method)):
            if fixed and self.iterations:
                raise ValueError(f'iterations must be 0 for {label} "{fixed}", got {self.iterations}')
        if self.method == "awq" and self.affine_weights:
            raise ValueError('affine_weights must be False for method "awq", whose clipping is symmetric, got True')
        checks.real("damping", self.damping, 0.0)
        checks.integer("batch_size", self.batch_size, 1, 2**31)
        checks.integer("judged_samples", self.judged_samples, 0, 2**31)
        checks.integer("candidates", self.candidates, 1, 2**16)
        checks.integer("range_samples", self.range_samples, 1, 2**31)
        checks.choice("learns", self.learns, LEARNS)
        checks.choice("noise", self.noise, ("uniform", "empirical"))
        checks.choice("activation_placement", self.activation_placement, ("input", "qdrop", "block"))
        checks.choice("weight_schedule", self.weight_schedule, ("cosine", "constant"))
        checks.choice("beta_schedule", self.beta_schedule, ("linear", "cosine"))
        if self.group_size is not None:
            checks.integer("group_size", self.group_size, 1, 2**31 - 1)
        for each in fields(self):
            if each.type == "bool":
                checks.choice(each.name, getattr(self, each.name), (False, True))
        for name in ("fake_quant_fraction", "warmup", "rounding_warmup", "input_keep", "activation_keep"):
            checks.real(name, getattr(self, name), 0.0, 1.0)
        checks.real("activation_walk", self.activation_walk, 0.0)
        if self.activation_walk and self.learns == "activations":
            raise ValueError('activation_walk must be 0 where learns="activations", got one more walk')
        for name in (
            "weight_lr",
            "activation_lr",
            "bias_lr",
            "distance",
            "rounding_weight",
            "norm",
            "scale_step",
            "weight_step",
        ):
            checks.real(name, getattr(self, name), 0.0)
        for name in ("beta_start", "beta_end"):
            checks.real(name, getattr(self, name), 1.0)
        if self.affine_weights and self.learns == "weights" and self.iterations:
            raise ValueError(
                'affine_weights must be False where learns="weights", whose noise knows no zero point, got True'
            )
        if self.learns == "rounding" and (self.fake_quant_fraction != 1 or self.distance != 0):
            raise ValueError(
                'fake_quant_fraction must be 1 and distance 0 where learns="rounding", which knows no noise and leaves '
                f"weights alone, got fake_quant_fraction={self.fake_quant_fraction:g}, distance={self.distance:g}"
            )

    @property
    def in_closed_form(self) -> bool:
        """Whether weights are fitted in one pass over the units, with nothing learned."""
        return self.method != "learned"

    @property
    def needs_source(self) -> bool:
        """Whether weights are learned that the distance pulls towards the source's."""
        return self.iterations > 0 and self.learns == "weights" and self.distance > 0

    def walks(self) -> tuple[Recipe, ...]:
        """What each walk over the blocks learns.

        With ``activation_walk`` the first learns weights and leaves activations in full precision. The second learns
        the scales of activations alone, from what blocks read in full precision.
        """
        if not self.activation_walk:
            return (self,)
        second = replace(
            self,
            learns="activations",
            iterations=max(1, round(self.activation_walk * self.iterations)),
            activation_walk=0.0,
            fake_quant_fraction=1.0,
            distance=0.0,
            input_keep=0.0,
        )
        return self, second


_HDRQ = Recipe("hdrq")
_QDROP = Recipe(
    "qdrop", learns="rounding", fake_quant_fraction=1.0, distance=0.0, weight_schedule="constant", warmup=0.0
)
_BRECQ = replace(_QDROP, name="brecq", input_keep=1.0, activation_keep=1.0)
_RTN = Recipe("rtn", iterations=0)
_GPTQ = Recipe("gptq", iterations=0, method="gptq", per_channel=True)
_AWQ = replace(_GPTQ, name="awq", method="awq")
SOURCES = {
    "rtn": "round to nearest",
    "brecq": "BRECQ (Li et al., ICLR 2021)",
    "qdrop": "QDrop (Wei et al., ICLR 2022)",
    "hdrq": "HDRQ (Shin et al., ICML 2025)",
    "gptq": "GPTQ (Frantar et al., ICLR 2023)",
    "awq": "AWQ (Lin et al., MLSys 2024)",
}
_PAPER = {"rtn": _RTN, "brecq": _BRECQ, "qdrop": _QDROP, "hdrq": _HDRQ, "gptq": _GPTQ, "awq": _AWQ}
_WEIGHTS_AS_RELEASED: dict[str, Any] = {"per_channel": True, "affine_weights": True, "judged_samples": 0}
_OFFICIAL = {
    "rtn": _RTN,
    "gptq": replace(_GPTQ, affine_weights=True),
    "awq": _AWQ,
    "brecq": replace(_BRECQ, **_WEIGHTS_AS_RELEASED, activation_walk=0.25, activation_lr=4e-4, scale_step=1.0),
    "qdrop": replace(_QDROP, **_WEIGHTS_AS_RELEASED, range_samples=256, scale_step=1.0),
    "hdrq": replace(
        _HDRQ,
        fake_quant_fraction=0.2,
        noise="empirical",
        noise_activations=True,
        batch_size=1,
        judged_samples=0,
        weight_lr=1e-4,
        scale_step=1.0,
        range_samples=8,
        range_union=True,
        quantize_input=False,
        affine_activations=False,
        learn_outputs=True,
    ),
}


def recipe(name: str | Recipe, preset: str = "paper", **knobs) -> Recipe:
    """A recipe by name, as the paper or the released code has it, with knobs of the caller's own.

    Fewer iterations than 20,000 have a larger ``weight_lr``, unless it is given or the preset is ``"official"``: the
    product of both is kept, down to 400 iterations. At 400, rates that were chosen on data apart were 27 (HDRQ) to 81
    times (BRECQ, QDrop) those of 20,000 (``docs/reproduction.md``).

    Raises:
        ValueError: an unknown name, preset or knob, or a knob out of range.
    """
    if isinstance(name, Recipe):
        base = name
    else:
        checks.choice("recipe", name, NAMES)
        checks.choice("preset", preset, PRESETS)
        base = (_OFFICIAL if preset == "official" else _PAPER)[name]
    knobs = current_names(knobs)
    known = tuple(f.name for f in fields(Recipe) if f.name != "name")
    for knob in knobs:
        checks.choice("knob", knob, known)
    plan = replace(base, **knobs)
    if (
        isinstance(name, Recipe)
        or preset == "official"
        or "weight_lr" in knobs
        or not 0 < plan.iterations < FULL_LENGTH
    ):
        return plan
    return replace(plan, weight_lr=plan.weight_lr * FULL_LENGTH / max(plan.iterations, SHORT))


def current_names(knobs: Mapping[str, Any]) -> dict[str, Any]:
    """Knobs by the names that they have now. A name of the first house is accepted with a warning.

    Raises:
        ValueError: a knob is given by both of its names.
    """
    found: dict[str, Any] = {}
    for name, value in knobs.items():
        current = RENAMED.get(name, name)
        if current in found or (current != name and current in knobs):
            raise ValueError(f"{current} must be given once, got {name} too, which is its old name")
        if current != name:
            warnings.warn(f"{name} is called {current} now", DeprecationWarning, stacklevel=3)
        found[current] = value
    return found
