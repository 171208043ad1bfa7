"""``hdrq info``."""

from __future__ import annotations

from rich.markup import escape

from hdrq.cli.terminal import console


def info() -> None:
    """Print versions, backends (and why one is missing), processor, threads and GPU."""
    from hdrq.backends.info import facts

    for name, value in facts().items():
        console.print(f"[bold]{name:>20}[/bold]  {escape(value)}", highlight=False, soft_wrap=True)
