"""The implementations of the ops, and the choice among them (:mod:`hdrq.backends.dispatch`)."""

import sys
import warnings
from types import ModuleType

from hdrq.backends.dispatch import available_backends, use_backend

__all__ = ["available_backends", "use_backend"]


class _Callable(ModuleType):
    """This package, which can be called as the function of its name in the first house could, for one release."""

    def __call__(self) -> dict[str, str | None]:
        warnings.warn("hdrq.backends() is hdrq.available_backends() now", DeprecationWarning, stacklevel=2)
        return available_backends()


sys.modules[__name__].__class__ = _Callable
