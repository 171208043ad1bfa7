"""Quantizer modules of other codes that write their arithmetic out: found by their attributes and by what they compute.

Such a module keeps scale, zero point and range as attributes, and its ``forward`` takes x alone: BRECQ's
``UniformAffineQuantizer``, AdaRound as QDrop, BRECQ and MQBench have it, LSQ's layers. Its class says little about what
one of its objects does in its present state (searching its scale, hard or soft rounding), so each object is compared
with our forms in each state that it is in, at its first call there.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import nn

from hdrq.backends.eager import per_element
from hdrq.compat import functional
from hdrq.compat.conventions import CONVENTIONS, ROLES, Convention, Unlike
from hdrq.compat.trial import Outcome, difference, outcome

NAMES = re.compile(r"quant|lsq|round", re.IGNORECASE)
SCALES = frozenset(ROLES["scale"])
BITS = ("bits", "bit", "n_bits", "nbits", "num_bits")
SIGMOID = 1e-5  # steps; theirs is torch's


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
    """What a module computes in one of its states."""

    kind: Convention | AdaRound
    names: dict[str, str]  # of attributes, by role
    quant_min: int
    quant_max: int
    lsq_factor: bool = False  # on the gradient of the scale: 1/sqrt(n·quant_max), n the elements that share one

    def __call__(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        given = {role: getattr(module, name) for role, name in self.names.items()}
        given["grad_factor"] = self.grad_factor(x, given["scale"])
        return self.kind(x, quant_min=self.quant_min, quant_max=self.quant_max, **given)

    def grad_factor(self, x: torch.Tensor, scale: torch.Tensor | float) -> float:
        if not self.lsq_factor:
            return 1.0
        return (x.numel() / torch.as_tensor(scale).numel() * self.quant_max) ** -0.5


def form_of(module: nn.Module, forward: Any, x: torch.Tensor) -> Form:
    """The form that computes what the module's ``forward`` does for this x, in its present state. A copy is tried.

    Raises:
        Unlike: none does, or a pass changes the module, or it cannot be copied.
    """
    names, ranges = _names(module, x), _ranges(module)
    try:
        tried = copy.deepcopy(module)
    except Exception as error:
        raise Unlike(f"it cannot be copied to be tried: {type(error).__name__}: {error!s:.100}") from error
    parameters: dict[str, torch.Tensor] = dict(tried.named_parameters())
    why = "it computes otherwise than any quantizer that we know"
    kinds: list = [AdaRound(False), AdaRound(True)] if "alpha" in names else CONVENTIONS
    for low, high in ranges:
        inputs = [x, _probe(tried, names, x, low, high)]
        before = _traces(tried)
        theirs = [outcome(lambda x: forward(tried, x), {"x": given}, parameters) for given in inputs]
        if _traces(tried) != before:
            raise Unlike("its forward pass changes it")
        for kind, lsq_factor in product(kinds, (False, True)):
            form = Form(kind, names, low, high, lsq_factor)
            try:
                if all(_computes(form, tried, *pair, parameters) for pair in zip(inputs, theirs, strict=True)):
                    return form
            except (TypeError, ValueError) as refused:
                why = f"our op refuses it: {refused}"
    raise Unlike(why)


def is_quantizer(module: nn.Module, x: Any) -> bool:
    """Whether the module has a scale of its own, by name: a layer or a model that holds quantizers has none."""
    own = (vars(module), module._parameters, module._buffers)
    return isinstance(x, torch.Tensor) and any(not SCALES.isdisjoint(names) for names in own)


def state(module: nn.Module, x: torch.Tensor) -> tuple:
    """What a forward pass may depend on beside numbers: switches, modes, which tensors learn."""
    parts: list = [x.dtype, x.ndim, x.requires_grad, x.device]
    for part in module.modules():
        parts += [(k, v) for k, v in vars(part).items() if v is None or isinstance(v, (bool, int, str))]
        parts += [p is not None and p.requires_grad for p in part._parameters.values()]
        parts += [b.item() for b in part._buffers.values() if b is not None and _is_switch(b)]
    return tuple(parts)


def _is_switch(buffer: torch.Tensor) -> bool:
    return buffer.numel() == 1 and buffer.dtype in (torch.uint8, torch.bool, torch.int64)


def _names(module: nn.Module, x: torch.Tensor) -> dict[str, str]:
    """The names of the attributes that are scale, zero point, axis and AdaRound's alpha."""
    found: dict[str, str] = {}
    alpha = getattr(module, "alpha", None)
    if isinstance(alpha, torch.Tensor) and alpha.shape == x.shape and alpha.numel() > 1:
        found["alpha"] = "alpha"
    for role in ("scale", "zero_point", "ch_axis"):
        for name in ROLES[role]:
            value = getattr(module, name, None)
            if name not in found and isinstance(value, (torch.Tensor, int, float)) and not isinstance(value, bool):
                found[role] = name
                break
    if "scale" not in found:
        raise Unlike("it has no scale of its own that we know by name")
    scale = getattr(module, found["scale"])
    if not isinstance(scale, torch.Tensor) or scale.ndim != 1 or scale.numel() == 1:
        found.pop("ch_axis", None)  # the scale's shape says it
    return found


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


