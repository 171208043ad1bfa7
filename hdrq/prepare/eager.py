"""Compiled modules, run as they are written."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_lock = threading.Lock()
_inside = 0  # blocks of all threads, since the stance of the compiler is the process's
_stance: Any = None  # the first of them took it


@contextmanager
def eagerly() -> Iterator[None]:
    """Inside the block, or the function, modules that ``torch.compile`` has compiled run as they are written.

    Compiled code does not ask whether hooks were added since, so quantizers of inputs, and everything that watches a
    model, would be passed over in silence.
    """
    global _inside, _stance
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and importing it takes seconds
        yield
        return
    with _lock:
        _inside += 1
        if _inside == 1:
            _stance = torch.compiler.set_stance("force_eager")
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                _stance.__exit__(None, None, None)
