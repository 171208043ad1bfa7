"""``hdrq demo``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from hdrq.cli.terminal import console, errors


def demo(
    bits: Annotated[str, typer.Option(help="Bits of weights and activations.")] = "W3A3",
    seed: Annotated[int, typer.Option(help="Of batches, noise and draws; the same seed repeats the table.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder for table, figure and merged model.")] = None,
) -> None:
    """Quantize models adapted to three domains of digits, merge their integers, and compare."""
    from hdrq import checks
    from hdrq.quantizers.bits import BitWidths

    try:
        BitWidths.parse(bits)
        checks.integer("seed", seed, 0, 2**63 - 1)
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            if not os.access(out, os.W_OK):
                raise PermissionError(f"out must be a folder that can be written to, got {out}")
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from error

    try:
        from hdrq.demo import data
        from hdrq.demo.run import run, save
        from hdrq.report.tables import table
    except ImportError as error:
        sys.exit(f'hdrq: the demo needs {error.name}; pip install "hdrq[demo]"')

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    with Progress(*columns, TimeRemainingColumn(), console=errors) as bars:
        total = bars.add_task("quantizing", total=len(data.TARGETS))

        def show(domain: str, step) -> None:
            done = data.TARGETS.index(domain) + (step.index + step.iteration / step.iterations) / step.blocks
            text = f"{domain}: block {step.index + 1} of {step.blocks}, loss {step.loss:.3g}"
            bars.update(total, completed=done, description=text)

        result = run(bits, seed, show)
    console.print(table(result.rows, f"Accuracy (%) on three domains, {bits}, seed {seed}"))
    if out is not None:
        save(result, out, bits, seed)
        console.print(f"table.csv, table.json, figure.png and merged.safetensors are in {escape(str(out))}")
