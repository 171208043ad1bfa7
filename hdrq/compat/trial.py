"""Whether a function computes what one of our forms does: both are called with the same arguments, and compared.

Names say nothing about a fork that changed the arithmetic. So a function is tried on small numbers before it is
replaced, and once more on the arguments of each kind of call that reaches it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

from hdrq.backends.eager import per_element, sum_but
from hdrq.compat import functional
from hdrq.compat.clamping import closed_clamp
from hdrq.compat.conventions import CONVENTIONS, Convention, Noise, Unlike

ROUND_OFF = 2e-6  # of a sum that a gradient is, relative to the sum of magnitudes: theirs are summed in float32
SPARE = 1000  # a scale that a factor went over may be a last bit off: one in so many elements takes the next step


@dataclass(frozen=True)
class Outcome:
    """What a call gave: the values, the gradients of the tensors that learn, and what those were taken for."""

    y: torch.Tensor
    gradients: dict[str, torch.Tensor]
    upstream: torch.Tensor


def outcome(
    function: Callable, arguments: dict[str, Any], parameters: dict[str, torch.Tensor] | None = None
) -> Outcome:
    """What ``function(**arguments)`` gives for copies of its tensors, which learn as the given ones do.

    torch's random state is as it was, and its clamp passes gradients on its bounds. Gradients are taken of
    ``parameters`` as well, which are used as they are; none are where they are switched off.

    Raises:
        Unlike: it fails, or writes to an argument.
    """
    given = {
        role: value.detach().clone().requires_grad_(value.requires_grad) if isinstance(value, torch.Tensor) else value
        for role, value in arguments.items()
    }
    tensors = {role: value for role, value in given.items() if isinstance(value, torch.Tensor)}
    leaves = {role: t for role, t in (tensors | (parameters or {})).items() if t.requires_grad}
    before = {role: t.detach().clone() for role, t in tensors.items()}
    devices = {t.device.index for t in tensors.values() if t.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)), saved_tensors_hooks(_as_is, _as_is), closed_clamp():
        try:
            y = function(**given)
            upstream = 1.5 + torch.sin(torch.arange(1, y.numel() + 1, dtype=torch.float32, device=y.device))
            upstream = upstream.reshape(y.shape)
            found: tuple = (None,) * len(leaves)
            if leaves and y.requires_grad:
                found = torch.autograd.grad(y, list(leaves.values()), upstream.to(y.dtype), allow_unused=True)
        except Exception as error:
            reason = (str(error).splitlines() or [""])[0]
            raise Unlike(f"it fails on a trial: {type(error).__name__}: {reason:.120}") from error
    if changed := [role for role, t in tensors.items() if not torch.equal(t.detach(), before[role])]:
        raise Unlike(f"it writes to its {' and '.join(changed)}")
    gradients = {role: g for role, g in zip(leaves, found, strict=True) if g is not None}
    return Outcome(y.detach(), gradients, upstream)


def _as_is(saved: torch.Tensor) -> torch.Tensor:
    """Keeps a trial's tensors from the hooks around the call, by which activation checkpointing counts them."""
    return saved


@torch.enable_grad()
def recognised(function: Callable, roles: Iterable[str]) -> Convention:
    """The convention of a function without noise, that takes arguments by their roles.

    One that gives its zero point another gradient than ours is known as well, for calls whose zero point is fixed.

    Raises:
        Unlike: it computes otherwise than all of :data:`CONVENTIONS`, or fails.
    """
    roles = list(roles)
    for zero_point_learns in (True, False):
        *ordinary, fractional = probes(roles, zero_point_learns)
        left = CONVENTIONS
        for arguments in ordinary:
            want = outcome(function, arguments)
            left = [c for c in left if _computes(c, want, arguments)]
        if left:
            want = outcome(function, fractional)
            known = [c for c in left if _computes(c, want, fractional)]
            # What rounds no zero point is computed where it is an integer: our op refuses others, at the call.
            if known := known or [c for c in left if c.zero_point_rounding is None]:
                return known[0]
    raise Unlike("on small numbers it computes otherwise than any quantizer that we know")


