"""Fused quantizers for reconstruction loops, and a merge of quantized models that works on their integers."""

from hdrq import evaluate, ops, qat, recipes, report
from hdrq._version import __version__
from hdrq.backends import available_backends, use_backend
from hdrq.checkpoint.float_states import load_float
from hdrq.checkpoint.inspection import contents as inspect
from hdrq.checkpoint.loading import load
from hdrq.checkpoint.saving import save
from hdrq.errors import BackendError, DivergenceError
from hdrq.merging.adding import add
from hdrq.merging.changes import Change
from hdrq.merging.integers import integers
from hdrq.merging.models import merge
from hdrq.methods.post_merge import post_merge
from hdrq.methods.post_training import quantize
from hdrq.methods.reconstruct.memory import keep_freed_memory
from hdrq.methods.sensitivity import sensitivity
from hdrq.rng import rng_state

__all__ = [
    "BackendError",
    "Change",
    "DivergenceError",
    "__version__",
    "add",
    "available_backends",
    "evaluate",
    "inspect",
    "integers",
    "keep_freed_memory",
    "load",
    "load_float",
    "merge",
    "ops",
    "post_merge",
    "qat",
    "quantize",
    "recipes",
    "report",
    "rng_state",
    "save",
    "sensitivity",
    "use_backend",
]


__path__.append(f"{__path__[0]}/_first_house")  # hdrq.model and its like: they warn with what to write instead


def __getattr__(name: str):
    """Names of the first house: they work for one release, and warn with what to write instead."""
    if name == "Diverged":
        import warnings

        warnings.warn("hdrq.Diverged is hdrq.DivergenceError now", DeprecationWarning, stacklevel=2)
        return DivergenceError
    raise AttributeError(f"module 'hdrq' has no attribute {name!r}")
