"""What a quantizer function of another code computes: found by its arguments' names, and by trying it on small numbers.

A function is what one of :data:`CONVENTIONS` computes on every probe, its values bit for bit and its gradients within
round-off, or it is left alone: names say nothing about a fork that changed the arithmetic.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch

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
    learns_zero_point: bool = True  # with the gradient that we give it

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


CONVENTIONS = [
    Convention(rounding, gradient, zero, uses)
    for uses, rounding, gradient, zero in product((True, False), ROUNDINGS, GRADIENTS, functional.ZERO_POINTS)
    if (zero is not None or rounding == "shifted") and (uses or zero == "half-even")
]


class Noise:
    """The released HDRQ's noise: empirical, of the elements inside, clipped at the bounds. A call draws anew."""

    def __init__(self, seed: int, stream: int) -> None:
        self.seed, self.stream, self.calls = seed, stream, 0

    def __str__(self) -> str:
        return f"empirical noise, seed={self.seed}, stream={self.stream}"

    def __call__(self, x, scale, quant_min, quant_max, zero_point=None, ch_axis=None, grad_factor=1.0) -> torch.Tensor:
        state = rng_state(self.seed, self.stream, self.calls % 2**32, x.device)
        self.calls += 1
        return functional.noise_quantize(x, scale, quant_min, quant_max, state, ch_axis, float(grad_factor))


def roles_of(names: list[str]) -> list[str]:
    """The roles of a function's arguments, of these names, in order.

    Raises:
        Unlike: an argument has no role we know, or one that a quantizer needs is missing.
    """
    unknown = [name for name in names if name not in ROLE_OF]
    if unknown:
        raise Unlike(f"it takes {', '.join(unknown)}, which we do not know")
    roles = [ROLE_OF[name] for name in names]
    missing = [role for role in NEEDED if role not in roles]
    if missing:
        raise Unlike(f"it takes no {', '.join(sorted(missing))}")
    if len(set(roles)) < len(roles):
        raise Unlike("two of its arguments mean the same to us")
    return roles


def recognised(function: Callable, roles: list[str]) -> Convention:
    """The convention of a function without noise.

    Raises:
        Unlike: it computes otherwise than all of :data:`CONVENTIONS`, or fails.
    """
    left = [replace(convention, learns_zero_point=learns) for learns in (True, False) for convention in CONVENTIONS]
    by_role = _by_role(function, roles)
    for arguments in probes(roles):
        want = _outcome(by_role, arguments)
        left = [c for c in left if _same(_outcome(c, arguments), want, zero_points=c.learns_zero_point)]
        if not left:
            raise Unlike("on small numbers it computes otherwise than any quantizer that we know")
    return left[0]


def check_noise(function: Callable, roles: list[str]) -> None:
    """Whether a function adds noise as the released HDRQ does, as far as one call of many elements shows.

    Raises:
        Unlike: it does not, or fails.
    """
    x = torch.randn(3, 8192, generator=torch.Generator().manual_seed(0))
    scale = torch.tensor([0.375, 0.75, 0.25]) if "ch_axis" in roles else torch.tensor([0.375])
    arguments = {"x": x, "scale": scale, "zero_point": torch.full_like(scale, 2), "quant_min": -4, "quant_max": 3}
    arguments |= {"ch_axis": 0, "grad_factor": 0.25}
    arguments = {role: arguments[role] for role in roles}
    by_role = _by_role(function, roles)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        outcomes = [_outcome(by_role, arguments) for _ in range(2)]
    (y, gradients), (again, _) = outcomes
    ours, expected = _outcome(Noise(0, 0), arguments)
    if y.shape != x.shape or "x" not in gradients or not gradients["x"].any():
        raise Unlike("it returns no tensor like x, or gives x no gradient")
    if "scale" not in gradients or "zero_point" in gradients:
        raise Unlike("it gives its scale no gradient, or its zero point one")
    inside = gradients["x"] != 0
    if torch.equal(y, again):
        raise Unlike("its name speaks of noise, and it draws none")
    if not torch.equal(y[~inside], ours[~inside]) or not torch.allclose(gradients["x"], expected["x"], rtol=1e-5):
        raise Unlike("it clips, or differentiates, otherwise than the released HDRQ's noise")
    steps = scale.reshape(-1, 1)
    distance = _kolmogorov_smirnov(((y - x) / steps)[inside], ((ours - x) / steps)[inside])
    if not distance < 1.95 * (2 / int(inside.sum())) ** 0.5:  # exceeded by chance in one of a thousand
        raise Unlike(f"its noise has another distribution than the released HDRQ's, by {distance:.3f}")


