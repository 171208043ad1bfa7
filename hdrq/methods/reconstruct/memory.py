"""malloc, told to keep what is freed: else pages that are given back and faulted anew take half of a step's time."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from hdrq.mapped import give_back_freed_memory

TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4  # mallopt's parameters, as <malloc.h> has them
SETTLED = {TRIM_THRESHOLD: 64 << 20, MMAP_THRESHOLD: 32 << 20, MMAP_MAX: 65536}  # where glibc's own adjustment ends


_opted_in = ContextVar("hdrq_keep_freed_memory", default=False)


@contextmanager
def keep_freed_memory() -> Iterator[None]:
    """Let :func:`hdrq.quantize` tell malloc to keep what is freed while units are learned inside this context.

    Steps on a CPU then take up to half the time. mallopt changes the allocator of the whole process, other threads
    and libraries included, so nothing is changed unless the process asks for it with this; ``hdrq quantize`` and
    ``hdrq demo`` do. Each loop of learning ends with glibc's own settings, and what was kept is given back.

    Example:
        >>> with hdrq.keep_freed_memory():
        ...     quantized = hdrq.quantize(model, images, "hdrq", bits="W4A4", source=source)
    """
    token = _opted_in.set(True)
    try:
        yield
    finally:
        _opted_in.reset(token)


@contextmanager
def kept_memory() -> Iterator[None]:
    """Keep freed memory for the next allocation, in the whole process, until the end; then give it back.

    glibc maps a block above 32 MiB at each allocation and unmaps it at each free, so the pages of large activations
    fault anew in every step. Nothing is done outside :func:`keep_freed_memory`, where malloc is not glibc's, or where
    the environment has settings of its own.

    Source: mallopt(3).
    """
    own = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if not _opted_in.get() or own or platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(MMAP_MAX, 0)
    libc.mallopt(TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        for parameter, value in SETTLED.items():
            libc.mallopt(parameter, value)
        give_back_freed_memory()
