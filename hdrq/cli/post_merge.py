"""``hdrq post-merge``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hdrq.cli.terminal import console, left_out, tell_of_blocks


def post_merge(
    context: typer.Context,
    files: Annotated[list[Path], typer.Argument(help="The experts' states in full precision.")],
    model: Annotated[str, typer.Option(help="Their architecture: module:factory.")],
    data: Annotated[list[Path], typer.Option(help="Images, .npy or .safetensors of an expert's task. Once for each.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The quantized model, safetensors.")],
    base: Annotated[Path | None, typer.Option(help="The state that the experts were trained from.")] = None,
    merge: Annotated[str, typer.Option(help="average, task-arithmetic or ties.")] = "average",
    method: Annotated[str, typer.Option(help="epmq, gptq, awq or rtn; or blocks of hdrq, qdrop or brecq.")] = "epmq",
    bits: Annotated[str, typer.Option(help="Bits of weights and activations.")] = "W4A16",
    group_size: Annotated[
        int, typer.Option(help="Inputs of a linear layer that share a scale; 0: each channel.")
    ] = 128,
    lam: Annotated[float | None, typer.Option(help="Pull towards the merge, relative; 0.01 for epmq.")] = None,
    weighting: Annotated[str, typer.Option(help="Of tasks: count or norm.")] = "count",
    stream: Annotated[str | None, typer.Option(help="Inputs of the merged model or of the experts; merged.")] = None,
    bias: Annotated[str | None, typer.Option(help="solve, or keep the merge's; solve for epmq.")] = None,
    scale: Annotated[float | None, typer.Option(help="Of the task vectors; 0.3, with ties 1.")] = None,
    keep: Annotated[float | None, typer.Option(help="TIES: the share of each task vector that is kept; 0.2.")] = None,
    aggregate: Annotated[str | None, typer.Option(help="TIES: mean or sum; mean.")] = None,
    trim: Annotated[str | None, typer.Option(help="TIES: of the whole vector, or of each tensor; whole.")] = None,
    samples: Annotated[int, typer.Option(help="How many samples of each task are read.")] = 256,
    resize: Annotated[int, typer.Option(help="The shorter side of an image, pixels.")] = 256,
    crop: Annotated[int, typer.Option(help="The sides of its middle, pixels.")] = 224,
    seed: Annotated[int, typer.Option(help="Of batches, noise, and the elements that ranges are searched on.")] = 0,
    offload_folder: Annotated[
        Path | None, typer.Option(help="On a disk: weights lie there and take no memory but while they are learned.")
    ] = None,
    workdir: Annotated[Path | None, typer.Option(help="Checkpoints, losses and their plot.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in workdir.")] = False,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Any field of the recipe: name=value.")] = None,
) -> None:
    """Merge experts in full precision and quantize the merge, guided by the experts on a few samples of each."""
    from hdrq.calibrate.report import report_of
    from hdrq.methods.job import options_of, post_merge_files
    from hdrq.methods.reconstruct.memory import keep_freed_memory
    from hdrq.recipes import Recipe

    options: dict[str, Any] = {
        "base": base,
        "merge": merge,
        "method": method,
        "bits": bits,
        "group_size": group_size or None,
        "lam": lam,
        "weighting": weighting,
        "stream": stream,
        "bias": bias,
        "merge_options": {"scale": scale, "keep": keep, "aggregate": aggregate, "trim": trim},
        "samples": samples,
        "resize": resize,
        "crop": crop,
        "seed": seed,
        "offload_folder": offload_folder,
        "workdir": workdir,
        "resume": resume,
    }
    more = options_of(set_ or [], Recipe)
    left_out(context, "where --set gives it", *(options.keys() & more.keys()))
    options |= more
    with keep_freed_memory():
        report = report_of(post_merge_files(files, data, out, model=model, **options))
    tell_of_blocks(report, workdir)
    console.print(f"quantized: {report.coverage}", highlight=False, soft_wrap=True)
