"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


def write_atomically(path: str | os.PathLike, data: bytes | str) -> None:
    """Write ``data`` to ``path`` at once, in place of what is there.

    Raises:
        OSError: it cannot be written, or the disk is full; what was there stays.
    """
    with replacing(path) as file, disk_with_room(path):
        file.write(data.encode() if isinstance(data, str) else data)


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A file to write, which takes the place of ``path`` at the end of the block, and is gone after an error in it."""
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path} must be in a folder that exists, got none")
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            with disk_with_room(path):
                file.flush()
                os.fsync(file.fileno())
        with disk_with_room(path):
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(temporary)


@contextmanager
def disk_with_room(path: str | os.PathLike) -> Iterator[None]:
    """Name ``path`` in the message of any error while it is written."""
    try:
        yield
    except OSError as error:
        message = f"{path} must be written to a disk with room, got {error.strerror or error}; what was there is kept"
        raise OSError(error.errno, message) from error
