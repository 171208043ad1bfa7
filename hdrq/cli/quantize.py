"""``hdrq quantize``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hdrq.checks import listed
from hdrq.cli.terminal import console, left_out

if TYPE_CHECKING:
    from hdrq.calibrate.report import RunReport
    from hdrq.methods.job import Run


def quantize(
    context: typer.Context,
    config: Annotated[
        list[Path] | None,
        typer.Argument(help="A YAML file of settings, which options override; several for a model each."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="The architecture: module:factory.")] = None,
    weights: Annotated[Path | None, typer.Option(help="Its state, safetensors.")] = None,
    source: Annotated[Path | None, typer.Option(help="The state before its adaptation.")] = None,
    data: Annotated[Path | None, typer.Option(help="A folder of images, a .npy or a .safetensors file.")] = None,
    recipe: Annotated[str | None, typer.Option(help="rtn, gptq, awq, brecq, qdrop or hdrq.")] = None,
    preset: Annotated[str | None, typer.Option(help="paper or official.")] = None,
    bits: Annotated[str | None, typer.Option(help="Bits of weights and activations, like W4A4.")] = None,
    iterations: Annotated[int | None, typer.Option(help="Steps for each block.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of batches, noise and drops.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.")] = None,
    out: Annotated[Path | None, typer.Option(help="The quantized model, safetensors.")] = None,
    offload_folder: Annotated[
        Path | None, typer.Option(help="On a disk: weights lie there and take no memory but while they are learned.")
    ] = None,
    workdir: Annotated[Path | None, typer.Option(help="Checkpoints, losses and their plot.")] = None,
    resume: Annotated[bool | None, typer.Option("--resume", help="Go on with the run in workdir.")] = None,
    statistics: Annotated[
        str | None,
        typer.Option(help="Keep what layers read, for merges without data (--rule calibrated): all, or a rank."),
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Any other setting: name=value.")] = None,
    save_config: Annotated[
        Path | None, typer.Option(help="Write every setting to this YAML file, for another run, and do nothing else.")
    ] = None,
    ablate: Annotated[
        bool, typer.Option("--ablate", help="Also without distance, and without noise: a table.")
    ] = False,
    jobs: Annotated[int, typer.Option(help="How many of several models at once, each in a process.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, a record for each model.")] = False,
) -> None:
    """Quantize a model from unlabelled data; with several YAML files, a model each.

    With torchrun --nproc-per-node N -m hdrq quantize, N processes share the samples of each step.
    """
    from hdrq import checks
    from hdrq.methods import job

    given = {
        "model": model,
        "weights": weights,
        "source": source,
        "data": data,
        "recipe": recipe,
        "preset": preset,
        "bits": bits,
        "iterations": iterations,
        "seed": seed,
        "device": device,
        "out": out,
        "offload_folder": offload_folder,
        "workdir": workdir,
        "resume": resume,
        "statistics": None if statistics is None else _statistics(statistics),
    }
    options = {name: str(v) if isinstance(v, Path) else v for name, v in given.items() if v is not None}
    more = job.parse_settings(set_ or [])
    left_out(context, "where --set gives it", *(options.keys() & more.keys()))
    options |= more
    checks.integer("jobs", jobs, 1, 1024)
    if ablate and as_json:
        raise ValueError("json must be left out with --ablate, which prints a table, got both")
    if config is not None and len(config) > 1:
        alone = {"--save-config": save_config is not None, "--ablate": ablate}
        _several(config, options, jobs, as_json, [name for name, given in alone.items() if given])
        return
    if not config:
        left_out(context, "for one model, which has one process; give a YAML file for each of several", "jobs")
    plan = job.Run.of({**(job.read_settings(config[0]) if config else {}), **options})
    if save_config is not None:
        left_out(context, "with --save-config, which quantizes nothing", "ablate", "as_json", "resume")
        job.write_settings(plan, save_config)
        return
    _one(str(config[0]) if config else plan.model, plan, ablate, as_json)


def _one(name: str, plan: Run, ablate: bool, as_json: bool) -> None:
    import torch.distributed as dist

    from hdrq.calibrate.report import report_of
    from hdrq.cli.processes import process_group
    from hdrq.methods import job
    from hdrq.methods.reconstruct.memory import keep_freed_memory
    from hdrq.report.tables import errors_table, run_record

    title = f"Accumulated error: {plan.recipe}, {plan.bits}, seed {plan.seed}"
    with keep_freed_memory(), process_group(plan.device) as group:
        if ablate:
            reports = job.ablate(plan, process_group=group)
        else:
            reports = {plan.recipe: report_of(job.execute(plan, process_group=group))}
        speaks = group is None or dist.get_rank(group) == 0
    if not speaks:
        return
    if ablate:
        console.print(errors_table(reports, title))
        return
    (report,) = reports.values()
    if as_json:
        print(json.dumps([run_record(name, plan, report)], indent=2))
    else:
        console.print(errors_table(reports, title))
        console.print(f"quantized: {report.coverage}", highlight=False, soft_wrap=True)
        memory = ", ".join(f"{name} {size / 2**20:,.0f} MiB" for name, size in report.peak_memory.items())
        console.print(f"{report.seconds:.0f} s; peak memory: {memory or 'unknown'}", highlight=False)
    _draw_losses(plan, report)


def _several(configs: list[Path], options: dict[str, Any], jobs: int, as_json: bool, alone: list[str]) -> None:
    """Quantize a model for each file of settings.

    Args:
        alone: options that were given, and that one model alone can have.
    """
    import torch.distributed as dist

    from hdrq.cli.jobs import Failure, carry_out, check
    from hdrq.report.tables import run_record, runs_table

    alone += ["torchrun"] if dist.is_available() and dist.is_torchelastic_launched() else []
    if alone:
        raise ValueError(f"config must be one file with {listed(alone)}, got {len(configs)}")
    runs = {str(path): _run_of(path, options) for path in configs}
    if len(runs) < len(configs):
        raise ValueError(f"config must be another file for each model, got {listed(map(str, configs))}")
    check(runs)
    reports, failures = {}, {}
    for name, found in carry_out(runs, jobs):
        if isinstance(found, Failure):
            sys.stderr.write(f"hdrq: {name}: {found.message}\n")
            failures[name] = found
        else:
            reports[name] = found
    records = [
        run_record(name, run, reports.get(name), failures[name].message if name in failures else None)
        for name, run in runs.items()
    ]
    print(json.dumps(records, indent=2)) if as_json else console.print(runs_table(records))
    for name, report in reports.items():
        _draw_losses(runs[name], report)
    raise typer.Exit(max((found.status for found in failures.values()), default=0))


def _run_of(path: Path, options: dict[str, Any]) -> Run:
    """The settings of one of several files, whose name errors begin with."""
    from hdrq.methods import job

    settings = job.read_settings(path)
    try:
        return job.Run.of({**settings, **options})
    except (TypeError, ValueError) as error:
        raise type(error)(f"{path}: {error}") from error


def _draw_losses(plan: Run, report: RunReport) -> None:
    from hdrq.report.figures import write_losses

    if plan.workdir is not None and report.losses:
        write_losses(report.losses, Path(plan.workdir) / "losses.png")


def _statistics(text: str) -> bool | int:
    if text != "all" and not text.isdigit():
        raise ValueError(f"statistics must be all, or the rank of a sketch, got {text!r}")
    return True if text == "all" else int(text)
