"""``hdrq quantize``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hdrq.cli.terminal import console


def quantize(
    config: Annotated[Path | None, typer.Argument(help="A YAML file of settings; options override it.")] = None,
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
) -> None:
    """Quantize a model from unlabelled data.

    With torchrun --nproc-per-node N -m hdrq quantize, N processes share the samples of each step.
    """
    import torch.distributed as dist

    from hdrq.calibrate.report import report_of
    from hdrq.cli.processes import process_group
    from hdrq.methods import job
    from hdrq.methods.reconstruct.memory import keep_freed_memory
    from hdrq.report.figures import write_losses
    from hdrq.report.tables import errors_table

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
    settings = {} if config is None else job.read_settings(config)
    plan = job.Run.of({**settings, **options, **dict(job.parse_setting(text) for text in set_ or [])})
    if save_config is not None:
        job.write_settings(plan, save_config)
        return
    title = f"Accumulated error: {plan.recipe}, {plan.bits}, seed {plan.seed}"
    with keep_freed_memory(), process_group(plan.device) as group:
        if ablate:
            reports = job.ablate(plan, process_group=group)
        else:
            reports = {plan.recipe: report_of(job.execute(plan, process_group=group))}
        speaks = group is None or dist.get_rank(group) == 0
    if not speaks:
        return
    console.print(errors_table(reports, title))
    if ablate:
        return
    (report,) = reports.values()
    console.print(f"quantized: {report.coverage}", highlight=False, soft_wrap=True)
    memory = ", ".join(f"{name} {size / 2**20:,.0f} MiB" for name, size in report.peak_memory.items())
    console.print(f"{report.seconds:.0f} s; peak memory: {memory or 'unknown'}", highlight=False)
    if plan.workdir is not None and report.losses:
        write_losses(report.losses, Path(plan.workdir) / "losses.png")


def _statistics(text: str) -> bool | int:
    if text != "all" and not text.isdigit():
        raise ValueError(f"statistics must be all, or the rank of a sketch, got {text!r}")
    return True if text == "all" else int(text)
