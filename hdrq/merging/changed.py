"""Changing one tensor: a quantized weight on its own grid, by one of the rules, or a tensor in float."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import prod
from typing import NamedTuple

import torch

from hdrq import checks, ops
from hdrq.backends.eager.systematic import drawn_together, group_words
from hdrq.backends.reference.systematic import GROUP, UNIT
from hdrq.calibrate.gptq import gptq
from hdrq.calibrate.moments import Moments
from hdrq.merging.weights import Plain, Quantized, Rows, as_matrix, matrix_shape, slabs

RULES = ("systematic", "nearest", "noise", "calibrated")


@dataclass(frozen=True)
class ChangedTensor:
    """What became of the change δ of one tensor, W in the model and W' in the result."""

    name: str
    elements: int
    rule: str  # that rounded it; "float": it is not quantized
    change: float  # ‖δ‖₂
    steps: float | None  # root mean square of δ/Δ; None in float
    kept: float  # ⟨W' − W, δ⟩ / ⟨δ, δ⟩: the slope of what changed over what should have, 1 if all of it arrived
    error: float  # ‖(W' − W) − δ‖₂ / ‖δ‖₂: of outputs too, relative to their change, if inputs are independent
    input_error: float | None  # the same of outputs for the inputs of calibration data: ‖((W' − W) − δ)·Xᵀ‖ / ‖δ·Xᵀ‖
    clipped: float  # share of elements that the range clipped
    dead: int = 0  # inputs that were 0 in all calibration data, by rule "calibrated"

    def as_dict(self) -> dict:
        """For JSON."""
        return asdict(self)


class _Sums:
    """What :class:`ChangedTensor` is made of, over the slabs of a tensor, in float64."""

    def __init__(self, name: str, shape: tuple[int, ...], moments: Moments | None) -> None:
        self.name, self.shape, self.moments = name, shape, moments
        self.totals = torch.zeros(4, dtype=torch.float64)
        self.clipped = 0
        size = (0, 0) if moments is None else matrix_shape(shape)
        self.wanted, self.missed = (torch.empty(size, dtype=torch.float64) for _ in range(2))

    def add(self, some: slice, change: torch.Tensor, made: torch.Tensor, steps: torch.Tensor, clipped: int) -> None:
        """A slab: δ, W' − W and δ/Δ."""
        missed = made - change
        pairs = ((change, change), (made, change), (missed, missed), (steps, steps))
        self.totals += torch.stack([(a * b).sum() for a, b in pairs])
        self.clipped += clipped
        if self.moments is not None:
            self.wanted[some], self.missed[some] = change, missed

    def result(self, rule: str, in_steps: bool, dead: int = 0) -> ChangedTensor | None:
        """None where nothing should change."""
        squared, product, missed, steps = self.totals.tolist()
        if squared == 0:
            return None
        elements = prod(self.shape)
        return ChangedTensor(
            self.name,
            elements,
            rule,
            change=squared**0.5,
            steps=(steps / elements) ** 0.5 if in_steps else None,
            kept=product / squared,
            error=(missed / squared) ** 0.5,
            input_error=self._input_error(),
            clipped=self.clipped / elements,
            dead=dead,
        )

    def _input_error(self) -> float | None:
        if self.moments is None:
            return None
        wanted, missed = (
            float((matrix @ self.moments.hessian * matrix).sum())
            for matrix in (self.moments.matrices(value.reshape(self.shape)) for value in (self.wanted, self.missed))
        )
        return (missed / wanted) ** 0.5 if wanted > 0 else None


