"""Memory of the system: tensors in files that it maps, and memory that malloc gives back to it."""

from __future__ import annotations

import ctypes
import errno
import math
import os
import platform
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch


def mapped(
    shape: Sequence[int], dtype: torch.dtype, folder: str | os.PathLike | None, what: str, advice: str
) -> torch.Tensor:
    """A tensor in a file without a name, so that none outlives the process.

    The system writes it out, and reads it again, where memory gets short. All of its room is taken now: writing to a
    map on a full disk would end the process.

    Args:
        folder: where the file lies; None for the system's folder of temporary files.
        what, advice: what the folder is called where the disk is full, and what to do then.

    Raises:
        OSError: the disk is full, or the folder cannot be written to.
    """
    elements = math.prod(shape)
    size = elements * dtype.itemsize
    handle, path = tempfile.mkstemp(prefix="hdrq-", dir=folder)
    try:
        if size and hasattr(os, "posix_fallocate"):  # not on macOS
            os.posix_fallocate(handle, 0, size)
        return torch.from_file(path, shared=True, size=elements, dtype=dtype).view(*shape)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        place = Path(path).parent
        free = shutil.disk_usage(place).free
        raise OSError(
            error.errno, f"{what} must have room for {size:,} bytes, got {free:,} free; {advice}", str(place)
        ) from error
    finally:
        os.close(handle)
        os.unlink(path)


def give_back_freed_memory() -> None:
    """Let malloc give the system what is free in the middle of its heap; where it is not glibc's nothing is done."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(ctypes.c_size_t(0))
