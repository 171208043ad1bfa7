"""How other codes' quantizers round, differentiate and draw, as calls of our ops; what their arguments are, by name."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from hdrq import checks, ops
from hdrq.compat import functional
from hdrq.ops.fakequant import GRADIENTS, ROUNDINGS
from hdrq.rng import rng_state

ROLES = {  # what an argument is, by the names that codes give it
    "x": ("x", "X", "w", "weight", "weights", "input", "tensor", "x_in"),
    "scale": ("scale", "delta", "alpha", "step", "step_size", "s"),
    "zero_point": ("zero_point", "zp", "offset", "zero"),
    "quant_min": ("quant_min", "qmin", "Qn", "q_min", "n_min", "low"),
    "quant_max": ("quant_max", "qmax", "Qp", "q_max", "n_max", "high"),
    "ch_axis": ("ch_axis", "axis", "channel_axis"),
    "grad_factor": ("grad_factor", "g", "factor"),
}
ROLE_OF = {name: role for role, names in ROLES.items() for name in names}
NEEDED = {"x", "scale", "quant_min", "quant_max"}
NAMES = re.compile(r"quant|lsq", re.IGNORECASE)
NOISY = re.compile(r"nois", re.IGNORECASE)


class Unlike(Exception):
    """A function is none that we know, for the reason given."""


@dataclass(frozen=True)
class Convention:
    """How a function without noise rounds and differentiates: options of :func:`functional.fake_quantize`."""

    rounding: str = "quotient"
    gradient: str = "round-first"
    zero_point_rounding: str | None = "half-even"
    uses_zero_point: bool = True

    def __str__(self) -> str:
        zero = "" if self.uses_zero_point else ", zero point ignored"
        return f"rounding={self.rounding!r}, gradient={self.gradient!r}{zero}"

    def __call__(self, x, scale, quant_min, quant_max, zero_point=None, ch_axis=None, grad_factor=1.0) -> torch.Tensor:
        return functional.fake_quantize(
            x,
            scale,
            zero_point if self.uses_zero_point else None,
            quant_min,
            quant_max,
            ch_axis,
            float(grad_factor),
            rounding=self.rounding,
            gradient=self.gradient,
            zero_point_rounding=self.zero_point_rounding,
        )

    def direct(self, x, scale, quant_min, quant_max, zero_point=None, ch_axis=None, grad_factor=1.0) -> Convention:
        """:class:`Direct` where our op takes such arguments nearly as they are, else the convention itself."""
        own = [scale] if zero_point is None or not self.uses_zero_point else [scale, zero_point]
        if not all(isinstance(t, torch.Tensor) and (t.device, t.shape) == (x.device, scale.shape) for t in own):
            return self
        if scale.dtype != torch.float32 or x.dtype not in checks.FLOATS or own[-1].is_complex():
            return self
        if scale.numel() == 1 and ch_axis not in (None, -1):  # of an axis that is as long in this call
            return self
        view, axis = functional._view(x, scale, ch_axis)
        return Direct(**vars(self), axis=axis) if view is x else self


@dataclass(frozen=True)
class Direct(Convention):
    """A convention for calls alike in devices, dtypes, dimensions of x, and shapes of scale and zero point.

    What :func:`functional.fake_quantize` finds out at each call, which takes longer than a small tensor, is known.
    """

    axis: int | None = None

    def __call__(self, x, scale, quant_min, quant_max, zero_point=None, ch_axis=None, grad_factor=1.0) -> torch.Tensor:
        if not x.is_contiguous():
            return super().__call__(x, scale, quant_min, quant_max, zero_point, ch_axis, grad_factor)
        zero_point = zero_point if self.uses_zero_point else None
        return ops.fake_quantize(
            x,
            scale if scale.requires_grad else scale.clone(),
            quant_min,
            quant_max,
            zero_point=functional._own(zero_point, quant_min, quant_max, self.zero_point_rounding),
            axis=self.axis,
            grad_scale=float(grad_factor),
            rounding=self.rounding,
            gradient=self.gradient,
        )


# Those whose zero point is ignored come last, and have no rounding of it.
CONVENTIONS = [
    Convention(rounding, gradient, zero, uses)
    for uses, rounding, gradient, zero in itertools.product((True, False), ROUNDINGS, GRADIENTS, functional.ZERO_POINTS)
    if uses or zero is None
]


class Noise:
    """The released HDRQ's noise: empirical, of the elements inside, clipped at the bounds. A call draws anew."""

    def __init__(self, seed: int, stream: int) -> None:
        self.seed, self.stream, self.steps = seed, stream, itertools.count()

    def __str__(self) -> str:
        return f"empirical noise, seed={self.seed}, stream={self.stream}"

    def __call__(self, x, scale, quant_min, quant_max, zero_point=None, ch_axis=None, grad_factor=1.0) -> torch.Tensor:
        refuse_to_draw_again()
        state = rng_state(self.seed, self.stream, next(self.steps) % 2**32, x.device)
        return functional.noise_quantize(x, scale, quant_min, quant_max, state, ch_axis, float(grad_factor))


def refuse_to_draw_again() -> None:
    """Activation checkpointing runs a forward pass again inside the backward pass, and expects the first one's noise.

    Raises:
        RuntimeError: a backward pass is running.
    """
    if torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            "noise must not be drawn inside a backward pass, got a forward pass that activation checkpointing runs "
            "again: its noise would be another one, and the gradients wrong. Leave the quantizer out of the checkpoint"
        )


def roles_of(names: Iterable[str]) -> dict[str, str]:
    """The roles of a function's arguments, by their names, in order.

    Raises:
        Unlike: an argument has no role we know, or one that a quantizer needs is missing.
    """
    names = list(names)
    if unknown := [name for name in names if name not in ROLE_OF]:
        raise Unlike(f"it takes {', '.join(unknown)}, which we do not know")
    roles = {name: ROLE_OF[name] for name in names}
    if missing := NEEDED - set(roles.values()):
        raise Unlike(f"it takes no {', '.join(sorted(missing))}")
    if len(set(roles.values())) < len(roles):
        raise Unlike("two of its arguments mean the same to us")
    return roles
