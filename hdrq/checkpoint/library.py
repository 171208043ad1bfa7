"""The library of safetensors. Quantizing and merging in memory do without it, and files are refused where it is not."""

from __future__ import annotations

from typing import Any

from hdrq.errors import MissingExtra

__all__ = ["SafetensorError", "check_installed", "load_file", "safe_open", "save", "save_file"]

try:
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file, save, save_file

    _installed = True
except ModuleNotFoundError:
    _installed = False


def check_installed(*_: Any, **__: Any) -> Any:
    """Files can be read and written.

    Raises:
        MissingExtra: the library is not installed.
    """
    if not _installed:
        raise MissingExtra('files of models need safetensors, which is not installed: pip install "hdrq[files]"')


if not _installed:
    safe_open = load_file = save = save_file = check_installed  # type: ignore[assignment,misc]

    class SafetensorError(Exception):  # type: ignore[no-redef]
        """What the library would raise."""
