"""Our ops under the argument lists, classes and conventions of other people's quantization loops.

:mod:`hdrq.compat.functional` has functions, :mod:`hdrq.compat.modules` modules for a loop or a parametrization,
:mod:`hdrq.compat.torch_ao` and :mod:`hdrq.compat.torchao` the fake-quantize of those two, and :func:`patch` puts ours
in the place of another package's functions and modules.
"""

from __future__ import annotations

from typing import Any

from hdrq.compat import functional
from hdrq.compat.clamping import closed_clamp
from hdrq.compat.modules import LSQ, NoiseQuantize
from hdrq.compat.patching import Patch, patch

__all__ = [
    "LSQ",
    "FakeQuantize",
    "LearnableFakeQuantize",
    "NoiseQuantize",
    "Patch",
    "closed_clamp",
    "functional",
    "patch",
]


def __getattr__(name: str) -> Any:
    """The classes that import ``torch.ao``, which nothing else needs."""
    if name in ("FakeQuantize", "LearnableFakeQuantize"):
        from hdrq.compat import torch_ao

        return getattr(torch_ao, name)
    raise AttributeError(f"module 'hdrq.compat' has no attribute {name!r}")
