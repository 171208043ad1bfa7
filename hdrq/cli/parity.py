"""``hdrq parity``."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from hdrq.cli.terminal import console, errors


def parity(
    seconds: Annotated[float, typer.Option(help="How long; two rounds of all ops at least.")] = 60.0,
    seed: Annotated[int, typer.Option(help="Of the random cases.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    backends: Annotated[str, typer.Option(help='Such as "cpp,triton" or "cpp/avx2"; all that are here.')] = "",
    families: Annotated[str, typer.Option(help='Such as "noise,merge"; all there are.')] = "",
) -> None:
    """Check that every backend of this machine gives the bits of the NumPy reference; status 1 if one does not."""
    from hdrq.parity.checker import check
    from hdrq.parity.table import parity_table

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=errors, disable=not errors.is_terminal, transient=True) as bars:
        total = bars.add_task("comparing", total=max(seconds, 1e-9))
        report = check(
            seconds,
            seed,
            backends=[name for name in backends.split(",") if name],
            families=[name for name in families.split(",") if name],
            progress=lambda elapsed, op: bars.update(total, completed=elapsed, description=op),
        )
    if as_json:
        print(json.dumps(report.as_dict(), indent=2))
    else:
        console.print(parity_table(report))
        for mismatch in report.mismatches[:1]:
            console.print(escape(str(mismatch)), style="red", highlight=False, soft_wrap=True)
        for name, why in report.missing.items():
            console.print(f"{name} was not compared: {escape(why)}", highlight=False, soft_wrap=True)
    raise typer.Exit(1 if report.mismatches else 0)
