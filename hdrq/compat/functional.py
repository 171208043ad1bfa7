"""Quantizer functions with the arguments that other codes pass: ``x, scale, zero_point, quant_min, quant_max, …``.

A scale, or a zero point, may be a Python number or a tensor of any real dtype, and may have any shape that broadcasts
to x, or one value for each group or block of x, where those that share one are a row of some view of x. It reaches our
op without a copy where it is float32 and learns; what does not learn is copied, so that an observer may write to it
before the gradients are taken. Gradients come back in the shape and dtype given.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Callable
from typing import Any

import torch

from hdrq import checks, ops
from hdrq.backends.eager import per_element
from hdrq.ops._library import as_shape

ZERO_POINTS = ("half-even", "clamped", None)
OWN_NAMES = {"qmin": "quant_min", "qmax": "quant_max", "axis": "ch_axis", "grad_scale": "grad_factor"}
OPS_NAMES = re.compile(r"\bqmin\b|\bqmax\b|^axis\b|^grad_scale\b")  # as they stand in an op's messages


def _in_own_names(function: Callable) -> Callable:
    """A function whose errors name its own arguments where an op's errors name the op's."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except (TypeError, ValueError) as error:
            text = OPS_NAMES.sub(lambda found: OWN_NAMES[found[0]], str(error))
            if text == str(error):
                raise
            raise type(error)(text) from error

    return call


@_in_own_names
def fake_quantize(
    x: torch.Tensor,
    scale: torch.Tensor | float,
    zero_point: torch.Tensor | float | None,
    quant_min: int,
    quant_max: int,
    ch_axis: int | None = None,
    grad_factor: float = 1.0,
    *,
    rounding: str = "quotient",
    gradient: str = "round-first",
    zero_point_rounding: str | None = "half-even",
    signed_scale: bool = False,
    keep: float = 1.0,
    rng: torch.Tensor | None = None,
) -> torch.Tensor:
    """:func:`hdrq.ops.fake_quantize`, of the arguments of QDrop-, BRECQ-, MQBench-, LSQ+- and torch-style functions.

    The quantizer functions of those codes differ in ``rounding``, ``gradient`` and ``zero_point_rounding`` alone::

        QDrop, HDRQ, BRECQ, MQBench   the defaults
        torch.ao, torch's own ops     rounding="reciprocal"
        torch's learnable ops         rounding="reciprocal", zero_point_rounding="clamped"
        Brevitas                      rounding="shifted", zero_point_rounding=None (TensorClampSte: "pass-through")
        compressed-tensors            rounding="shifted"
        LSQ                           gradient="clamp-first"

    Args:
        x: float32, bfloat16 or float16. Half types are computed in float32 and rounded once.
        scale: positive; one for each of ``x.shape[ch_axis]``, or of a shape that broadcasts to x; or as many along each
            axis of x as there are groups or blocks: ``(*x.shape[:-1], groups)``. All that share one must lie in a row
            of some view of x, as groups of the last axis and blocks of whole rows do.
        zero_point: like ``scale``; None for 0.
        quant_min, quant_max: the integer range.
        ch_axis: the axis of ``scale``; None (or −1 with one scale, as in torch.ao) for what its shape says. A number
            is one scale for all.
        grad_factor: on the gradients of ``scale`` and ``zero_point``.
        zero_point_rounding: what becomes of a floating zero point, while its gradient passes as if nothing did:
            "half-even" rounds it; "clamped" rounds it so and clamps it to the range; None leaves it, which "shifted"
            alone can take where it is no integer.
        signed_scale: scales may be negative: ``y = (q − z)·s`` and ``q = clamp(round(x/s) + z)`` as they stand, by two
            more passes over x.
        rounding, gradient, keep, rng: as :func:`hdrq.ops.fake_quantize`.

    Returns:
        A tensor like x, in its memory format; contiguous where elements are dropped, or scales vary in blocks or along
        several axes.

    Raises:
        TypeError: x is float64, which is not computed in float32 behind your back; and as the op.
        ValueError: a shape that is none of these; and as the op.
    """
    how = checks.choice("zero_point_rounding", zero_point_rounding, ZERO_POINTS)
    x_in, s, z, axis = _grid(x, scale, _own(zero_point, quant_min, quant_max, how), ch_axis)
    order = _dense_order(x) if rng is None and x_in is x and not x.is_contiguous() else None
    if order is not None:
        x_in, axis = x.permute(order), None if axis is None else order.index(axis)
    if signed_scale:
        sign = torch.where(s.detach() < 0, -1.0, 1.0)
        signs = per_element(sign, x_in.ndim, axis).to(x.dtype)
        x_in, s = x_in * signs, s * sign
    y = ops.fake_quantize(
        x_in,
        s,
        quant_min,
        quant_max,
        zero_point=z,
        axis=axis,
        grad_scale=grad_factor,
        keep=keep,
        rng=rng,
        rounding=rounding,
        gradient=gradient,
    )
    if signed_scale:
        y = y * signs
    if order is not None:
        return y.permute([order.index(i) for i in range(x.ndim)])
    return y if x_in is x else y.reshape(x.shape)


