"""Another package's quantizer functions, replaced by ours while it runs."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch

from hdrq import checks
from hdrq.compat.conventions import NAMES, NOISY, Convention, Noise, Unlike, check_noise, recognised, roles_of


@dataclass
class Replaced:
    """A function that is ours now."""

    name: str
    form: Convention | Noise
    places: list[tuple[ModuleType, str]]
    original: Any
    now: Any
    calls: int = 0
    passed_on: int = 0  # calls that the original got: of tensors that our op does not take


@dataclass
class Patch:
    """What :func:`patch` did. As a context manager it is undone at the end."""

    package: str
    replaced: list[Replaced] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)  # by name: why
    undone: bool = False

    def report(self) -> str:
        """A line for each function: what it is now, or why it was left."""
        lines = [f"{self.package}: {len(self.replaced)} replaced, {len(self.left)} left"]
        for r in self.replaced:
            passed = f", {r.passed_on} passed on" if r.passed_on else ""
            lines.append(f"  replaced {r.name}: {r.form}; {r.calls} calls{passed}")
        lines += [f"  left {name}: {why}" for name, why in self.left.items()]
        return "\n".join(lines)

    def undo(self) -> None:
        """Put the originals back.

        Raises:
            RuntimeError: something was replaced again since: what came later must be undone first. Nothing is undone.
        """
        if self.undone:
            return
        for r in self.replaced:
            for module, name in r.places:
                if getattr(module, name, None) is not r.now:
                    raise RuntimeError(
                        f"{module.__name__}.{name} must be as the patch left it to be undone, got another one: "
                        "undo what came later first"
                    )
        for r in self.replaced:
            for module, name in r.places:
                setattr(module, name, r.original)
        self.undone = True

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *error) -> None:
        self.undo()


def patch(package: str | ModuleType, *, seed: int = 0) -> Patch:
    """Replace the quantizer functions of a package that is imported by fused ones that compute the same.

    A function, or an ``autograd.Function``, is replaced where its name speaks of quantization or LSQ, all its arguments
    are known by name (``x, scale, zero_point, quant_min, quant_max, ch_axis, grad_factor`` and the like), and it
    computes on small numbers what one of our conventions computes: values bit for bit, gradients within round-off.
    Functions of noise must clip and differentiate as the released HDRQ's, and have its distribution. A function is
    replaced in every module of the package that holds it, until :meth:`Patch.undo` or the end of a ``with`` block.

    A call with other tensors than those tried (no float32, a scale that varies along two axes, a zero point that learns
    where its gradient was another) goes to the original, and is counted. A scale that is not positive is refused by
    name, where the original may take it.

    Args:
        package: a package or a module, or its name.
        seed: of the noise. Calls are counted, so a run repeats itself.

    Raises:
        ValueError: it is not imported, or is patched already.

    Example::

        import hdrq.compat
        import qdrop.quantization

        with hdrq.compat.patch("qdrop") as patched:
            reconstruct(...)
        print(patched.report())
    """
    checks.integer("seed", seed, 0, 2**63 - 1)
    name = package.__name__ if isinstance(package, ModuleType) else package
    if name not in sys.modules:
        raise ValueError(f"package must be imported before it is patched, got {name!r}")
    result = Patch(name)
    places: dict[int, list[tuple[ModuleType, str]]] = {}
    found: dict[int, Any] = {}
    for module, key, value in _candidates(name):
        if hasattr(value, "_hdrq_patched"):
            raise ValueError(f"{module.__name__}.{key} must not be patched twice: undo the first patch")
        found[id(value)] = value
        places.setdefault(id(value), []).append((module, key))
    for identity, original in found.items():
        own = f"{original.__module__}.{original.__qualname__}"
        try:
            result.replaced.append(_replaced(own, original, places[identity], seed, len(result.replaced)))
        except Unlike as reason:
            result.left[own] = str(reason)
    for r in result.replaced:
        for module, key in r.places:
            setattr(module, key, r.now)
    return result


def _candidates(package: str) -> Iterator[tuple[ModuleType, str, Any]]:
    """Functions and autograd functions of the package whose name speaks of quantization, wherever it has them."""
    for name, module in sorted(sys.modules.items()):
        if module is None or not (name == package or name.startswith(f"{package}.")):
            continue
        for key, value in list(vars(module).items()):
            if hasattr(value, "_hdrq_patched") or (_is_function(value) and _is_of(value, package)):
                yield module, key, value


def _is_function(value: Any) -> bool:
    return inspect.isfunction(value) or (inspect.isclass(value) and issubclass(value, torch.autograd.Function))


def _is_of(function: Any, package: str) -> bool:
    """Whether it is the package's own, and its name speaks of quantization."""
    return f"{function.__module__}.".startswith(f"{package}.") and NAMES.search(function.__name__) is not None


def _replaced(name: str, original: Any, places: list, seed: int, stream: int) -> Replaced:
    is_class = inspect.isclass(original)
    function, signature = (original.apply, _after_ctx(original.forward)) if is_class else (original, _read(original))
    roles = roles_of(list(signature.parameters))
    form: Convention | Noise
    if NOISY.search(original.__name__):
        check_noise(function, roles)
        form = Noise(seed, stream)
    else:
        form = recognised(function, roles)
    record = Replaced(name, form, places, original, None)
    call = _caller(record, function, roles, signature)
    if is_class:
        record.now = type(original.__name__, (original,), {"apply": staticmethod(call), "_hdrq_patched": True})
    else:
        record.now = functools.wraps(original)(call)
        record.now._hdrq_patched = True
    return record


def _read(function: Callable) -> inspect.Signature:
    try:
        return inspect.signature(function)
    except (TypeError, ValueError) as error:
        raise Unlike("its arguments cannot be read") from error


def _after_ctx(forward: Callable) -> inspect.Signature:
    """The arguments of an autograd function's ``apply``."""
    signature = _read(forward)
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def _caller(record: Replaced, function: Callable, roles: list[str], signature: inspect.Signature) -> Callable:
    """A function of the original's arguments."""

    def call(*args, **kwargs):
        if kwargs or len(args) != len(roles):
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            args = [bound.arguments[name] for name in signature.parameters]
        given = dict(zip(roles, args, strict=True))
        record.calls += 1
        if not _taken(record.form, **given):
            record.passed_on += 1
            return function(*args)
        try:
            return record.form(**given)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{record.name}, patched by hdrq.compat: {error}") from error

    return call


def _taken(form: Convention | Noise, x, scale, zero_point=None, ch_axis=None, **_) -> bool:
    """Whether our op takes the tensors."""
    if (
        isinstance(zero_point, torch.Tensor)
        and zero_point.requires_grad
        and not getattr(form, "learns_zero_point", True)
    ):
        return False
    tensors = [t for t in (scale, zero_point) if isinstance(t, torch.Tensor)]
    if not isinstance(x, torch.Tensor) or x.dtype != torch.float32:  # as it was tried
        return False
    if any(t.ndim > x.ndim or (t.is_floating_point() and t.dtype != torch.float32) for t in tensors):
        return False
    return all(_along_one_axis(t, x, ch_axis) for t in tensors)


def _along_one_axis(values: torch.Tensor, x: torch.Tensor, ch_axis: int | None) -> bool:
    if values.numel() == 1 or (values.ndim == 1 and ch_axis is not None):
        return True
    varying = [i for i in range(-values.ndim, 0) if values.shape[i] != 1]
    return len(varying) == 1 and values.shape[varying[0]] == x.shape[varying[0]]