def _probe(module: nn.Module, names: dict[str, str], x: torch.Tensor, low: int, high: int) -> torch.Tensor:
    """Ties and elements half a step beyond both ends of the range, in the shape of x."""
    steps = torch.cat([end + torch.arange(-12, 12, device=x.device) / 8 for end in (low, high)])
    place = torch.arange(x.numel(), device=x.device) * 29 % len(steps)  # a step of 29 mixes all 48
    scale, zero = (getattr(module, names[role]) if role in names else 0.0 for role in ("scale", "zero_point"))
    if "ch_axis" in names:
        axis = getattr(module, names["ch_axis"])
        scale, zero = (per_element(v, x.ndim, axis) if torch.is_tensor(v) and v.ndim == 1 else v for v in (scale, zero))
    probe = (steps[place].reshape(x.shape) - zero) * scale
    return probe.detach().to(x.dtype).requires_grad_(x.requires_grad)


def _computes(form: Form, module: nn.Module, x: torch.Tensor, theirs: Outcome, parameters: dict) -> bool:
    """Whether the form gives the same: values first, which are the cheaper ones."""
    with torch.no_grad():
        y = form(module, x)
    exact = isinstance(form.kind, Convention)
    scale = getattr(module, form.names["scale"])
    bound = 0.0 if exact else SIGMOID * float(torch.as_tensor(scale).detach().abs().max())
    if y.dtype != theirs.y.dtype or y.shape != theirs.y.shape:
        return False
    if not torch.allclose(y, theirs.y, rtol=0 if exact else 1e-6, atol=bound, equal_nan=True):
        return False
    roles = {name: role for role, name in form.names.items()}
    ours = outcome(lambda x: form(module, x), {"x": x}, parameters)
    ours, theirs = (
        Outcome(theirs.y, {roles.get(name, name): g for name, g in o.gradients.items()}, o.upstream)
        for o in (ours, theirs)
    )
    given = {"scale": scale, "quant_min": form.quant_min, "quant_max": form.quant_max}
    given["grad_factor"] = form.grad_factor(x, scale)
    return difference(ours, theirs, given, to_the_bit=True) is None


def _traces(module: nn.Module) -> list[tuple]:
    """What is another where a pass has written to the module."""
    found: list[tuple] = []
    for part in module.modules():
        for key, value in (*vars(part).items(), *part._parameters.items(), *part._buffers.items()):
            if isinstance(value, torch.Tensor):
                found.append((key, id(value), value._version))
            elif value is None or isinstance(value, (bool, int, float, str)):
                found.append((key, value))
    return found
