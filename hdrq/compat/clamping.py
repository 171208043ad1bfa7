"""Gradients of ``torch.clamp`` at its bounds, which torch 2.14 stops and all before it pass.

A fake quantizer that rounds and then clamps has the codes at both ends of its range on these bounds: with 2 bits half
of all codes. Loops were published with versions that pass the gradient there, and so do the ops of hdrq on every one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


@cache
def stops_at_bounds() -> bool:
    """Whether this torch's clamp has no gradient on its bounds."""
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.zeros(1, requires_grad=True)
        return not torch.autograd.grad(x.clamp(0, 1), x)[0].item()


@contextmanager
def closed_clamp() -> Iterator[None]:
    """Inside, ``torch.clamp`` and ``clip``, one-sided and in place too, pass gradients on their bounds.

    ``∂x`` is g where ``min ≤ x ≤ max``, else 0; ``∂min`` is g where ``x < min``, and ``∂max`` where ``x > max``. Values
    are the same. Where torch does so by itself, before 2.14, nothing is changed.
    """
    if not stops_at_bounds():
        yield
        return
    with _ClosedClamp():
        yield


class _ClosedClamp(TorchFunctionMode):
    looks_at_ops = False  # of hdrq: they are called under it as without

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func not in CLAMPS or "out" in kwargs:
            return func(*args, **kwargs)
        x, low, high = CLAMPS[func](*args, **kwargs)
        if not any(isinstance(each, torch.Tensor) and each.requires_grad for each in (x, low, high)):
            return func(*args, **kwargs)
        y = x
        if low is not None:
            y = torch.where(y < low, low, y)
        if high is not None:
            y = torch.where(y > high, high, y)
        return x.copy_(y) if func in IN_PLACE else y


def _both(input: torch.Tensor, min: Any = None, max: Any = None) -> tuple:
    return input, min, max


def _low(input: torch.Tensor, min: Any) -> tuple:
    return input, min, None


def _high(input: torch.Tensor, max: Any) -> tuple:
    return input, None, max


CLAMPS: dict[Callable, Callable[..., tuple]] = {
    getattr(place, f"{name}{mark}"): bounds
    for name, bounds in (("clamp", _both), ("clip", _both), ("clamp_min", _low), ("clamp_max", _high))
    for place in (torch, torch.Tensor)
    for mark in ("", "_")
}
IN_PLACE = {func for func in CLAMPS if func.__name__.endswith("_")}
