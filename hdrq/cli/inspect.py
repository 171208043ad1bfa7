"""``hdrq inspect``."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hdrq.cli.terminal import console

if TYPE_CHECKING:
    from hdrq.checkpoint.history import Step


def inspect(
    file: Annotated[Path, typer.Argument(help="A quantized model: a file of hdrq, or with --history a folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    only_history: Annotated[
        bool, typer.Option("--history", help="Only what it was made of, from the header alone.")
    ] = False,
) -> None:
    """Print layers, bits and sizes of a quantized model, and check every hash; status 1 if a value is broken."""
    from hdrq.checkpoint.history import history
    from hdrq.checkpoint.inspection import contents
    from hdrq.merging.sources import opened
    from hdrq.report.tables import contents_table, shown

    if only_history:
        with ExitStack() as stack:
            step = history(opened(file, stack).manifest)
        print(json.dumps(asdict(step), indent=2)) if as_json else _print_history(step)
        return
    found = contents(file)
    if as_json:
        print(json.dumps(found.as_dict(), indent=2))
    else:
        console.print(contents_table(found))
        for name, value in found.facts.items():
            console.print(f"[bold]{shown(name):>14}[/bold]  {shown(value)}", highlight=False, soft_wrap=True)
        if found.history.parents:
            _print_history(found.history)
        for problem in found.problems:
            console.print(shown(problem), style="red", highlight=False, soft_wrap=True)
    raise typer.Exit(1 if found.problems else 0)


def _print_history(step: Step) -> None:
    from hdrq.report.tables import shown

    for line in step.lines():
        text = line.lstrip()
        console.print(" " * (len(line) - len(text)) + shown(text), highlight=False, soft_wrap=True)
