"""``hdrq demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from hdrq.cli.terminal import console, errors


def demo(
    bits: Annotated[str, typer.Option(help="Bits of weights and activations.")] = "W3A3",
    seed: Annotated[int, typer.Option(help="Of batches, noise and draws; the same seed repeats the table.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder for table, figure and merged model.")] = None,
) -> None:
    """Quantize models adapted to three domains of digits, merge their integers, and compare."""
    from hdrq import checks
    from hdrq.checkpoint.files import output_folder
    from hdrq.demo import data
    from hdrq.demo.run import run, save
    from hdrq.quantizers.bits import BitWidths
    from hdrq.report.tables import shown, table

    BitWidths.parse(bits)
    checks.integer("seed", seed, 0, 2**63 - 1)
    if out is not None:
        output_folder(out)

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    with Progress(*columns, TimeRemainingColumn(), console=errors) as bars:
        total = bars.add_task("quantizing", total=len(data.TARGETS))

        def show(domain: str, step) -> None:
            done = data.TARGETS.index(domain) + (step.index + step.iteration / step.iterations) / step.blocks
            text = f"{domain}: block {step.index + 1} of {step.blocks}, loss {step.loss:.3g}"
            bars.update(total, completed=done, description=text)

        result = run(bits, seed, show)
    console.print(table(result.rows, f"Accuracy (%) on three domains, {bits}, seed {seed}"))
    console.print(table(result.pairs, "Two models merged: harmonic mean of the accuracies (%) on their two domains"))
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        save(result, out, bits, seed)
        console.print(f"table and pairs (CSV and JSON), figure.png and merged.safetensors are in {shown(out)}")
