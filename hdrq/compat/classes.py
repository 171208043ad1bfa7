"""Quantizer modules of other codes that write their arithmetic out: found by what they read and by what they compute.

Such a module keeps scale, zero point and range as attributes, and its ``forward`` takes x alone: BRECQ's
``UniformAffineQuantizer``, AdaRound as QDrop and BRECQ have it, LSQ's. A pass of a copy records every attribute that it
reads. What it does depends on those alone, so they are the conditions under which the verdict holds: switches and modes
by their values, scale, zero point and α by their shapes. The verdict itself is a comparison with our forms, on numbers
that tell them apart and under other scales, zero points and α than the present ones.
"""

from __future__ import annotations

import copy
import inspect
import random
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import torch
from torch import nn

from hdrq.compat import functional
from hdrq.compat.conventions import CONVENTIONS, ROLES, Convention, Unlike
from hdrq.compat.surroundings import SIMPLE
from hdrq.compat.trial import Outcome, another, around_ends, difference, outcome, spread, uneven

NAMES = re.compile(r"quant|lsq|round", re.IGNORECASE)
SCALES = frozenset(ROLES["scale"])
BITS = ("bits", "bit", "n_bits", "nbits", "num_bits")
ROUND_OFF = 1e-5  # steps; of a sigmoid, which is torch's there, and of a scale that a factor went over
# What of a form with LSQ's factor must agree at ties, the best first: backward, torch's learnable op rounds otherwise
# than forward, and codes that multiply a gradient by writing (s − s·f) + s·f move the scale by a last bit.
TIES = ("values and gradients", "values", "nothing")
LEAST = 48  # elements of a trial: both ends of a range by eighths of a step


@dataclass(frozen=True)
class AdaRound:
    """Rounding that is learned, or is read off what was learned."""

    hard: bool

    def __str__(self) -> str:
        return "AdaRound, hard" if self.hard else "AdaRound"

    def __call__(
        self, x, alpha, scale, quant_min, quant_max, zero_point=None, ch_axis=None, grad_factor=1.0
    ) -> torch.Tensor:
        return functional.adaround(x, scale, zero_point, alpha, quant_min, quant_max, ch_axis, hard=self.hard)


