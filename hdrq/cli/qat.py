"""``hdrq qat``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hdrq.cli.terminal import console


def qat(
    config: Annotated[Path, typer.Argument(help="A YAML file of settings: docs/qat.md.")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the runs in out.")] = False,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Any setting: name=value.")] = None,
) -> None:
    """Train models with quantizers on labelled domains, one domain left out in turn."""
    from hdrq.methods.job import parse_settings, read_settings
    from hdrq.qat import job
    from hdrq.report.figures import write_disorder
    from hdrq.report.tables import qat_table

    settings = {**read_settings(config), **parse_settings(set_ or [])}
    run = job.Run.of({**settings, **({"resume": True} if resume else {})})
    results = job.execute(run)
    console.print(qat_table(job.results_of(results), run.training.caption))
    for target, one in results.items():
        if one.history:
            write_disorder(one.history, Path(run.out) / target / "disorder.png")
