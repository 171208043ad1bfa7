"""``hdrq merge``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from hdrq.cli.add import add_to_file
from hdrq.cli.terminal import console, left_out, numbers, progress_bar, tell_of_blocks

if TYPE_CHECKING:
    from hdrq.merging.assessment import Readiness

OF_DATA = ("samples", "resize", "crop")


def merge(
    context: typer.Context,
    files: Annotated[
        list[Path],
        typer.Argument(help="Two or more quantized models, or a YAML file that lists them; with --add, one."),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The merged model, safetensors; with --sweep, a folder.")
    ] = None,
    weights: Annotated[str | None, typer.Option(help="λ of each model, like 0.5,0.3,0.2; equal ones.")] = None,
    rule: Annotated[
        str | None,
        typer.Option(
            help="systematic (the default), noise, half-even, half-up, half-away, requantize, or calibrated, by what "
            "files keep of their inputs (quantize --statistics); with --add systematic, nearest, noise or calibrated."
        ),
    ] = None,
    preset: Annotated[str | None, typer.Option(help="paper or official: what HDRQ's paper or its code does.")] = None,
    tau: Annotated[float | None, typer.Option(help="How near to a tie the systematic rule draws; 0.1.")] = None,
    draws: Annotated[int | None, typer.Option(help="Roundings that rule noise tries for each layer; 30.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the random numbers; 0.")] = None,
    noise: Annotated[str | None, typer.Option(help="On all, odd or none of the weights; all.")] = None,
    select: Annotated[
        str | None, typer.Option(help="Among draws: min-cosine, mean-cosine, first or official; min-cosine.")
    ] = None,
    mode: Annotated[str | None, typer.Option(help="Draws: exact, or fast for up to four models; exact.")] = None,
    bits: Annotated[str | None, typer.Option(help="Of the result, like W4A8, where models differ in theirs.")] = None,
    extrapolate: Annotated[
        bool, typer.Option("--extrapolate", help="Allow negative weights: 1,m,-m is A + m·(B - C).")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    sweep: Annotated[
        str | None, typer.Option(help="λ of the first of two models, like 0.25,0.5,0.75: a file for each, in --out.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say whether it will work; status 1 if not.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Merge models that the dry run would call not ready.")] = False,
    report: Annotated[
        Path | None, typer.Option(help="A folder for readiness.json and readiness.png; with --add, for added.json.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print as JSON how ready the models are; with --add, what is kept.")
    ] = False,
    add: Annotated[
        list[Path] | None, typer.Option(help="A LoRA adapter, or weights; its change goes into one model. Repeatable.")
    ] = None,
    minus: Annotated[
        list[str] | None,
        typer.Option(help="The weights that --add counts from; - for an adapter. Once for each --add."),
    ] = None,
    scale: Annotated[list[float] | None, typer.Option(help="A factor on a change; 1. Once for each --add.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Of adapters without adapter_config.json.")] = None,
    model: Annotated[
        str | None, typer.Option(help="With --add or --calibrate, the architecture: module:factory.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="With --add and --model: images, .npy or .safetensors, for rule calibrated.")
    ] = None,
    calibrate: Annotated[
        list[Path] | None,
        typer.Option(help="Images, .npy or .safetensors of a model's task: round for its inputs. Once for each model."),
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="Calibrated merges: the models' outputs (experts), or their mean weights (mean).")
    ] = None,
    lam: Annotated[float | None, typer.Option(help="Calibrated merges: the pull towards the mean weights.")] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="With --calibrate: closed-form (the default), or hdrq, qdrop or brecq, whose blocks learn towards the "
            "models' own."
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="With --calibrate, any other option of the method: name=value, iterations=400."),
    ] = None,
    offload_folder: Annotated[
        Path | None,
        typer.Option(
            help="With --calibrate, on a disk: weights lie there and take no memory but while they are learned."
        ),
    ] = None,
    workdir: Annotated[Path | None, typer.Option(help="With --calibrate: checkpoints, losses and their plot.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="With --calibrate: go on with the run in workdir.")] = False,
    samples: Annotated[int, typer.Option(help="How many samples of the data are read.")] = 256,
    resize: Annotated[
        int | None, typer.Option(help="The shorter side of an image, pixels; as the files were calibrated, or 256.")
    ] = None,
    crop: Annotated[int | None, typer.Option(help="The sides of its middle, pixels; likewise, or 224.")] = None,
) -> None:
    """Merge quantized models on their integers, or add changes to one: no originals, no data, no training."""
    from hdrq.checkpoint.files import output_folder
    from hdrq.merging.files import merge_files, readiness

    if (out is None) != dry_run:
        raise ValueError("out must be given, or --dry-run, and not both")
    if report is not None:
        output_folder(report, "report")
    if dry_run:
        left_out(context, "with --dry-run, which merges nothing", "force")
    chosen: dict[str, Any] = {
        "seed": seed,
        "rule": rule,
        "preset": preset,
        "tau": tau,
        "draws": draws,
        "noise": noise,
        "select": select,
        "mode": mode,
        "bits": bits,
        "weights": numbers("weights", weights),
        "extrapolate": extrapolate or None,
        "device": None if device == "cpu" else device,
    }
    options: dict[str, Any] = {name: value for name, value in chosen.items() if value is not None}
    if len(files) == 1 and files[0].suffix in (".yaml", ".yml"):
        if sweep is not None:
            raise ValueError(f"sweep must be of two files, got the recipe {files[0]}, which has weights of its own")
        files, options = _of_recipe(files[0], options)
    inputs = {"samples": samples, "resize": resize, "crop": crop}
    guided = {"target": target, "lam": lam}
    run: dict[str, Any] = {"method": method, "set": set_, "offload_folder": offload_folder}
    run |= {"workdir": workdir, "resume": resume or None}
    if add:
        settings = {"minus": minus, "scale": scale, "alpha": alpha, "model": model, "data": data, **inputs}
        settings |= _taken(options, "seed", "rule")
        _none_given({**options, "calibrate": calibrate, **guided, **run, "sweep": sweep}, "with --add")
        left_out(context, "with --add", "force")
        if data is None:
            left_out(context, "with --add and without --data", *OF_DATA)
        add_to_file(files, add, out, settings, report, as_json)
        return
    _none_given({"minus": minus, "scale": scale, "alpha": alpha, "data": data}, "without --add")
    if calibrate or options.get("rule") == "calibrated":
        settings = _taken(options, "seed", "weights", "bits")
        settings |= {name: value for name, value in guided.items() if value is not None}
        unused = {**options, "report": report, "dry_run": dry_run or None, "json": as_json or None, "sweep": sweep}
        if not calibrate:
            del unused["rule"]
            unused |= {"model": model, **run}
        # Without out there is --dry-run, refused here.
        _none_given(unused, "in a calibrated merge" if calibrate else "in a calibrated merge without --calibrate")
        if not calibrate:
            left_out(context, "in a calibrated merge without --calibrate", *OF_DATA)
            merge_by_statistics(files, cast(Path, out), settings)
            return
        if model is None:
            raise ValueError("model must be given with --calibrate: layers must be run, got none")
        settings |= {name: value for name, value in run.items() if value is not None}
        merge_calibrated(files, calibrate, cast(Path, out), settings | {"model": model, **inputs})
        return
    _none_given({**guided, **run, "model": model}, "without --calibrate")
    left_out(context, "without --calibrate and --add", *OF_DATA)
    unready = "warn" if force else "refuse"
    if sweep is not None:
        _none_given({"weights": options.get("weights"), "report": report, "json": as_json or None}, "with --sweep")
        merge_swept(files, out, sweep, {**options, "unready": unready})
        return
    with progress_bar("merging") as show:
        if out is None:
            found: Readiness | None = readiness(files, progress=show, **options)
        else:
            wanted = report is not None or as_json
            found = merge_files(files, out, report=wanted, unready=unready, progress=show, **options)
    if found is not None:
        _tell(found, report, as_json)
        if dry_run and found.verdict.startswith("not ready"):
            raise typer.Exit(1)


def merge_swept(files: list[Path], out: Path | None, values: str, options: dict[str, Any]) -> None:
    """``hdrq merge --sweep``: a file for each λ, whose names are printed."""
    from hdrq.methods.merge_recipe import sweep

    if out is None:
        raise ValueError("out must be a folder with --sweep, got --dry-run")
    with progress_bar("merging") as show:
        for file in sweep(files, out, cast(tuple[float, ...], numbers("sweep", values)), progress=show, **options):
            print(file)


def merge_calibrated(files: list[Path], data: list[Path], out: Path, settings: dict[str, Any]) -> None:
    """``hdrq merge --calibrate``; the texts of ``--set`` are among the settings."""
    from hdrq.calibrate.report import report_of
    from hdrq.methods.calibrated_merge import merge_calibrated_files
    from hdrq.methods.job import options_of
    from hdrq.methods.layerwise import Guidance
    from hdrq.methods.reconstruct.memory import keep_freed_memory
    from hdrq.recipes import Recipe

    settings |= options_of(settings.pop("set", []), Guidance, Recipe)
    with keep_freed_memory():
        report = report_of(merge_calibrated_files(files, data, out, **settings))
    tell_of_blocks(report, settings.get("workdir"))


def merge_by_statistics(files: list[Path], out: Path, settings: dict[str, Any]) -> None:
    """``hdrq merge --rule calibrated``: files have statistics in the place of data."""
    from hdrq.methods.statistics_merge import merge_files_by_statistics

    with progress_bar("merging") as show:
        tell_of_blocks(merge_files_by_statistics(files, out, progress=show, **settings), None)


def _of_recipe(path: Path, options: dict[str, Any]) -> tuple[list[Path], dict[str, Any]]:
    """The files of a recipe, and its options, over which those of the command line win.

    A preset or a rule of the command line is in the place of all that the recipe says of its rule.
    """
    from hdrq.methods.merge_recipe import read_recipe

    recipe = read_recipe(path)
    own = dict(recipe.options)
    if options.keys() & {"preset", "rule"}:
        own = _taken(own, "weights", "seed", "bits", "extrapolate")
    return [Path(file) for file in recipe.files], {**own, **options}


def _tell(found: Readiness, folder: Path | None, as_json: bool) -> None:
    """Write and print how ready models are."""
    from hdrq.checkpoint.files import write_atomically
    from hdrq.checks import plain
    from hdrq.report.figures import plot_readiness
    from hdrq.report.tables import readiness_table

    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "readiness.json", json.dumps(found.as_dict(), indent=2) + "\n")
        plot_readiness(found, folder / "readiness.png")
    if as_json:
        print(json.dumps(found.as_dict(), indent=2))
        return
    console.print(readiness_table(found))
    console.print(plain(found.verdict), highlight=False, markup=False, soft_wrap=True)


def _taken(options: dict[str, Any], *names: str) -> dict[str, Any]:
    """Some of the options, which are taken out."""
    return {name: options.pop(name) for name in names if name in options}


def _none_given(options: dict[str, Any], when: str) -> None:
    given = [name for name, value in options.items() if value not in (None, [])]
    if given:
        raise ValueError(f"{given[0]} must be left out {when}, got {options[given[0]]}")
