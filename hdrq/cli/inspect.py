"""``hdrq inspect``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from hdrq.cli.terminal import console


def inspect(
    file: Annotated[Path, typer.Argument(help="A quantized model.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print layers, bits and sizes of a quantized model, and check every hash; status 1 if a value is broken."""
    from hdrq.checkpoint.inspection import contents
    from hdrq.report.tables import contents_table, shown

    found = contents(file)
    if as_json:
        print(json.dumps(found.as_dict(), indent=2))
    else:
        console.print(contents_table(found))
        for name, value in found.facts.items():
            console.print(f"[bold]{shown(name):>14}[/bold]  {shown(value)}", highlight=False, soft_wrap=True)
        for problem in found.problems:
            console.print(shown(problem), style="red", highlight=False, soft_wrap=True)
    raise typer.Exit(1 if found.problems else 0)
