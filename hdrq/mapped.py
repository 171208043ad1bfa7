"""Tensors in files that are mapped: the system writes them out, and reads them again, where memory gets short."""

from __future__ import annotations

import errno
import math
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch


def mapped(shape: Sequence[int], dtype: torch.dtype, folder: str | os.PathLike | None, advice: str) -> torch.Tensor:
    """A tensor in a file without a name, so that none outlives the process.

    All of its room is taken now: writing to a map on a full disk would end the process.

    Args:
        folder: where the file lies; None for the system's folder of temporary files.
        advice: what to do where the disk is full, for the message.

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
            error.errno, f"the folder must have room for {size:,} bytes, got {free:,} free; {advice}", str(place)
        ) from error
    finally:
        os.close(handle)
        os.unlink(path)