def probes(roles: list[str]) -> Iterator[dict[str, Any]]:
    """Arguments that tell conventions apart: ties, elements half a step beyond the range, odd zero points."""
    grid = torch.arange(-44, 44) / 8
    for k, (low, high) in enumerate([(-4, 3), (0, 7), (-128, 127)]):
        scale, zero = torch.tensor([0.375, 0.3, 0.7][: 3 if "ch_axis" in roles else 1]), torch.tensor([1.0, -3.0, 2.0])
        factor = 0.25
        if k == 2:  # no factor: a code's own way to put it on may move such a scale by its last bit
            scale, factor = scale / 3, 1.0
        x = torch.stack([(grid if k < 2 else torch.arange(-44, 44) + 0.5) * s for s in scale])
        every = {"x": x, "scale": scale, "zero_point": zero[: len(scale)].clone(), "quant_min": low, "quant_max": high}
        every |= {"ch_axis": 0, "grad_factor": factor}
        yield {role: every[role] for role in roles}


def _by_role(function: Callable, roles: list[str]) -> Callable:
    """A function, called by the roles of its arguments."""
    return lambda **given: function(*(given[role] for role in roles))


def _outcome(function: Callable, arguments: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The values, and the gradients of all tensors that have one."""
    given = {
        role: value.clone().requires_grad_() if isinstance(value, torch.Tensor) else value
        for role, value in arguments.items()
    }
    leaves = {role: value for role, value in given.items() if isinstance(value, torch.Tensor)}
    before = {role: leaf.detach().clone() for role, leaf in leaves.items()}
    try:
        y = function(**given)
        upstream = torch.sin(torch.arange(y.numel()) + 1.0).reshape(y.shape)
        found = torch.autograd.grad(y, list(leaves.values()), upstream, allow_unused=True)
    except Unlike:
        raise
    except Exception as error:
        raise Unlike(f"it fails on small numbers: {type(error).__name__}: {str(error).splitlines()[0]:.120}") from error
    if changed := [role for role, leaf in leaves.items() if not torch.equal(leaf.detach(), before[role])]:
        raise Unlike(f"it writes to its {' and '.join(changed)}")
    return y.detach(), {role: g for role, g in zip(leaves, found, strict=True) if g is not None}


def _same(ours: tuple, theirs: tuple, *, zero_points: bool) -> bool:
    """Values bit for bit, but for the sign of zero, and each gradient that they have within round-off: that of the zero
    point if it is asked for."""
    (y, gradients), (want, expected) = ours, theirs
    if y.dtype != want.dtype or not torch.equal(y, want):
        return False
    for role, wanted in expected.items():
        if role == "zero_point" and not zero_points:
            continue
        got = gradients.get(role, torch.zeros_like(wanted))
        if not torch.allclose(got, wanted, rtol=1e-4, atol=1e-4 if role != "x" else 1e-6):
            return False
    return not (gradients.keys() - expected.keys() - {"zero_point"})


def _kolmogorov_smirnov(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference of two samples' distribution functions."""
    a, b = a.flatten().sort().values, b.flatten().sort().values
    at = torch.cat((a, b))
    share_a, share_b = (torch.searchsorted(t, at, right=True) / t.numel() for t in (a, b))
    return float((share_a - share_b).abs().max())
