"""``hdrq reproduce``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from hdrq.cli.terminal import console


def reproduce(
    what: Annotated[
        str,
        typer.Argument(help="run; landscape, which measures the loss of the same runs; or render, from rows alone."),
    ] = "run",
    out: Annotated[Path, typer.Option("--out", "-o", help="A folder for rows, tables and figures.")] = Path(
        "reproduce"
    ),
    task: Annotated[str, typer.Option(help="digits, digits-vit or emoji; or a YAML file of your own.")] = "digits",
    seeds: Annotated[int, typer.Option(help="How many, each with networks of its own.")] = 5,
    study: Annotated[
        str, typer.Option(help="table, increments, distance, noise, tau or longer; or several, with commas.")
    ] = "table",
    bits: Annotated[str | None, typer.Option(help="Like W4A4,W3A3; those of the study.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="One seed, W3A3, four methods, their own rates.")] = False,
    rows: Annotated[Path | None, typer.Option(help="The CSV to render; that of --out.")] = None,
    landscape: Annotated[Path | None, typer.Option(help="The CSV of landscape to render; that of --out.")] = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="With landscape: save the quantized models, and read those that are there.")
    ] = False,
    cache: Annotated[Path | None, typer.Option(help="Of networks in full precision; in --out.")] = None,
    jobs: Annotated[int, typer.Option(help="How many processes.")] = 1,
    shard: Annotated[str, typer.Option(help="i/n: every n-th run from the i-th on, for several machines.")] = "0/1",
) -> None:
    """Make this project's version of the paper's tables: runs that go on where they stopped, and intervals."""
    from hdrq import checks
    from hdrq.checkpoint.files import output_folder, write_atomically
    from hdrq.reproduce import figures
    from hdrq.reproduce.jobs import collected, grid, run
    from hdrq.reproduce.landscape import COLUMNS, ROWS, Work
    from hdrq.reproduce.protocol import QUICK, STUDIES
    from hdrq.reproduce.render import render
    from hdrq.reproduce.tasks import task_of

    checks.choice("what", what, ("run", "landscape", "render"))
    output_folder(out)
    if keep and what != "landscape":
        raise ValueError(f"keep must go with landscape, got {what}")
    if what != "render":
        task = task_of(task).name
        studies = [STUDIES[checks.choice("study", name, tuple(STUDIES))] for name in study.split(",")]
        if bits is not None:
            studies = [replace(each, bits=tuple(bits.split(","))) for each in studies]
        checks.integer("seeds", seeds, 1, 1000)
        checks.integer("jobs", jobs, 1, 1024)
        plan = grid(task, [0], QUICK) if quick else [job for each in studies for job in grid(task, range(seeds), each)]
        options: dict[str, Any] = {"processes": jobs, "shard": _shard(shard), "choose": not quick}
        if what == "run":
            run(plan, out, cache or out / "networks", **options)
            write_atomically(out / "rows.csv", collected(out))
        else:
            run(plan, out, cache or out / "networks", work=Work(keep), rows=ROWS, **options)
            write_atomically(out / "landscape.csv", collected(out, ROWS, COLUMNS))
    tables = ((rows, "rows.csv", render), (landscape, "landscape.csv", figures.render))
    found = [(given or out / name, draw) for given, name, draw in tables if given or (out / name).is_file()]
    if not found:
        raise FileNotFoundError(f"rows must be a CSV of hdrq reproduce, got none in {out}")
    for path, draw in found:
        console.print(draw(path, out), highlight=False, markup=False, soft_wrap=True)


def _shard(text: str) -> tuple[int, int]:
    part, _, count = text.partition("/")
    if not (part.isdigit() and count.isdigit() and int(part) < int(count)):
        raise ValueError(f"shard must be i/n with i < n, like 0/4, got {text!r}")
    return int(part), int(count)
