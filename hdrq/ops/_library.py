"""The ``torch.library`` namespace of hdrq: how an op is registered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hdrq.backends.dispatch import forced, forcing

_LIBRARY = torch.library.Library("hdrq", "DEF")


def register(schema: str, implementation: Callable, fake: Callable, *, no_vmap: str | None = None) -> Any:
    """Define an op on all devices, with its fake, and return it. ``no_vmap`` says why vmap refuses it, if it does."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"hdrq::{name}", fake, lib=_LIBRARY)
    if no_vmap is not None:

        def refuse(info, in_dims, *args):
            raise RuntimeError(f"hdrq::{name} must not be called under torch.func.vmap: {no_vmap}")

        torch.library.register_vmap(f"hdrq::{name}", refuse, lib=_LIBRARY)
    return getattr(torch.ops.hdrq, name)


def differentiable(op: Any, setup_context: Callable, backward: Callable) -> None:
    """Give an op its gradient. It runs with the backend of the op, since torch may take it in another thread."""

    def remember(ctx, inputs, output) -> None:
        ctx.hdrq_forced = forced()
        setup_context(ctx, inputs, output)

    def run(ctx, *grads):
        own = forced()
        if ctx.hdrq_forced is None or own is not None:  # a block around the gradient itself decides
            return backward(ctx, *grads)
        with forcing(ctx.hdrq_forced):
            return backward(ctx, *grads)

    torch.library.register_autograd(op.default, run, setup_context=remember, lib=_LIBRARY)


def not_differentiable(op: Any, why: str) -> None:
    """Make asking for an op's gradient an error that says why there is none."""

    def refuse(ctx, *grads):
        raise RuntimeError(f"{op.default} has no gradient: {why}")

    torch.library.register_autograd(op.default, refuse, lib=_LIBRARY)
