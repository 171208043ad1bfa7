"""Which implementations exist here, and which one is in use.

Every op has up to four implementations with the same signature: ``reference`` (NumPy), ``torch`` (plain PyTorch, any
device), ``cpp`` (CPU tensors) and ``triton`` (CUDA or ROCm tensors; CPU tensors under Triton's interpreter). Each is a
package with one module per family of ops, so the package's contents say what it implements.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

import numpy as np
import torch

from hdrq.errors import BackendError

PACKAGES = {
    "reference": "hdrq.backends.reference",
    "torch": "hdrq.backends.eager",
    "cpp": "hdrq.backends.native",
    "triton": "hdrq.kernels",
}
FAMILIES = ("noise", "fakequant", "rounding", "drop", "distance", "weights", "ranges", "merging", "systematic")
_of_process: str | None = os.environ.get("HDRQ_BACKEND") or None
_forced: ContextVar[str | None] = ContextVar("hdrq_backend", default=None)


def available_backends() -> dict[str, str | None]:
    """Each backend by name: None if it is available here, else the reason why it is not."""
    return {"reference": None, "torch": None, "cpp": _missing_cpp(), "triton": _missing_triton()}


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op with one backend, in this thread (or asynchronous task), until the block ends.

    Gradients of what is computed in the block run with it too, wherever they are taken. The environment variable
    ``HDRQ_BACKEND`` does the same for the whole process, from the start.

    Raises:
        BackendError: ``name`` is not available here; the message lists those that are.
    """
    _require(name)
    with forcing(name):
        yield


def of_process() -> str | None:
    """The backend that ``HDRQ_BACKEND`` names for the whole process; None where it is not set.

    Raises:
        BackendError: it is not available here.
    """
    if _of_process is not None:
        _require(_of_process)
    return _of_process


def forced() -> str | None:
    """The backend of the innermost :func:`use_backend` block that is running; None outside of every such block."""
    return _forced.get()


@contextmanager
def forcing(name: str | None) -> Iterator[None]:
    """Run every op as where :func:`forced` returned ``name``; None leaves the choice to the device."""
    previous = _forced.get()
    _forced.set(name)
    try:
        yield
    finally:
        _forced.set(previous)


def implementation(family: str, op: str, x: torch.Tensor) -> Callable:
    """The function that runs ``op`` on ``x``: that of the forced backend, else the best one for its device."""
    name = forced() or _of_process
    if name is None:
        name = chosen(family, x.device.type)
    else:
        _require(name)
        if not accepts(name, x.device.type):
            raise BackendError(f"backend must be one that runs on {x.device.type} tensors, got {name!r}")
        if not implements(name, family):
            able = ", ".join(n for n in PACKAGES if implements(n, family))
            raise BackendError(f"backend must be one that implements {op} ({able}), got {name!r}")
    return _load(name, family, op)


@cache
def chosen(family: str, device_type: str) -> str:
    """The name of the backend that runs a family on a device when none is forced."""
    return next(n for n in _preferences(device_type) if implements(n, family))


def accepts(name: str, device_type: str) -> bool:
    """Whether a backend runs on tensors of a device type."""
    if name == "cpp":
        return device_type == "cpu"
    if name == "triton":
        return device_type == "cuda" or (device_type == "cpu" and _interpreting())
    return True


@cache
def implements(name: str, family: str) -> bool:
    """Whether a backend has a family of ops."""
    package = PACKAGES[name]  # hdrq.kernels is missing where hdrq runs from a checkout that was not installed
    return importlib.util.find_spec(package) is not None and importlib.util.find_spec(f"{package}.{family}") is not None


def _preferences(device_type: str) -> tuple[str, ...]:
    if device_type == "cpu":
        return ("cpp", "torch") if _have_cpp() else ("torch",)
    if device_type == "cuda" and _missing_triton() is None:
        return ("triton", "torch")
    return ("torch",)


@cache
def _have_cpp() -> bool:
    """Whether CPU tensors run on the C++ path; the first call warns if they do not."""
    missing = _missing_cpp()
    if missing is not None:
        warnings.warn(f"CPU tensors run in plain PyTorch: {missing}", stacklevel=2)
    return missing is None


@cache
def _load(name: str, family: str, op: str) -> Callable:
    function = getattr(importlib.import_module(f"{PACKAGES[name]}.{family}"), op)
    return _on_arrays(function) if name == "reference" else function


def _on_arrays(function: Callable) -> Callable:
    """A function of NumPy arrays as one of tensors: half types widen to float32, results return to the device."""

    def arrays(value):
        if isinstance(value, list):
            return [arrays(v) for v in value]
        if isinstance(value, torch.Tensor):
            return (value.float() if value.is_floating_point() else value).detach().cpu().numpy()
        return value

    def call(*args):
        device = (args[0][0] if isinstance(args[0], list) else args[0]).device

        def tensors(results):
            if isinstance(results, tuple | list):
                return type(results)(map(tensors, results))
            return torch.as_tensor(results, device=device)

        with np.errstate(all="ignore"):  # infinities and NaN are inputs like others
            return tensors(function(*map(arrays, args)))

    return call


def _require(name: str) -> None:
    available = available_backends()
    if name not in available:
        raise BackendError(f"backend must be one of {', '.join(available)}, got {name!r}")
    if available[name] is not None:
        usable = ", ".join(n for n, why in available.items() if why is None)
        raise BackendError(f"backend must be one that is available here ({usable}), got {name!r}: {available[name]}")


@cache
def _missing_cpp() -> str | None:
    try:
        importlib.import_module("hdrq._C")
    except ImportError as error:
        return f"hdrq._C is not built ({error}); install g++, then install hdrq again"
    return None


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _missing_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return 'triton is not installed; pip install "hdrq[triton]"'
    if not torch.cuda.is_available() and not _interpreting():
        return "no CUDA or ROCm device (TRITON_INTERPRET=1 interprets the kernels on CPU tensors)"
    try:
        importlib.import_module(PACKAGES["triton"])  # refuses a triton that is too old
    except ImportError as error:
        return str(error)
    return None