def changed_weight(
    name: str,
    old: Quantized,
    change: Rows,
    rule: str,
    rng: torch.Tensor,
    moments: Moments | None = None,
    damping: float = 0.01,
) -> tuple[torch.Tensor, ChangedTensor | None]:
    """The codes of a quantized weight after a change, its scale and zero point staying as they are.

    Equation, in float64, with the position ``v = (I − z) + δ/Δ``: ``I' = clamp(rounded(v) + z, qmin, qmax)``. Rules::

        "nearest"     round_half_even(v)
        "systematic"  up from floor(v) with the probability of what is left, the coins of each group of 1,024
                      neighbours drawn together: rule "systematic" of hdrq.ops.merge at tau = ½
        "noise"       round_half_even(v + n), n ~ U[−½, ½) of each element's own word
        "calibrated"  column by column, later ones making up for errors of earlier ones, hdrq.calibrate.gptq.gptq

    Args:
        rng: of the layer.
        moments: of the layer's inputs, for rule "calibrated", which without them is "systematic", and for the error.

    Returns:
        Codes as ``old`` has them, and what became of the change; None where it is zero.
    """
    (low, high), shape = old.facts["range"], tuple(old.codes.shape)
    if rule == "calibrated" and moments is None:
        rule = "systematic"
    rounding = _rounding(old, change, rule, rng, moments, damping)
    codes, sums = torch.empty_like(as_matrix(old.codes)), _Sums(name, shape, moments)
    for some in slabs(shape):
        zero, step = old.zero(some), old.step(some)
        before = old.integers(some) - zero
        delta = checks.finite(f"the change of {name}", change.rows(some))
        steps = delta / step
        after = rounding.rounded(some, before, steps)
        clamped = after.clamp(low - zero, high - zero)
        outside = (before + steps).round() if rule == "calibrated" else after
        clipped = int(((outside < low - zero) | (outside > high - zero)).sum())
        codes[some] = (clamped + zero).to(codes.dtype)
        sums.add(some, delta, (clamped - before) * step, steps, clipped)
    return codes.view(shape), sums.result(rounding.rule, True, rounding.dead)


def changed_float(name: str, old: Plain, change: Rows) -> tuple[torch.Tensor, ChangedTensor | None]:
    """A tensor in float with a change, rounded once to its type.

    Raises:
        ValueError: it is not finite, or a variance not positive.
    """
    value, sums = old.value.clone(), _Sums(name, tuple(old.value.shape), None)
    matrix, before = as_matrix(value), as_matrix(old.value)
    for some in slabs(value.shape):
        delta, was = change.rows(some), before[some].double()
        after = (was + delta).to(value.dtype)
        moved = delta != 0  # a mask's −∞ may stay
        if not (after.isfinite() | ~moved).all():
            raise ValueError(
                f"{name} must stay finite in {checks.short(value.dtype)}, got a change beyond it; less scale"
            )
        if name.endswith("running_var") and not (after > 0).all():
            raise ValueError(f"{name} must stay positive, got {float(after.min()):g}; less scale, or leave it out")
        matrix[some] = after
        sums.add(some, delta, torch.where(moved, after.double() - was, 0.0), torch.zeros(1), 0)
    return value, sums.result("float", False)


class _Rounding(NamedTuple):
    """``rounded(rows, J, δ/Δ)`` gives J' before the clamp, J being ``I − z``."""

    rounded: Callable[[slice, torch.Tensor, torch.Tensor], torch.Tensor]
    rule: str  # what it is in the end
    dead: int = 0


def _rounding(old: Quantized, change: Rows, rule: str, rng: torch.Tensor, moments, damping: float) -> _Rounding:
    shape = old.codes.shape
    width = matrix_shape(shape)[1]
    if rule == "nearest":
        return _Rounding(lambda some, before, steps: (before + steps).round(), rule)
    if rule == "noise":
        # What noise_quantize makes of zeros is the noise itself.
        noise = ops.noise_quantize(torch.zeros(shape), torch.ones(1), -1, 1, rng)
        return _Rounding(lambda some, before, steps: (before + steps + as_matrix(noise)[some]).round(), rule)
    if rule == "systematic":
        words = group_words(rng, shape.numel())

        def together(some: slice, before: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
            low = steps.floor()
            p = ((steps - low) * 2**UNIT).int().flatten()
            up = drawn_together(p, words[some.start * width // GROUP : -(-some.stop * width // GROUP)])
            return before + low + up.view_as(low)

        return _Rounding(together, rule)
    whole, (low, high) = slice(None), old.facts["range"]
    step, zero = (v.expand(matrix_shape(shape)) for v in (old.step(whole), old.zero(whole)))
    wanted = checks.finite("the change", old.rows(whole) + change.rows(whole))
    parts = zip(
        *(moments.matrices(value.reshape(shape)) for value in (wanted, step, zero)), moments.hessian, strict=True
    )
    found = [
        gptq(w, h, s, low, high, zero_point=z, damping=damping, act_order=True, zero_dead=False) for w, s, z, h in parts
    ]
    codes = as_matrix(moments.weight(torch.stack([part.codes for part in found]), shape))
    return _Rounding(
        lambda some, before, steps: codes[some].double() - old.zero(some),
        "nearest" if any(part.fell_back for part in found) else rule,
        sum(part.dead for part in found),
    )
