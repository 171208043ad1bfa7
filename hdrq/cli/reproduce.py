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
        typer.Argument(
            help="run; landscape, which measures the loss of the same runs; post-merge, experts merged in float and "
            "quantized; or render, from rows alone."
        ),
    ] = "run",
    out: Annotated[Path, typer.Option("--out", "-o", help="A folder for rows, tables and figures.")] = Path(
        "reproduce"
    ),
    task: Annotated[
        str, typer.Option(help="digits, digits-sam, digits-vit, emoji or segmentation; or a YAML file of your own.")
    ] = "digits",
    seeds: Annotated[int, typer.Option(help="How many, each with networks of its own.")] = 5,
    study: Annotated[
        str, typer.Option(help="table, increments, distance, noise, tau or longer; or several, with commas.")
    ] = "table",
    bits: Annotated[
        str | None, typer.Option(help="Like W4A4,W3A3; float for full precision alone; those of the study.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="One seed, W3A3, four methods, their own rates.")] = False,
    rows: Annotated[
        list[Path] | None, typer.Option(help="A CSV to render, of any kind of run; those of --out. Repeatable.")
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(
            help="With render: a CSV of another task, whose networks were trained otherwise; the gains over it."
        ),
    ] = None,
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
    from hdrq.reproduce import between, figures, landscape, post_merges, render
    from hdrq.reproduce.jobs import TABLES, collected, grid, run, shard_of
    from hdrq.reproduce.protocol import QUICK, STUDIES
    from hdrq.reproduce.tasks import task_of

    kinds = {
        "run": (TABLES, render.render),
        "landscape": (landscape.measures(keep), figures.render),
        "post-merge": (post_merges.MERGES, post_merges.render),
    }
    checks.choice("what", what, (*kinds, "render"))
    output_folder(out)
    if keep and what != "landscape":
        raise ValueError(f"keep must go with landscape, got {what}")
    if what != "render":
        task = task_of(task).name
        studies = [STUDIES[checks.choice("study", name, tuple(STUDIES))] for name in study.split(",")]
        widths = None if bits is None else tuple(bits.split(","))
        if widths is not None:
            studies = [replace(each, bits=widths) for each in studies]
        checks.integer("seeds", seeds, 1, 1000)
        checks.integer("jobs", jobs, 1, 1024)
        plan = grid(task, [0], QUICK) if quick else [job for each in studies for job in grid(task, range(seeds), each)]
        options: dict[str, Any] = {"processes": jobs, "shard": shard_of(shard), "choose": not quick}
        networks = cache or out / "networks"
        kind, _ = kinds[what]
        if what == "post-merge":
            own = post_merges.plan(task, range(1 if quick else seeds), widths or post_merges.BITS)
            post_merges.run_all(own, out, networks, **options)
        else:
            run(plan, out, networks, kind=kind, **options)
        write_atomically(out / f"{kind.name}.csv", collected(out, kind))
    if against is not None and (what != "render" or rows is None or len(rows) != 1):
        raise ValueError("against must go with render and one --rows, got others")
    found = rows or [path for kind, _ in kinds.values() if (path := out / f"{kind.name}.csv").is_file()]
    if not found:
        raise FileNotFoundError(f"rows must be a CSV of hdrq reproduce, got none in {out}")
    if against is not None:
        console.print(between.render_between(found[0], against, out), highlight=False, markup=False, soft_wrap=True)
        return
    for path in found:
        header = _header(path)
        draw = next((draw for kind, draw in kinds.values() if header == list(kind.columns)), render.render)
        console.print(draw(path, out), highlight=False, markup=False, soft_wrap=True)


def _header(path: Path) -> list[str]:
    """The columns of a CSV, which say of which kind its rows are."""
    if not path.is_file():
        raise FileNotFoundError(f"rows must be a CSV of hdrq reproduce, got {path}, which is no file")
    with path.open(encoding="utf-8") as file:
        return file.readline().strip().split(",")
