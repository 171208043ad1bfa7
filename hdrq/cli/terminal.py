"""What commands share: the two consoles, and how bad input ends one."""

from __future__ import annotations

import sys
from typing import NoReturn

import typer
from rich.console import Console

console, errors = Console(), Console(stderr=True)


def refuse(error: Exception) -> NoReturn:
    """One line on stderr, status 2: the input was bad."""
    print(f"hdrq: {error}", file=sys.stderr)
    raise typer.Exit(2)
