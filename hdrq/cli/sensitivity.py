"""``hdrq sensitivity``."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from hdrq.cli.terminal import console, left_out, progress_bar


def sensitivity(
    context: typer.Context,
    config: Annotated[
        Path | None, typer.Argument(help="A YAML file of settings of hdrq quantize; options override it.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="The architecture: module:factory.")] = None,
    weights: Annotated[Path | None, typer.Option(help="Its state, safetensors.")] = None,
    data: Annotated[Path | None, typer.Option(help="A folder of images, a .npy or a .safetensors file.")] = None,
    recipe: Annotated[str | None, typer.Option(help="Whose scales are searched, as hdrq recipes lists them.")] = None,
    bits: Annotated[
        str | None, typer.Option(help="The budget: auto:4.5, bits of a weight in the mean, or auto:W4.5A4.")
    ] = None,
    cost: Annotated[
        str, typer.Option(help="weights: a mean over weights, for a size; macs: over multiply-adds.")
    ] = "weights",
    samples: Annotated[int, typer.Option(help="Of the data, that errors are measured on.")] = 128,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Any other setting: name=value.")] = None,
    save_config: Annotated[
        Path | None, typer.Option(help="Write the settings with the bits found to this file, for hdrq quantize.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with relative squared errors.")] = False,
) -> None:
    """Measure what the bits of each layer do to the output, and choose them under a budget.

    Models that are to be merged need the same bits: find them once, and quantize each with the file of --save-config.
    """
    from hdrq import checks
    from hdrq.checkpoint.files import output_path
    from hdrq.methods import job
    from hdrq.methods.sensitivity import COSTS, solver

    given = {"model": model, "weights": weights, "data": data, "recipe": recipe, "bits": bits}
    options = {name: str(value) for name, value in given.items() if value is not None}
    more = job.parse_settings(set_ or [])
    left_out(context, "where --set gives it", *(options.keys() & more.keys()))
    settings = {"bits": "auto:4"} if config is None else job.read_settings(config)
    run = job.Run.of({**settings, **options, **more})
    checks.choice("cost", cost, COSTS)
    if save_config is not None:
        output_path(save_config, "save_config")
    solver()  # missing, it is told before anything is measured
    with progress_bar("layers") as show:
        found = job.measure_sensitivity(run, samples, show)
    widths = found.assign(cost=cost)
    error = found.error(widths)
    chosen = {"bits": found.bits(widths), "mean": found.mean_bits(widths, cost), "error": error}
    if save_config is not None:
        job.write_settings(replace(run, bits=found.bits(widths)), save_config)
    if as_json:
        print(json.dumps({"layers": [asdict(layer) for layer in found.layers], **chosen}, indent=2))
        return
    from hdrq.report.tables import decibels, sensitivity_table

    console.print(sensitivity_table(found, widths, "Signal to noise of the output (dB) with one weight rounded"))
    what = "a weight" if cost == "weights" else "a multiply-add"
    text = f"{chosen['mean']:.2f} bits of {what} in the mean; with all of them rounded, {decibels(error)} dB"
    console.print(text, highlight=False)
