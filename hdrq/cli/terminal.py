"""What commands share: the two consoles, and how bad input ends one."""

from __future__ import annotations

import sys
from typing import NoReturn

import typer
from rich.console import Console

console, errors = Console(), Console(stderr=True)


def refuse(error: Exception) -> NoReturn:
    """One line on stderr, status 2: the input was bad."""
    print(f"hdrq: {plain(str(error))[:2000]}", file=sys.stderr)
    raise typer.Exit(2)


def plain(text: str) -> str:
    """A text on one line, every control character as an escape: a hostile file's names must not steer the terminal."""
    joined = " ".join(text.splitlines())
    safe = "".join(c if c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in joined)
    encoding = sys.stdout.encoding or "utf-8"
    return safe.encode(encoding, errors="backslashreplace").decode(encoding)
