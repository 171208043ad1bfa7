"""Watching the modules of a model while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from hdrq.prepare.eager import eagerly


def version_of(x: torch.Tensor) -> int:
    """How often a tensor was changed in place; 0 for one made in inference mode, which does not say."""
    return 0 if x.is_inference() else x._version


@contextmanager
def hooks(handles: Iterable) -> Iterator[None]:
    """Remove hooks when the block ends; inside it they are called, in compiled modules too."""
    handles = list(handles)
    try:
        with eagerly():
            yield
    finally:
        for handle in handles:
            handle.remove()


def observe(
    model: nn.Module,
    run: Callable[[nn.Module], Any],
    *,
    before: Callable[..., None] | None = None,
    after: Callable[..., None] | None = None,
    names: Iterable[str] | None = None,
) -> Any:
    """Run a model and see every call of its modules, in the order of execution.

    Args:
        run: ``run(model)`` executes the model; what it returns is returned.
        before: called as ``before(name, module, args, kwargs)`` when a module is called.
        after: called as ``after(name, module, args, kwargs, output)`` when it has returned.
        names: the modules to watch; None for all of them, the model itself (``""``) too.
    """
    modules = dict(model.named_modules()) if names is None else {name: model.get_submodule(name) for name in names}
    handles = []
    for name, module in modules.items():
        if before is not None:
            handles.append(module.register_forward_pre_hook(_entering(name, before), with_kwargs=True))
        if after is not None:
            handles.append(module.register_forward_hook(_leaving(name, after), with_kwargs=True))
    with hooks(handles):
        return run(model)


def _entering(name: str, see: Callable[..., None]) -> Callable:
    def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
        see(name, module, args, kwargs)

    return hook


def _leaving(name: str, see: Callable[..., None]) -> Callable:
    def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        see(name, module, args, kwargs, output)

    return hook
