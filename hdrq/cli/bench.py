"""``hdrq bench``."""

from __future__ import annotations

from typing import Annotated

import typer


def bench(arguments: Annotated[list[str] | None, typer.Argument(metavar="[FAMILY]... [OPTIONS]")] = None) -> None:
    """Verify the ops on this machine, then time them beside a copy, the eager formula and torch.compile."""
    from hdrq.benchmarks.__main__ import main

    raise typer.Exit(main(arguments or [], prog="hdrq bench"))
