"""Recipes as data: what is learned while a block is reconstructed, and how. Knobs are the fields of :class:`Recipe`."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from hdrq import checks

NAMES = ("rtn", "hdrq")
PRESETS = ("paper", "official")


@dataclass(frozen=True)
class Recipe:
    """How a model is quantized.

    ``iterations`` steps are made for each block: first with noise in place of rounding, then, for the last ``tail`` of
    them, with the real fake-quantizer. No iterations is round to nearest.
    """

    name: str
    iterations: int = 20_000
    tail: float = 0.175  # share of the iterations, at the end, that fake-quantize; 1 is all of them: no noise
    noise: str = "uniform"  # of weights: "uniform" or "empirical"
    noise_activations: bool = False  # noise on activations too, while weights have it
    batch_size: int = 32
    weight_lr: float = 1e-3  # Adam, of weights and their scales
    scale_step: float = 0.01  # bound on the rate of a weight's scale, as a share of the scale it starts from
    warmup: float = 0.2  # share of the iterations over which the weights' rate rises from 1e-3 of itself; then cosine
    activation_lr: float = 4e-5  # Adam, cosine, of the activations' scales
    distance: float = 5e-2  # λ of Σ ‖W − W_src‖₂, not squared
    input_keep: float = 0.5  # QDrop: probability that an input of the block is the quantized prefix's
    activation_keep: float = 0.5  # QDrop: probability that an activation is quantized
    norm: float = 2.4  # exponent of the range search
    candidates: int = 100  # clip thresholds of the range search
    range_samples: int = 128  # calibration samples that the scales of activations are searched on
    per_channel: bool = False  # a weight scale for each output channel

    def __post_init__(self) -> None:
        checks.integer("iterations", self.iterations, 0, 2**31)
        if self.name == "rtn" and self.iterations:
            raise ValueError(f'iterations must be 0 for recipe "rtn", got {self.iterations}')
        checks.integer("batch_size", self.batch_size, 1, 2**31)
        checks.integer("candidates", self.candidates, 1, 2**16)
        checks.integer("range_samples", self.range_samples, 1, 2**31)
        checks.choice("noise", self.noise, ("uniform", "empirical"))
        for name in ("noise_activations", "per_channel"):
            checks.choice(name, getattr(self, name), (False, True))
        for name in ("tail", "warmup", "input_keep", "activation_keep"):
            checks.real(name, getattr(self, name), 0.0, 1.0)
        for name in ("weight_lr", "activation_lr", "distance", "norm", "scale_step"):
            checks.real(name, getattr(self, name), 0.0)


_PRESETS = {
    ("hdrq", "paper"): Recipe("hdrq"),
    ("hdrq", "official"): Recipe(
        "hdrq", tail=0.2, noise="empirical", noise_activations=True, weight_lr=1e-4, scale_step=1.0
    ),
    ("rtn", "paper"): Recipe("rtn", iterations=0),
    ("rtn", "official"): Recipe("rtn", iterations=0),
}


def recipe(name: str | Recipe, preset: str = "paper", **knobs) -> Recipe:
    """A recipe by name, as the paper or the released code has it, with knobs of the caller's own.

    Raises:
        ValueError: an unknown name, preset or knob, or a knob out of range.
    """
    if isinstance(name, Recipe):
        base = name
    else:
        checks.choice("recipe", name, NAMES)
        checks.choice("preset", preset, PRESETS)
        base = _PRESETS[name, preset]
    known = tuple(f.name for f in fields(Recipe) if f.name != "name")
    for knob in knobs:
        checks.choice("knob", knob, known)
    return replace(base, **knobs)