@_in_own_names
def noise_quantize(
    x: torch.Tensor,
    scale: torch.Tensor | float,
    quant_min: int,
    quant_max: int,
    rng: torch.Tensor,
    ch_axis: int | None = None,
    grad_factor: float = 1.0,
    *,
    noise: str = "empirical",
    keep: float = 1.0,
) -> torch.Tensor:
    """:func:`hdrq.ops.noise_quantize`, of the arguments of the released HDRQ's functions, whose noise is "empirical".

    They take a zero point as well, and ignore it. ``rng`` may be advanced as soon as this returns.
    """
    x_in, s, _, axis = _grid(x, scale, None, ch_axis)
    options: dict[str, Any] = {"noise": noise, "axis": axis, "grad_scale": grad_factor, "keep": keep}
    checks.rng(rng, x.device)
    return as_shape(ops.noise_quantize(x_in, s, quant_min, quant_max, rng.clone(), **options), x.shape)


def lsq(weight: torch.Tensor, alpha: torch.Tensor, g: float, Qn: int, Qp: int, ch_axis: int | None = None):
    """LSQ's ``round(clamp(w/α, Qn, Qp))·α`` with its own gradient, and the factor g on that of α.

    Source: Esser et al., "Learned Step Size Quantization", ICLR 2020.
    """
    return fake_quantize(weight, alpha, None, Qn, Qp, ch_axis, g, gradient="clamp-first")


@_in_own_names
def adaround(
    x: torch.Tensor,
    scale: torch.Tensor | float,
    zero_point: torch.Tensor | float | None,
    alpha: torch.Tensor,
    quant_min: int,
    quant_max: int,
    ch_axis: int | None = None,
    *,
    hard: bool = False,
    beta: float | torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """:func:`hdrq.ops.adaround`; with ``beta`` the weights and the rounding penalty, in one pass.

    ``alpha`` must have the shape of x. QDrop and BRECQ write ``clamp(floor(x/s) + h + z)``, as the op does.
    """
    x_in, s, z, axis = _grid(x, scale, _own(zero_point), ch_axis)
    checks.tensor("alpha", alpha, (torch.float32,), x.device)
    checks.same_shape("alpha", alpha, "x", x)
    options: dict[str, Any] = {"axis": axis, "zero_point": z}
    args = (x_in, s, alpha.reshape(x_in.shape), quant_min, quant_max)
    if beta is None:
        return as_shape(ops.adaround(*args, hard=hard, **options), x.shape)
    if hard:
        raise ValueError("beta must be None where hard is true, got a beta: a hard rounding has no penalty")
    y, penalty = ops.adaround_regularized(*args, beta, **options)
    return as_shape(y, x.shape), penalty


def _own(zero_point: Any, low: int = 0, high: int = 0, how: str | None = None) -> Any:
    """A zero point rounded as ``how`` says, which nobody else writes to; None for a zero."""
    if not isinstance(zero_point, torch.Tensor):
        return None if isinstance(zero_point, (int, float)) and zero_point == 0 else zero_point
    learns = zero_point.requires_grad
    if not learns and zero_point.numel() == 1 and _is_zero(zero_point):
        return None
    if not zero_point.is_floating_point():
        return zero_point if zero_point.is_complex() else zero_point.float()
    if how is None:
        return zero_point if learns else zero_point.clone()
    return _Integer.apply(zero_point, low, high, how) if learns else _integer(zero_point, low, high, how)


def _is_zero(zero_point: torch.Tensor) -> bool:
    """Whether it is the zero that symmetric quantizers pass, where a look at it costs nothing."""
    if not zero_point.is_cpu or zero_point.is_complex() or torch.compiler.is_compiling():
        return False
    return zero_point.item() == 0


def _integer(z: torch.Tensor, low: int, high: int, how: str) -> torch.Tensor:
    z = torch.round(z)
    return z.clamp(low, high) if how == "clamped" else z


class _Integer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, low, high, how):
        return _integer(z, low, high, how)

    @staticmethod
    def backward(ctx, grad):
        return grad, None, None, None