@dataclass(frozen=True)
class Form:
    """What a module computes under some conditions."""

    kind: Convention | AdaRound
    names: dict[str, str]  # of attributes, by role
    quant_min: int
    quant_max: int
    lsq_factor: bool = False  # on the gradient of the scale: 1/sqrt(n·quant_max), n the elements that share one
    settled: dict[str, Callable] = field(
        default_factory=dict
    )  # by role: what a pass first makes of the tensor in place

    def __call__(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        _settle(module, self.names, self.settled)
        given = {role: getattr(module, name) for role, name in self.names.items()}
        given["grad_factor"] = self.grad_factor(x, given["scale"])
        return self.kind(x, quant_min=self.quant_min, quant_max=self.quant_max, **given)

    def grad_factor(self, x: torch.Tensor, scale: torch.Tensor | float) -> float:
        if not self.lsq_factor:
            return 1.0
        return (max(x.numel(), 1) / torch.as_tensor(scale).numel() * self.quant_max) ** -0.5


@dataclass(frozen=True)
class Verdict:
    """A form, or why there is none, and the conditions under which a pass is the one that was tried."""

    conditions: list[tuple[str, str | None, Any]]  # an attribute, its role, its :func:`trait`
    of_x: tuple
    around: tuple  # values of the module that the class is in
    form: Form | str

    def holds(self, module: nn.Module, x: torch.Tensor, around: tuple) -> bool:
        if self.of_x != traits_of(x) or self.around != around:
            return False
        return all(trait(getattr(module, name, None), role) == wanted for name, role, wanted in self.conditions)


def is_quantizer(module: nn.Module, x: torch.Tensor) -> bool:
    """Whether the module has a scale of its own, by name, and x is what one quantizes: layers and models have none."""
    own = (vars(module), module._parameters, module._buffers)
    return x.is_floating_point() and x.numel() > 0 and any(not SCALES.isdisjoint(names) for names in own)


def traits_of(x: torch.Tensor) -> tuple:
    return x.dtype, x.ndim, x.requires_grad, x.device, torch.is_grad_enabled()


def trait(value: Any, role: str | None) -> Any:
    """What of an attribute a verdict depends on: the shape of what has a role, else the value.

    Raises:
        Unlike: it may change unseen.
    """
    if isinstance(value, torch.Tensor):
        facts = (value.dtype, value.shape, value.requires_grad, value.device)
        if role is not None:
            return facts
        if value.numel() == 1:
            return (*facts, value.item())
        raise Unlike(f"its forward pass reads a tensor of {tuple(value.shape)} that has no part in a quantizer we know")
    if role in ("scale", "zero_point") and isinstance(value, (int, float)):
        return type(value)
    if isinstance(value, SIMPLE):
        return type(value), value
    if isinstance(value, tuple):
        return tuple(trait(v, None) for v in value)
    if inspect.ismethod(value) or inspect.isfunction(value) or inspect.isbuiltin(value) or isinstance(value, type):
        return getattr(value, "__func__", value)
    raise Unlike(f"its forward pass reads a {type(value).__name__}, which may change unseen")


def judge(module: nn.Module, forward: Callable, x: torch.Tensor, around: tuple = ()) -> Verdict:
    """The form that computes what the module's ``forward`` does under present conditions, or why there is none."""
    read: set[str] = set()
    python = random.getstate()
    try:
        form: Form | str = _form(module, forward, x, read)
    except Unlike as reason:
        form = str(reason)
    except Exception as error:  # of whatever the module does on numbers that it never saw
        form = f"it fails on a trial: {type(error).__name__}: {error!s:.100}"
    finally:
        random.setstate(python)
    conditions = []
    for name in sorted(read):
        value = getattr(module, name, None)
        role = _role(name, value, x)
        try:
            conditions.append((name, role, trait(value, role)))
        except Unlike as reason:
            form = f"{reason}: {name}"
    return Verdict(conditions, traits_of(x), around, form)


def _form(module: nn.Module, forward: Callable, x: torch.Tensor, read: set[str]) -> Form:
    with suppress(_Writes):
        _tried(_recording(module, read, x), forward, x, {})
    names = {role: name for name in sorted(read) if (role := _role(name, getattr(module, name, None), x))}
    if "scale" not in names:
        raise Unlike("it reads no scale of its own that we know by name")
    if computed := [name for name in names.values() if not _holds(module, name)]:
        raise Unlike(f"its {computed[0]} is computed")
    scale = getattr(module, names["scale"])
    if not isinstance(scale, torch.Tensor) or scale.ndim != 1 or scale.numel() == 1:
        names.pop("ch_axis", None)  # the scale's shape says it
    for low, high in _ranges(module):
        settled = _settling(module, names, forward, x, low, high)
        variants, present = list(_variants(module, names, low, high)), _recording(module, set())
        for made in (present, *(made for made, _ in variants)):
            _settle(made, names, settled)
        cases = [case for variant in variants for case in _cases(variant, names, x, low, high)]
        cases.append(_Case(present, x, fractional=False, ties=False))
        theirs = [_tried(case.module, forward, case.x, _learned(case.module, names)) for case in cases]
        kinds: list = [AdaRound(False), AdaRound(True)] if "alpha" in names else CONVENTIONS
        forms = [
            Form(kind, names, low, high, lsq, settled)
            for kind in kinds
            for lsq in (False, True)
            if not (lsq and high <= 0)
        ]
        pairs = list(zip(cases, theirs, strict=True))
        whole, parts = ([pair for pair in pairs if pair[0].fractional == wanted] for wanted in (False, True))
        left = (
            form
            for agree in TIES
            for form in forms
            if (agree == TIES[0] or form.lsq_factor) and _computes_all(form, whole, agree)
        )
        first = next(left, None)
        if first is None:
            continue
        if known := next((form for form in chain([first], left) if _computes_all(form, parts, TIES[-1])), None):
            return known
        # What rounds no zero point is computed where it is an integer: our op refuses others, at the call.
        if isinstance(first.kind, Convention):
            first = replace(first, kind=replace(first.kind, zero_point_rounding=None))
        if _computes_all(first, whole, TIES[-1]):
            return first
    raise Unlike("it computes otherwise than any quantizer that we know")


def _recording(module: nn.Module, read: set[str], x: torch.Tensor | None = None) -> nn.Module:
    """A copy that notes which of its attributes are read, and refuses to have one set, or one read whose changes nobody
    would see: its children are not called, so that their hooks and observers stay as they are."""
    try:
        made = copy.deepcopy(module)
    except Exception as error:
        raise Unlike(f"it cannot be copied to be tried: {type(error).__name__}: {error!s:.100}") from error

    kind = type(made)

    def noted(name: str, value: Any) -> Any:
        if x is not None and not (name.startswith("__") and name.endswith("__")):
            read.add(name)
            try:
                trait(value, _role(name, value, x))
            except Unlike as reason:
                raise _Stop(f"{reason}: {name}") from reason
        return value

    def get(self, name):
        return noted(name, object.__getattribute__(self, name))

    def get_held(self, name):  # parameters, buffers and children
        return noted(name, kind.__getattr__(self, name))  # type: ignore[attr-defined]

    def refuse(self, name, value):
        raise _Stop(f"its forward pass sets {name}")

    methods = {"__getattribute__": get, "__getattr__": get_held, "__setattr__": refuse}
    made.__class__ = type(kind.__name__, (kind,), methods)
    return made


class _Writes(Unlike):
    """A pass changes tensors of its own."""

    def __init__(self, names: set[str]) -> None:
        super().__init__("its forward pass changes a tensor of its own")
        self.names = names


class _Stop(Exception):
    """A pass changes its module, or reads what nobody can follow."""


def _tried(module: nn.Module, forward: Callable, x: torch.Tensor, learned: dict[str, torch.Tensor]) -> Outcome:
    """What a pass of a copy gives.

    Raises:
        Unlike: it fails, changes the copy, or draws.
    """
    held = vars(module)  # by which nothing is noted
    tensors = {
        name: value
        for values in (held, held["_parameters"], held["_buffers"])
        for name, value in values.items()
        if isinstance(value, torch.Tensor)
    }
    before = {name: t.detach().clone() for name, t in tensors.items()}
    drawn, python = torch.random.get_rng_state(), random.getstate()
    moved = False

    def call(x: torch.Tensor) -> torch.Tensor:
        nonlocal moved
        y = forward(module, x)
        moved = random.getstate() != python or not torch.equal(torch.random.get_rng_state(), drawn)
        return y

    try:
        found = outcome(call, {"x": x}, learned)
    except Unlike as failed:
        if isinstance(failed.__cause__, _Stop):
            raise Unlike(str(failed.__cause__)) from failed
        raise
    if moved:
        raise Unlike("its forward pass draws random numbers")
    if changed := {name for name, t in tensors.items() if not torch.equal(before[name], t)}:
        raise _Writes(changed)
    return found


def _settling(
    module: nn.Module, names: dict[str, str], forward: Callable, x: torch.Tensor, low: int, high: int
) -> dict[str, Callable]:
    """What a pass makes of its scale and zero point in place, by role: it raises a scale to the least it may be, and
    clamps a zero point to the range or sets it to zero, as MQBench's quantizers do.

    Raises:
        Unlike: it changes them otherwise, or another tensor.
    """
    own = {
        r: names[r]
        for r in ("scale", "zero_point")
        if isinstance(getattr(module, names.get(r, ""), None), torch.Tensor)
    }
    pairs: dict[str, list] = {role: [] for role in own}
    for size, shift in ((2.0**-30, 3), (1.0, low - 5), (1.0, high + 5), (-1.0, 3), (1.0, None)):
        if size < 0 and all(torch.equal(*pair) for pair in pairs.get("scale", [])):
            continue  # it raises none, and may not take a negative one
        made = _recording(module, set()) if shift is None else _variant(module, names, size, shift)
        before = {role: getattr(made, name).detach().clone() for role, name in own.items()}
        try:
            _tried(made, forward, x, {})
        except _Writes as writes:
            if not writes.names <= set(own.values()):
                raise
        for role, name in own.items():
            pairs[role].append((before[role], getattr(made, name).detach()))
    found = {}
    for role, changes in pairs.items():
        least = min(float(after.min()) for _, after in changes)
        ways: list[Callable] = [torch.Tensor.detach, lambda z: z.clamp(low, high), torch.zeros_like]
        if role == "scale":
            ways = [torch.Tensor.detach, lambda s, e=least: s.clamp(min=e), lambda s, e=least: s.abs().clamp(min=e)]
        way = next((way for way in ways if all(torch.equal(way(before), after) for before, after in changes)), None)
        if way is None:
            raise _Writes({own[role]})
        if way is not ways[0]:
            found[role] = way
    return found


def _settle(module: nn.Module, names: dict[str, str], settled: dict[str, Callable]) -> None:
    for role, way in settled.items():
        values = getattr(module, names[role]).data
        values.copy_(way(values))


@dataclass(frozen=True)
class _Case:
    module: nn.Module
    x: torch.Tensor
    fractional: bool  # its zero point is no integer
    ties: bool  # its elements lie at ties and at the ends of the range, not between


def _variants(module: nn.Module, names: dict[str, str], low: int, high: int) -> Iterator[tuple[nn.Module, bool]]:
    """Copies with other scales, zero points and α, and whether the zero point is no integer."""
    zero = getattr(module, names["zero_point"]) if "zero_point" in names else None
    floating = isinstance(zero, float) or (isinstance(zero, torch.Tensor) and zero.is_floating_point())
    first = 0 if zero is None else 3
    shifts: list[float] = [first] if zero is None else [first, low - 5, high + 5, *([3.3] if floating else [])]
    size = _telling(getattr(module, names["scale"]), low - first, high - first)
    for shift, by in [(first, 2.0**-30), *((shift, 1.0) for shift in shifts)]:  # a tiny scale may be raised
        yield _variant(module, names, by * size, shift), shift == 3.3


def _telling(scale: torch.Tensor | float, low: int, high: int) -> float:
    """A factor under which x/s and x·(1/s) round some tie of a trial to different integers: of half of all scales none
    does."""
    for size in (1 + k / 64 for k in range(64)):
        s = (
            torch.as_tensor(another(scale, lambda n, by=size: by * uneven(n), torch.mul))
            .detach()
            .float()
            .reshape(-1, 1)
        )
        x = around_ends(low, high, (LEAST,), s.device) * s
        if not torch.equal(*((v.round().clamp(low, high)) for v in (x / s, x * (1 / s)))):
            return size
    return 1.0


def _variant(module: nn.Module, names: dict[str, str], size: float, shift: float) -> nn.Module:
    """A copy with another α, scales of so many times the size and zero points from here on."""
    made = _recording(module, set())
    for role, name in names.items():
        value = getattr(module, name)
        if role == "scale":
            other = another(value, lambda n: size * uneven(n), torch.mul)
        elif role == "zero_point":
            other = another(value, lambda n: shift + 2.0 * (torch.arange(n) % 2), lambda _, by: by)
        elif role == "alpha":
            draws = torch.Generator().manual_seed(0)
            other = (2 * torch.randn(value.shape, generator=draws)).to(value.device)
        else:
            continue
        _put(made, name, other)
    return made


def _put(module: nn.Module, name: str, value: Any) -> None:
    """Another value of an attribute, in the tensor that is there or in its place."""
    there = getattr(module, name)
    if isinstance(there, torch.Tensor):
        there.data = value.detach()
    elif name in vars(module):
        vars(module)[name] = value
    else:
        raise Unlike(f"its {name} cannot be set to be tried")


def _cases(variant: tuple[nn.Module, bool], names: dict[str, str], x, low: int, high: int) -> Iterator[_Case]:
    """Ties, and elements half a step beyond both ends of the range, in two lengths of the batch where it is free."""
    module, fractional = variant
    scale, zero = (getattr(module, names[role]) if role in names else 0.0 for role in ("scale", "zero_point"))
    axis = getattr(module, names["ch_axis"]) if "ch_axis" in names else None
    for shape in _shapes(x, scale, axis, "alpha" in names):
        steps = around_ends(low, high, shape, x.device)
        s, z = (spread(v, x.ndim, axis) for v in (scale, zero))
        for ties, offset in ((True, 0.0), (False, 1 / 16)):
            probe = ((steps + offset - z) * s).detach().to(x.dtype)
            yield _Case(module, probe.requires_grad_(x.requires_grad), fractional, ties)


def _shapes(x: torch.Tensor, scale: torch.Tensor | float, axis: int | None, fixed: bool) -> list[tuple[int, ...]]:
    """Shapes of trials: that of x where it is fixed, else with two other lengths of an axis that shares its scales.

    Raises:
        Unlike: x has too few elements, and none of its axes can be longer.
    """
    shape = list(x.shape)
    channels = 1 if not isinstance(scale, torch.Tensor) else scale.numel()
    if channels == 1:
        varies = set()
    elif axis is not None:
        varies = {axis % x.ndim}
    else:
        padded = (1,) * (x.ndim - scale.ndim) + tuple(scale.shape)  # type: ignore[union-attr, operator]
        if len(padded) != x.ndim or any(n not in (1, m) for n, m in zip(padded, shape, strict=True)):
            raise Unlike("its scale does not broadcast to x")
        varies = {i for i, n in enumerate(padded) if n != 1}
    free = next((i for i in range(x.ndim) if i not in varies), None)
    if fixed or free is None:
        if x.numel() < LEAST:
            raise Unlike(f"x has too few elements to be tried, {x.numel()}")
        return [tuple(shape)]
    rest = max(x.numel() // max(shape[free], 1), 1)
    length = max(-(-LEAST * channels // rest), 2)
    return [(*shape[:free], n, *shape[free + 1 :]) for n in (length, length + 1)]


def _holds(module: nn.Module, name: str) -> bool:
    """Whether an attribute is the module's own, and no property."""
    return any(name in held for held in (vars(module), module._parameters, module._buffers))


def _role(name: str, value: Any, x: torch.Tensor) -> str | None:
    """What an attribute is to a quantizer."""
    if isinstance(value, bool) or not isinstance(value, (torch.Tensor, int, float)):
        return None
    if name == "alpha" and isinstance(value, torch.Tensor) and value.shape == x.shape and value.numel() > 1:
        return "alpha"
    return next((role for role in ("scale", "zero_point", "ch_axis") if name in ROLES[role]), None)


def _ranges(module: nn.Module) -> list[tuple[int, int]]:
    """The ranges that the module's attributes speak of."""
    low, high = (
        next((v for name in ROLES[role] if isinstance(v := getattr(module, name, None), int)), None)
        for role in ("quant_min", "quant_max")
    )
    if low is not None and high is not None:
        return [(low, high)]
    if isinstance(levels := getattr(module, "n_levels", None), int):
        return [(0, levels - 1)]
    for name in BITS:
        if isinstance(bits := getattr(module, name, None), int) and 2 <= bits <= 16:
            return [(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1), (0, 2**bits - 1)]
    raise Unlike("it has no range of its own that we know by name")


def _learned(module: nn.Module, names: dict[str, str]) -> dict[str, torch.Tensor]:
    values = {role: getattr(module, name) for role, name in names.items()}
    return {role: value for role, value in values.items() if isinstance(value, torch.Tensor) and value.requires_grad}


def _computes_all(form: Form, pairs: list[tuple[_Case, Outcome]], agree: str) -> bool:
    """Whether a form gives the same in all cases, those of ties as far as they must agree (:data:`TIES`)."""
    for case, theirs in pairs:
        ties = agree if case.ties and form.lsq_factor else TIES[0]
        if ties != "nothing" and not _computes(form, case, theirs, gradients=ties == TIES[0]):
            return False
    return True


def _computes(form: Form, case: _Case, theirs: Outcome, gradients: bool) -> bool:
    """Values first, which are the cheaper ones."""
    module, x = case.module, case.x
    try:
        with torch.no_grad():
            y = form(module, x)
    except (TypeError, ValueError):  # our op refuses it
        return False
    scale = getattr(module, form.names["scale"])
    exact = isinstance(form.kind, Convention) and not form.lsq_factor
    bound = 0.0 if exact else ROUND_OFF * float(torch.as_tensor(scale).detach().abs().max())
    if y.dtype != theirs.y.dtype or y.shape != theirs.y.shape:
        return False
    if not torch.allclose(y, theirs.y, rtol=0 if exact else 1e-6, atol=bound, equal_nan=True):
        return False
    if not gradients:
        return True
    ours = outcome(lambda x: form(module, x), {"x": x}, _learned(module, form.names))
    given = {"scale": scale, "quant_min": form.quant_min, "quant_max": form.quant_max}
    given["grad_factor"] = form.grad_factor(x, scale)
    return difference(replace(ours, y=theirs.y), theirs, given, to_the_bit=True) is None
