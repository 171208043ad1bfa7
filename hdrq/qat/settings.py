"""Every setting of a training run, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hdrq import checks
from hdrq.qat.flatness import PERTURBED
from hdrq.qat.freezing import PRESETS, FreezeRule

SELECTIONS = ("source", "last", "oracle")
SAID = {
    "source": "the epoch of the best mean accuracy on samples of the training domains that nothing was learned from",
    "last": "the last epoch",
    "oracle": "the epoch of the best accuracy on samples of the domain that was left out, which no fair method can see",
}


@dataclass(frozen=True)
class Training:
    """How :func:`hdrq.qat.train` trains. The defaults are LSQ's; rho and alpha are SAGM's.

    Of FQAT's own settings none is known (``docs/qat.md``).
    """

    bits: str | Mapping[str, str] = "W4A4"  # as hdrq.qat.prepare; "float" trains without quantizers
    edges: int | str | None = None  # these six as hdrq.qat.prepare
    per_channel: bool = False
    init: str = "lsq"
    grad_factor: str = "tensor"
    batchnorm: str = "fold"
    placement: Mapping[str, Any] = field(default_factory=dict)  # the knobs of hdrq.qat.prepare
    flatness: str | None = None  # "sam", "asam" or "sagm"; None is the optimizer's plain step
    rho: float | None = None  # None: 0.05, of "asam" 0.5
    alpha: float = 0.001  # of "sagm"
    perturb: str = "latent"
    perturb_scales: bool = False
    freeze: str | None = None  # a preset of hdrq.qat.DisorderFreezer; None freezes nothing
    rule: Mapping[str, Any] = field(default_factory=dict)  # fields of hdrq.qat.FreezeRule: period, tau, …
    optimizer: str = "sgd"  # or "adam", "adamw"
    lr: float = 0.01
    scale_lr: float | None = (
        None  # of quantizers' scales; None: lr. Adam, whose steps know no gradient factor, wants less
    )
    momentum: float = 0.9  # of "sgd"
    weight_decay: float = 1e-4  # of everything but scales
    schedule: str = "cosine"  # of both rates, to 0, step by step; or "constant"
    epochs: int = 30  # one is as many steps as the largest training domain needs
    batch_size: int = 32  # samples of each training domain in a step
    parts: int = 1  # that a batch is run in, to save memory; BatchNorm that is kept sees each by itself
    label_smoothing: float = 0.0
    autocast: str | None = None  # "bfloat16" or "float16", while it trains
    validation: float = 0.2  # share of each domain that nothing is learned from
    select: str = "source"  # of the epochs: "source", "last" or "oracle"
    calibration: int = 128  # samples of the training domains that ranges are taken from
    seed: int = 0

    def __post_init__(self) -> None:
        checks.choice("flatness", self.flatness, (None, "sam", "asam", "sagm"))
        checks.choice("perturb", self.perturb, PERTURBED)
        checks.choice("optimizer", self.optimizer, ("sgd", "adam", "adamw"))
        checks.choice("schedule", self.schedule, ("cosine", "constant"))
        checks.choice("select", self.select, SELECTIONS)
        checks.choice("autocast", self.autocast, (None, "bfloat16", "float16"))
        for name in ("perturb_scales", "per_channel"):
            checks.choice(name, getattr(self, name), (False, True))
        for name in ("epochs", "batch_size", "parts", "calibration"):
            checks.integer(name, getattr(self, name), 1, 2**31)
        checks.integer("seed", self.seed, 0, 2**63 - 1)
        for name in ("alpha", "lr", "momentum", "weight_decay"):
            checks.real(name, getattr(self, name), 0.0)
        for name in ("rho", "scale_lr"):
            if getattr(self, name) is not None:
                checks.real(name, getattr(self, name), 0.0)
        checks.real("label_smoothing", self.label_smoothing, 0.0, 1.0)
        checks.real("validation", self.validation, 0.0, 0.5)
        if self.freeze is not None:
            checks.choice("freeze", self.freeze, (None, *PRESETS))
            for name in self.rule:
                checks.choice("rule", name, tuple(FreezeRule.__dataclass_fields__))
            FreezeRule(**{**PRESETS[self.freeze].__dict__, **self.rule})
            if self.flatness is None:
                raise ValueError(f'flatness must be "sam", "asam" or "sagm" with freeze={self.freeze!r}, got None')
        elif self.rule:
            raise ValueError(f"rule must be left out without freeze, got {dict(self.rule)}")
        if not self.quantizes and (self.freeze is not None or self.perturb == "quantized" or self.perturb_scales):
            raise ValueError(
                'bits must be those of quantizers with freeze, perturb="quantized" or perturb_scales, got "float"'
            )

    @property
    def quantizes(self) -> bool:
        return self.bits != "float"

    @property
    def caption(self) -> str:
        """What a table of a run's numbers must say."""
        steps = f"{self.flatness or 'plain'} steps, freezing {self.freeze or 'nothing'}"
        return f"{self.bits}, {steps}, seed {self.seed}; selected: {SAID[self.select]}"