def _grid(x, scale, zero_point, ch_axis) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, int | None]:
    """What an op takes: x or a view of it, scale and zero point, and their axis."""
    if not isinstance(x, torch.Tensor) or x.dtype not in checks.FLOATS:
        if isinstance(x, torch.Tensor) and x.dtype == torch.float64:
            raise TypeError("x must be float32, bfloat16 or float16, got float64: x.float() gives up its precision")
        checks.tensor("x", x, checks.FLOATS)
    x_in, axis = _view(x, scale, ch_axis)
    s = _values("scale", scale, x)
    if s is scale and not s.requires_grad:
        s = s.clone()
    if zero_point is None:
        return x_in, s, None, axis
    z = _values("zero_point", zero_point, x)
    if z.numel() == 1:
        return x_in, s, z if axis is None else z.reshape(1).expand(s.numel()), axis
    if zero_point.shape != s.shape:
        if z.numel() != s.numel():
            raise ValueError(
                f"zero_point must have {' or '.join(map(str, sorted({1, s.numel()})))} elements, given this scale, "
                f"got the shape {tuple(zero_point.shape)}"
            )
        own, own_axis = _view(x, zero_point, ch_axis, "zero_point")
        if own_axis != axis or own.shape != x_in.shape:
            raise ValueError(
                f"zero_point must vary along the axis of the scale, {axis}, got the shape {tuple(zero_point.shape)} "
                f"beside {tuple(s.shape)}"
            )
    return x_in, s, z, axis


def _dense_order(x: torch.Tensor) -> list[int] | None:
    """The order of its axes in which x is contiguous, or None where it has gaps."""
    order = sorted(range(x.ndim), key=x.stride, reverse=True)
    return order if x.permute(order).is_contiguous() else None


def _view(
    x: torch.Tensor, scale: torch.Tensor | float, ch_axis: int | None, name: str = "scale"
) -> tuple[torch.Tensor, int | None]:
    """x, and the axis along which the scale varies: where it varies by groups, a view of x in which they are rows."""
    if not isinstance(scale, torch.Tensor):
        return x, None
    if scale.numel() == 1:
        own_axis = checks.axis_of(x, None if ch_axis == -1 else ch_axis)
        if own_axis is not None and x.shape[own_axis] != 1:
            raise ValueError(f"{name} must have {x.shape[own_axis]} elements, the length of ch_axis {ch_axis}, got one")
        return x, None
    shape = scale.shape
    if len(shape) == 1 and ch_axis is not None:
        return x, checks.axis_of(x, ch_axis)
    padded = (1,) * (x.ndim - len(shape)) + tuple(shape)
    varies = [i for i, n in enumerate(padded) if n != 1]
    if len(padded) == x.ndim and len(varies) == 1 and padded[varies[0]] == x.shape[varies[0]]:
        if ch_axis is not None and checks.axis_of(x, ch_axis) != varies[0]:
            raise ValueError(f"{name} must vary along ch_axis, {ch_axis}, got the shape {tuple(shape)}")
        return x, varies[0]
    own = len(shape) == x.ndim  # other shapes broadcast, and have no blocks
    if len(padded) != x.ndim or any(
        n != 1 and n != m and not (own and n and m % n == 0) for n, m in zip(padded, x.shape, strict=True)
    ):
        raise ValueError(
            f"{name} must have one element, or broadcast to x, or have one for each group or block of x, got "
            f"{tuple(shape)} for x of {tuple(x.shape)}; ch_axis names the axis of a scale of one dimension"
        )
    rows = _rows(x.shape, padded)
    if rows is None:
        blocks = " × ".join(str(m // n) for n, m in zip(padded, x.shape, strict=True))
        raise ValueError(
            f"{name} must vary along one axis of some view of x, got {tuple(shape)} for x of {tuple(x.shape)}, whose "
            f"blocks of {blocks} elements lie apart: bring the axes along which it varies side by side first, as "
            "x.unflatten and x.movedim do"
        )
    return x.reshape(rows), 1


def _rows(shape: tuple[int, ...], counts: tuple[int, ...]) -> tuple[int, int, int] | None:
    """The shape of a view of x whose second axis is that of the scales, given so many along each axis of x."""
    parts = [part for m, n in zip(shape, counts, strict=True) for part in ((n, True), (m // n, False)) if part[0] != 1]
    runs = [(varies, math.prod(n for n, _ in run)) for varies, run in itertools.groupby(parts, lambda part: part[1])]
    at = [varies for varies, _ in runs].index(True)
    before, after = (math.prod(n for _, n in part) for part in (runs[:at], runs[at + 1 :]))
    return None if any(varies for varies, _ in runs[at + 1 :]) else (before, runs[at][1], after)


def _values(name: str, values: Any, x: torch.Tensor) -> torch.Tensor:
    """Float32 values on the device of x."""
    if not isinstance(values, torch.Tensor):
        return torch.full((1,), checks.real(name, values), dtype=torch.float32, device=x.device)
    if values.dtype == torch.float32 and values.device == x.device:
        return values
    if values.is_complex():
        raise TypeError(f"{name} must be real, got {checks.short(values.dtype)}")
    return values.to(x.device, torch.float32)
