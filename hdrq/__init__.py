"""Fused quantizers for reconstruction loops, and a merge of quantized models that works on their integers."""

from hdrq import evaluate, ops, recipes
from hdrq.backends import BackendError, backends, use_backend
from hdrq.block import Diverged
from hdrq.checkpoint import load, save
from hdrq.merging import merge
from hdrq.reconstruct import quantize
from hdrq.rng import rng_state

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "Diverged",
    "backends",
    "evaluate",
    "load",
    "merge",
    "ops",
    "quantize",
    "recipes",
    "rng_state",
    "save",
    "use_backend",
]
