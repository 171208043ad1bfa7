"""The ``torch.library`` namespace of hdrq: how an op is registered, and the short way to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._C._functorch import peek_interpreter_stack

from hdrq import checks
from hdrq.backends.dispatch import forced, forcing

_LIBRARY = torch.library.Library("hdrq", "DEF")
_PLAIN = {torch.Tensor, torch.nn.Parameter}
_VALUES = {int, float, bool, str, type(None)}  # asking isinstance of them costs more, since a tensor's class answers it


class Op:
    """An op: ``torch.ops.hdrq``'s where somebody traces, transforms or watches it, else its function without torch's
    dispatcher, whose Python wrappers cost more than a small tensor's kernel.

    Args:
        packet: what is registered.
        function: the op on real tensors; it checks its arguments, or its caller has.
        check: the same check, for arguments that go to the dispatcher, whose own messages name no way out; None where
            the caller has checked.
    """

    def __init__(self, packet: Any, function: Callable, check: Callable | None) -> None:
        self._packet, self.function, self._check = packet, function, check
        self.remember: Callable | None = None
        self.gradient: Callable | None = None

    @property
    def default(self) -> Any:
        """The overload that is registered."""
        return self._packet.default

    def __call__(self, *args):
        learns, plain = False, not watched()
        for argument in args:
            kind = type(argument)
            if kind in _VALUES:
                continue
            if isinstance(argument, torch.Tensor):
                learns |= argument.requires_grad
                plain &= kind in _PLAIN and not argument.is_meta
            elif isinstance(argument, list):
                plain = False
        learns &= torch.is_grad_enabled()
        if not plain or (learns and self.gradient is None):
            if self._check is not None:
                self._check(*args)
            return self._packet(*args)
        return _apply(self, *args) if learns else self.function(*args)


class _Differentiable(torch.autograd.Function):
    """An op without torch's dispatcher, with its gradient."""

    @staticmethod
    def forward(ctx, op, *args):
        result = op.function(*args)
        op.remember(ctx, args, result)
        ctx.op = op
        return result

    @staticmethod
    def backward(ctx, *grads):
        return None, *ctx.op.gradient(ctx, *grads)


# Without the search of all arguments for tensors of a transform that has ended: a transform is watched for above.
_apply = super(torch.autograd.Function, _Differentiable).apply


def as_type(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``x.to(dtype)``, which is not free where there is nothing to do."""
    return x if x.dtype == dtype else x.to(dtype)


def as_shape(x: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """``x.reshape(shape)``, which is not free where there is nothing to do."""
    return x if x.shape == shape else x.reshape(shape)


def flat(values: torch.Tensor | None) -> torch.Tensor | None:
    """A small tensor as backends take it by its address: of one dimension, each value beside the last."""
    return None if values is None else values.flatten().contiguous()


def grouped(
    x: torch.Tensor,
    scale: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    axis: int | None,
    group_size: int | None,
) -> tuple[torch.Tensor, int | None]:
    """``x`` itself, or its groups of ``group_size`` neighbours as rows, and the axis along which scales then vary."""
    if group_size is None or not isinstance(x, torch.Tensor):
        return x, axis
    shape = checks.groups("x", x.shape, axis, group_size)
    for name, value in (("scale", scale), ("zero_point", zero_point)):
        if value is not None:
            checks.per_group(name, value, shape, group_size)
    return x.reshape(-1, group_size), 0


def watched() -> bool:
    """Whether a compiler, a mode, a transform or a trace must see the ops that are called."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or (torch._C._len_torch_function_stack() > 0 and _functions_watched())
        or peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
    )


def _functions_watched() -> bool:
    """Whether a mode for functions looks at ops; one of ours says that it does not."""
    modes = torch.overrides._get_current_function_mode_stack()
    return any(getattr(mode, "looks_at_ops", True) for mode in modes)


def register(
    schema: str,
    implementation: Callable,
    fake: Callable,
    *,
    check: Callable | None = None,
    checked: Callable | None = None,
    no_vmap: str | None = None,
) -> Op:
    """Define an op on all devices, with its fake, and return it.

    Args:
        check: the implementation's own check, for an op that users' arguments reach unchecked.
        checked: the implementation without its check, for an op whose arguments we have checked.
        no_vmap: why vmap refuses it, if it does.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"hdrq::{name}", fake, lib=_LIBRARY)
    if no_vmap is not None:

        def refuse(info, in_dims, *args):
            raise RuntimeError(f"hdrq::{name} must not be called under torch.func.vmap: {no_vmap}")

        torch.library.register_vmap(f"hdrq::{name}", refuse, lib=_LIBRARY)
    return Op(getattr(torch.ops.hdrq, name), checked or implementation, check)


def differentiable(op: Op, setup_context: Callable, backward: Callable) -> None:
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

    op.remember, op.gradient = remember, run
    torch.library.register_autograd(op.default, run, setup_context=remember, lib=_LIBRARY)


def not_differentiable(op: Op, why: str) -> None:
    """Make asking for an op's gradient an error that says why there is none."""

    def refuse(ctx, *grads):
        raise RuntimeError(f"{op.default} has no gradient: {why}")

    torch.library.register_autograd(op.default, refuse, lib=_LIBRARY)