def _computes(convention: Convention, want: Outcome, arguments: dict[str, Any]) -> bool:
    try:
        return difference(outcome(convention, arguments), want, arguments, to_the_bit=True) is None
    except Unlike:  # ours refuses the arguments
        return False


class Refused(Unlike):
    """Our op does not take the arguments."""


def agrees(form: Convention | Noise, function: Callable, arguments: dict[str, Any]) -> str | None:
    """None if the form computes what the function does for calls of this kind, else how not.

    They are compared for these arguments, and for others of the same dtypes and shapes: elements at ties and half a
    step beyond the range, scales that differ, odd zero points.

    Raises:
        Refused: our op does not take them.
    """
    cases = [arguments]
    if isinstance(form, Convention) and not isinstance(arguments.get("grad_factor", 1), torch.Tensor):
        cases += others(arguments)
    return next((why for case in cases if (why := _differs(form, function, case)) is not None), None)


def others(arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """Arguments of the same kind that tell forms apart."""
    x, low, high = (arguments[role] for role in ("x", "quant_min", "quant_max"))
    if not (isinstance(low, int) and isinstance(high, int)) or x.numel() == 0:
        return []
    shape = list(x.shape)
    one_scale = not isinstance(arguments["scale"], torch.Tensor) or arguments["scale"].numel() == 1
    if shape and one_scale and arguments.get("ch_axis", -1) in (-1, None):
        shape[0] = max(shape[0], -(-64 * shape[0] // x.numel()))  # enough elements for every tie
    scale = another(arguments["scale"], uneven, torch.mul)
    zero = arguments.get("zero_point")
    if zero is not None:
        zero = another(zero, lambda n: torch.tensor([1.0, 3.0])[torch.arange(n) % 2], lambda _, by: by)
    exact = arguments.get("grad_factor", 1) == 1  # else the scale may be a last bit off, which turns ties
    try:
        s, z = (spread(v, x.ndim, arguments.get("ch_axis")) for v in (scale, 0 if zero is None else zero))
        probe = (around_ends(low, high, shape, x.device) + (0 if exact else 1 / 16) - z) * s
    except (RuntimeError, ValueError):  # shapes of the code's own
        return []
    made = {"x": probe.detach().reshape(shape).to(x.dtype).requires_grad_(x.requires_grad), "scale": scale}
    made |= {} if zero is None else {"zero_point": zero}
    return [arguments | made]


def another(value: Any, pattern: Callable, combine: Callable) -> Any:
    """Another value of the same kind."""
    if not isinstance(value, torch.Tensor):
        return type(value)(combine(torch.tensor(float(value)), pattern(1)[0]).item())
    by = pattern(value.numel()).reshape(value.shape).to(value.device)
    learns = value.requires_grad
    return combine(value.detach().float(), by).to(value.dtype).requires_grad_(learns)


def uneven(count: int) -> torch.Tensor:
    """Factors of scales: no two neighbours alike, none a power of two."""
    return 0.61 + 0.13 * (torch.arange(count) % 7)


def around_ends(low: int, high: int, shape: Sequence[int], device: torch.device) -> torch.Tensor:
    """Steps by eighths around both ends of a range: ties, and what lies half a step beyond."""
    steps = torch.cat([end + torch.arange(-12, 12, device=device) / 8 for end in (low, high)])
    place = torch.arange(torch.Size(shape).numel(), device=device) * 29 % len(steps)  # 29 mixes all of them
    return steps[place].reshape(shape)


def spread(values: Any, ndim: int, axis: int | None) -> Any:
    """Values of a channel each, as they broadcast; others as they are."""
    one_axis = isinstance(values, torch.Tensor) and values.ndim == 1 and values.numel() > 1 and axis is not None
    return per_element(values, ndim, (axis or 0) % ndim) if one_axis else values


def _differs(form: Convention | Noise, function: Callable, arguments: dict[str, Any]) -> str | None:
    try:
        ours = outcome(Noise(0, 0) if isinstance(form, Noise) else form, arguments)
    except Unlike as refused:
        raise Refused(str(refused.__cause__)) from refused.__cause__
    try:
        if isinstance(form, Noise):
            check_noise(function, arguments)
            return None
        theirs = outcome(function, arguments)
    except Unlike as reason:
        return str(reason)
    return difference(ours, theirs, arguments, to_the_bit=arguments.get("grad_factor", 1) == 1)


def difference(ours: Outcome, theirs: Outcome, arguments: dict[str, Any], *, to_the_bit: bool) -> str | None:
    """In what two outcomes differ: values by their bits but for the sign of zero, gradients by more than round-off."""
    y, want = ours.y, theirs.y
    if y.dtype != want.dtype or y.shape != want.shape:
        return f"it returns {want.dtype} of {tuple(want.shape)}, we {y.dtype} of {tuple(y.shape)}"
    spare = 0 if to_the_bit else 1 + y.numel() // SPARE
    if not to_the_bit:
        step = 1.001 * float(torch.as_tensor(arguments["scale"]).detach().abs().max())
        if not torch.allclose(y, want, rtol=1e-6, atol=step, equal_nan=True):
            return "its values differ"
    same = torch.isclose(y, want, rtol=0 if to_the_bit else 1e-6, atol=0, equal_nan=True)
    if y.numel() - int(same.sum()) > spare:
        return "its values differ"
    expected = {  # of a rounded x it may be zeros, where ours is none
        role: g for role, g in theirs.gradients.items() if role in ours.gradients or g.any()
    }
    if ours.gradients.keys() != expected.keys():
        which = sorted(ours.gradients.keys() ^ expected.keys())
        return f"it gives {' and '.join(which)} {'no' if which[0] in ours.gradients else 'a'} gradient"
    for role, wanted in expected.items():
        got = ours.gradients[role]
        bound = 1e-6 if role not in ("scale", "zero_point") else sum_bound(role, theirs, arguments)
        if got.dtype != wanted.dtype:
            return f"its gradient of {role} is {wanted.dtype}, ours {got.dtype}"
        if got.numel() - int(torch.isclose(got, wanted, rtol=1e-4, atol=bound).sum()) > (spare if role == "x" else 0):
            return f"its gradient of {role} differs"
    return None


def sum_bound(role: str, theirs: Outcome, arguments: dict[str, Any]) -> float:
    """What round-off may be in the gradient of a scale or of a zero point."""
    levels = max(abs(arguments["quant_min"]), abs(arguments["quant_max"]), 1)
    inside = theirs.gradients["x"] != 0 if "x" in theirs.gradients else torch.zeros_like(theirs.y, dtype=torch.bool)
    terms = torch.where(inside, 1, levels) * theirs.upstream.abs()
    unit = 1.0 if role == "scale" else float(torch.as_tensor(arguments["scale"]).detach().abs().max())
    return ROUND_OFF * float(terms.sum()) * unit * abs(float(arguments.get("grad_factor", 1)))


def check_noise(function: Callable, arguments: dict[str, Any], chance: float = 1e-6) -> None:
    """Whether a function adds noise as the released HDRQ does, as far as one call shows.

    The gradient of its scale is held against its own noise, and the noise against ours by a Kolmogorov-Smirnov test,
    which errs with this chance.

    Raises:
        Unlike: it does not, or fails.
    """
    x = arguments["x"]
    theirs, again = outcome(function, arguments), outcome(_after_a_draw(function), arguments)
    ours = outcome(Noise(0, 0), arguments)
    if theirs.y.shape != x.shape or theirs.y.dtype != ours.y.dtype:
        raise Unlike("it returns no tensor like x")
    if theirs.gradients.keys() != ours.gradients.keys():
        which = sorted(ours.gradients.keys() ^ theirs.gradients.keys())
        raise Unlike(f"it gives {' and '.join(which)} {'no' if which[0] in ours.gradients else 'a'} gradient")
    low, high = (arguments[end] for end in ("quant_min", "quant_max"))
    x_in, s, _, axis = functional._grid(x.detach(), arguments["scale"], None, arguments.get("ch_axis"))
    s = s.detach()
    steps = per_element(s, x_in.ndim, axis)
    inside = ((x_in > low * steps) & (x_in < high * steps)).reshape(x.shape)
    if torch.equal(theirs.y, again.y) and inside.any():
        raise Unlike("its name speaks of noise, and it draws none")
    if not torch.equal(theirs.y[~inside], ours.y[~inside]):
        raise Unlike("it clips otherwise than the released HDRQ's noise")
    if "x" in ours.gradients and not torch.allclose(theirs.gradients["x"], ours.gradients["x"], rtol=1e-5):
        raise Unlike("its gradient of x differs from that of the released HDRQ's noise")
    noise = torch.where(inside, theirs.y - x.detach(), theirs.y).reshape(x_in.shape) / steps
    if "scale" in ours.gradients:
        terms = noise * theirs.upstream.reshape(x_in.shape)
        factor = float(arguments.get("grad_factor", 1))
        want, got = factor * sum_but(terms, axis).float(), theirs.gradients["scale"].flatten()
        bound = abs(factor) * 1e-4 * float(terms.abs().sum())
        if got.shape != want.flatten().shape or not torch.allclose(got, want.flatten(), rtol=1e-3, atol=bound):
            raise Unlike("its gradient of the scale is none of its noise")
    if not inside.any():
        return
    mine = (ours.y - x.detach()).reshape(x_in.shape) / steps
    distance = _kolmogorov_smirnov(noise.reshape(x.shape)[inside], mine.reshape(x.shape)[inside])
    critical = (-torch.tensor(chance / 2).log() / int(inside.sum())).sqrt()
    if not distance < critical:
        raise Unlike(f"its noise has another distribution than the released HDRQ's, by {distance:.3f}")


def _after_a_draw(function: Callable) -> Callable:
    """The function with another random state than it would have."""

    def call(**given):
        torch.rand(1, device=given["x"].device)
        return function(**given)

    return call


def noise_probe(roles: Iterable[str]) -> dict[str, Any]:
    """Arguments that show a noise's distribution."""
    x = torch.randn(3, 8192, generator=torch.Generator().manual_seed(0))
    scale = torch.tensor([0.375, 0.75, 0.25]) if "ch_axis" in roles else torch.tensor([0.375])
    every: dict[str, Any] = {
        "x": x,
        "scale": scale,
        "zero_point": torch.full_like(scale, 2),
        "quant_min": -4,
        "quant_max": 3,
    }
    every |= {"ch_axis": 0, "grad_factor": 0.25}
    for value in every.values():
        if isinstance(value, torch.Tensor):
            value.requires_grad_()
    return {role: every[role] for role in roles}


def probes(roles: Iterable[str], zero_point_learns: bool) -> Iterator[dict[str, Any]]:
    """Arguments that tell conventions apart: ties, elements half a step beyond the range, odd zero points, tiny scales.

    The last ones' zero points are no integers.
    """
    grid = torch.arange(-44, 44, dtype=torch.float32) / 8
    for k, (low, high) in enumerate([(-4, 3), (0, 7), (-128, 127), (-4, 3), (-4, 3)]):
        scale, zero = (
            torch.tensor([0.375, 0.3, 0.7], dtype=torch.float32)[: 3 if "ch_axis" in roles else 1],
            torch.tensor([1.0, -3.0, 2.0], dtype=torch.float32),
        )
        factor = 0.25
        if k == 2:  # no factor: a code's own way to put it on may move such a scale by its last bit
            scale, factor = scale / 3, 1.0
        x = torch.stack([(grid * 8 + 0.5 if k == 2 else grid) * s for s in scale])
        if k == 3:
            x, scale = x * 2.0**-40, scale * 2.0**-40
        if k == 4:
            zero = zero + 0.3
        zero = zero[: len(scale)].clone().requires_grad_(zero_point_learns)
        every: dict[str, Any] = {"x": x.requires_grad_(), "scale": scale.requires_grad_(), "zero_point": zero}
        every |= {"quant_min": low, "quant_max": high, "ch_axis": 0, "grad_factor": factor}
        yield {role: every[role] for role in roles}


def _kolmogorov_smirnov(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference of two samples' distribution functions."""
    a, b = a.flatten().sort().values, b.flatten().sort().values
    at = torch.cat((a, b))
    share_a, share_b = (torch.searchsorted(t, at, right=True) / t.numel() for t in (a, b))
    return float((share_a - share_b).abs().max())
