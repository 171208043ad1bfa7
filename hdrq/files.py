"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def write_atomically(path: str | os.PathLike, data: bytes | str) -> None:
    """Put ``data`` where ``path`` says, in place of what is there, at once.

    Raises:
        OSError: it cannot be written, the disk is full; what was there stays.
    """
    path = Path(path)
    data = data.encode() if isinstance(data, str) else data
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        message = f"{path} must be written to a disk with room, got {error.strerror or error}; what was there is kept"
        raise OSError(error.errno, message) from error
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)
