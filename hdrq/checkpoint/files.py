"""Files that appear whole or not at all."""

from __future__ import annotations

import csv
import errno
import glob
import hashlib
import io
import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

SETTLED = 60.0  # seconds without a write after which a temporary file may be what a killed process left


def write_atomically(path: str | os.PathLike, data: bytes | str) -> None:
    """Write ``data`` to ``path`` at once, in place of what is there.

    Raises:
        OSError: it cannot be written, or the disk is full; what was there stays.
    """
    with replacing(path) as file, disk_with_room(path):
        file.write(data.encode() if isinstance(data, str) else data)


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A file to write, which takes the place of ``path`` at the end of the block, and is gone after an error in it.

    A file that is replaced keeps its permissions; a new one has those that the process gives to new files. A symbolic
    link stays, and its target is replaced.
    """
    target = output_path(path)
    mode = stat.S_IMODE(target.stat().st_mode) if target.exists() else None
    temporary = _beside(target)
    with disk_with_room(path):
        handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    with suppress(OSError):  # a file system without locks
        _claim(handle)
    try:
        file = os.fdopen(handle, "wb")
        try:
            yield file
            with disk_with_room(path):
                file.flush()
                os.fsync(file.fileno())
        finally:
            with suppress(OSError):  # of what was not written an error has spoken already, which names the file
                file.close()
        with disk_with_room(path):
            if mode is not None:
                os.chmod(temporary, mode)
            os.replace(temporary, target)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(temporary)


@contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[Path]:
    """A folder to write files into, which is at ``path`` at the end of the block, and is gone after an error in it.

    Raises:
        ValueError: there is a file, or a folder that is not empty.
        OSError: it cannot be written.
    """
    target = output_folder(path)
    if target.is_dir() and any(target.iterdir()):
        raise ValueError(f"out must be a new or an empty folder, got {os.fspath(path)!r}, which holds files")
    temporary = _beside(target.absolute())
    handle = -1
    with disk_with_room(path):
        temporary.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        if fcntl is not None:
            handle = os.open(temporary, os.O_RDONLY)
            with suppress(OSError):
                _claim(handle)
    try:
        yield temporary
        with disk_with_room(path):
            if target.is_dir():
                target.rmdir()  # it is empty
            temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if handle >= 0:
            os.close(handle)


def _beside(target: Path) -> Path:
    """A name in the same folder, under which a file or a folder is written; what killed processes left is removed.

    Who writes holds a lock, which ends with the process. What nobody holds, and nobody wrote to for a minute, is left.
    """
    name = f".{os.fsdecode(os.fsencode(target.name)[:200])}.hdrq-"
    for left in target.parent.glob(f"{glob.escape(name)}{'[0-9a-f]' * 8}") if fcntl is not None else ():
        with suppress(OSError):  # another process holds it, or was faster
            found = left.lstat()
            if time.time() - found.st_mtime < SETTLED or not (
                stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)
            ):
                continue
            handle = os.open(left, os.O_RDONLY)
            try:
                _claim(handle)
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            finally:
                os.close(handle)
    return target.parent / f"{name}{secrets.token_hex(4)}"


def _claim(handle: int) -> None:
    """Lock an open file or folder for as long as this process has it open.

    Raises:
        OSError: another process holds it.
    """
    if fcntl is not None:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def csv_text(rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Rows as a CSV with a header."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def output_path(path: str | os.PathLike, name: str = "out") -> Path:
    """The file that writing to ``path`` would make or replace: the target, where ``path`` is a symbolic link.

    Args:
        name: what a message calls the path.

    Raises:
        FileNotFoundError: its folder does not exist.
        ValueError: a folder, a device or a pipe is there; nothing of the kind is ever replaced.
        PermissionError: its folder cannot be written to.
    """
    text, target = os.fspath(path), Path(os.path.realpath(path))
    if not text or target.is_dir():
        raise ValueError(f"{name} must be a file, got the folder {text!r}; give the name of a file in it")
    if target.exists() and not target.is_file():
        raise ValueError(f"{name} must be a regular file or a new one, got {text!r}, a device, a pipe or a socket")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{name} must be in a folder that exists, got {text!r}")
    if not os.access(target.parent, os.W_OK):
        raise PermissionError(f"{name} must be in a folder that can be written to, got {text!r}")
    return target


def check_room(path: str | os.PathLike, size: int, name: str = "out") -> None:
    """A disk has room for a file of so many bytes, beside what is there.

    Raises:
        OSError: it has not.
    """
    free = shutil.disk_usage(output_path(path, name).parent).free
    if size > free:
        raise OSError(
            errno.ENOSPC,
            f"{name} must be on a disk with room for {size:,} bytes at least, got {free:,} free for "
            f"{os.fspath(path)!r}; make room, or write elsewhere",
        )


def output_folder(path: str | os.PathLike, name: str = "out") -> Path:
    """A folder to write to, which need not exist yet: nothing is made, so that bad input leaves nothing behind.

    Raises:
        ValueError: a file is there, or in the place of a folder above.
        PermissionError: it cannot be written to, or not be made.
    """
    folder = Path(path)
    there = next(place for place in (folder, *folder.absolute().parents) if os.path.lexists(place))
    if not there.is_dir():
        raise ValueError(f"{name} must be a folder, or a new one in a folder, got {str(path)!r}, where {there} is none")
    if not os.access(there, os.W_OK):
        raise PermissionError(f"{name} must be a folder that can be written to, got {str(path)!r}")
    return folder


@contextmanager
def disk_with_room(path: str | os.PathLike) -> Iterator[None]:
    """Name ``path`` in the message of any error while it is written."""
    try:
        yield
    except OSError as error:
        message = f"{path} must be written to a disk with room, got {error.strerror or error}; what was there is kept"
        raise OSError(error.errno, message) from error


def file_hash(path: str | os.PathLike) -> str:
    """The SHA-256 of a file, as ``sha256sum`` prints it."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()
