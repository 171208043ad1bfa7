"""Fused quantizers for reconstruction loops, and a merge of quantized models that works on their integers."""

from hdrq import ops
from hdrq.backends import BackendError, backends, use_backend
from hdrq.rng import rng_state

__version__ = "0.1.0"

__all__ = ["BackendError", "backends", "ops", "rng_state", "use_backend"]
