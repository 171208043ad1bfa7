"""The command line. It parses, shows progress and prints; the work is done elsewhere."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

if TYPE_CHECKING:
    from hdrq.readiness import Readiness

try:
    import typer
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
except ImportError as error:
    sys.exit(f'hdrq: the command line needs {error.name}; pip install "hdrq[cli]"')

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
console, errors = Console(), Console(stderr=True)


def _numbers(name: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"{name} must be numbers between commas, got {text!r}") from error


def _refuse(error: Exception) -> NoReturn:
    """One line on stderr, status 2: the input was bad."""
    print(f"hdrq: {error}", file=sys.stderr)
    raise typer.Exit(2)


@app.callback()
def hdrq() -> None:
    """Quantizers for reconstruction loops, and a merge of quantized models that works on their integers."""


@app.command()
def info() -> None:
    """Print versions, backends (and why one is missing), processor, threads and GPU."""
    from hdrq.info import facts

    for name, value in facts().items():
        console.print(f"[bold]{name:>20}[/bold]  {escape(value)}", highlight=False, soft_wrap=True)


@app.command()
def quantize(
    config: Annotated[Path | None, typer.Argument(help="A YAML file of settings; options override it.")] = None,
    model: Annotated[str | None, typer.Option(help="The architecture: module:factory.")] = None,
    weights: Annotated[Path | None, typer.Option(help="Its state, safetensors.")] = None,
    source: Annotated[Path | None, typer.Option(help="The state before its adaptation.")] = None,
    data: Annotated[Path | None, typer.Option(help="A folder of images, a .npy or a .safetensors file.")] = None,
    recipe: Annotated[str | None, typer.Option(help="rtn, brecq, qdrop or hdrq.")] = None,
    preset: Annotated[str | None, typer.Option(help="paper or official.")] = None,
    bits: Annotated[str | None, typer.Option(help="Bits of weights and activations, like W4A4.")] = None,
    iterations: Annotated[int | None, typer.Option(help="Steps for each block.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of batches, noise and drops.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.")] = None,
    out: Annotated[Path | None, typer.Option(help="The quantized model, safetensors.")] = None,
    workdir: Annotated[Path | None, typer.Option(help="Checkpoints, losses and their plot.")] = None,
    resume: Annotated[bool | None, typer.Option("--resume", help="Go on with the run in workdir.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Any other setting: name=value.")] = None,
    ablate: Annotated[
        bool, typer.Option("--ablate", help="Also without distance, and without noise: a table.")
    ] = False,
) -> None:
    """Quantize a model from unlabelled data."""
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
        "workdir": workdir,
        "resume": resume,
    }
    options = {name: str(v) if isinstance(v, Path) else v for name, v in given.items() if v is not None}
    try:
        from hdrq import run
        from hdrq.report import errors_table, report_of, write_losses

        settings = {} if config is None else run.read_settings(config)
        plan = run.Run.of({**settings, **options, **dict(run.parse_setting(text) for text in set_ or [])})
        title = f"Accumulated error: {plan.recipe}, {plan.bits}, seed {plan.seed}"
        if ablate:
            console.print(errors_table(run.ablate(plan), title))
            return
        report = report_of(run.execute(plan))
    except ImportError as error:
        sys.exit(f'hdrq: quantize needs {error.name}; pip install "hdrq[cli]"')
    except (ValueError, TypeError, OSError) as error:
        _refuse(error)
    except FloatingPointError as error:
        sys.exit(f"hdrq: {error}")
    console.print(errors_table({plan.recipe: report}, title))
    memory = ", ".join(f"{name} {size / 2**20:,.0f} MiB" for name, size in report.peak_memory.items())
    console.print(f"{report.seconds:.0f} s; peak memory: {memory}", highlight=False)
    if plan.workdir is not None and report.losses:
        write_losses(report.losses, Path(plan.workdir) / "losses.png")


@app.command()
def merge(
    files: Annotated[list[Path], typer.Argument(help="Two or more quantized models.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The merged model, safetensors.")] = None,
    weights: Annotated[str | None, typer.Option(help="λ of each model, like 0.5,0.3,0.2; equal ones.")] = None,
    draws: Annotated[int, typer.Option(help="Roundings tried for each layer.")] = 30,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    noise: Annotated[str, typer.Option(help="On all, odd or none of the weights.")] = "all",
    select: Annotated[str, typer.Option(help="min-cosine, mean-cosine, first or official.")] = "min-cosine",
    mode: Annotated[str, typer.Option(help="exact, or fast for up to four models.")] = "exact",
    rule: Annotated[str, typer.Option(help="noise; or half-even, half-up, half-away, requantize.")] = "noise",
    extrapolate: Annotated[bool, typer.Option("--extrapolate", help="Allow negative weights.")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say whether it will work; status 1 if not.")] = False,
    report: Annotated[Path | None, typer.Option(help="A folder for readiness.json and readiness.png.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print how ready the models are as JSON.")] = False,
) -> None:
    """Merge quantized models on their integers: no originals, no data, no training."""
    from hdrq import merging
    from hdrq.report import plot_readiness, readiness_table

    if (out is None) != dry_run:
        _refuse(ValueError("out must be given, or --dry-run, and not both"))
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
    )
    with Progress(*columns, console=errors, disable=not errors.is_terminal, transient=True) as bars:
        task = bars.add_task("merging", total=1)
        options: dict[str, Any] = {"draws": draws, "seed": seed, "noise": noise, "select": select, "mode": mode}
        options |= {"rule": rule, "extrapolate": extrapolate, "device": device}
        options["progress"] = lambda done, total, name: bars.update(task, completed=done, total=total, description=name)
        try:
            options["weights"] = None if weights is None else _numbers("weights", weights)
            if report is not None:
                report.mkdir(parents=True, exist_ok=True)
            if out is None:
                found: Readiness | None = merging.readiness(files, **options)
            else:
                found = merging.merge_files(files, out, report=report is not None or as_json, **options)
        except (ValueError, TypeError, OSError) as error:
            _refuse(error)
    if found is None:
        return
    if report is not None:
        (report / "readiness.json").write_text(json.dumps(found.as_dict(), indent=2) + "\n")
        plot_readiness(found, report / "readiness.png")
    if as_json:
        print(json.dumps(found.as_dict(), indent=2))
    else:
        console.print(readiness_table(found))
        console.print(found.verdict, highlight=False, markup=False, soft_wrap=True)
    if dry_run and found.verdict.startswith("not ready"):
        raise typer.Exit(1)


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="A quantized model.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print layers, bits and sizes of a quantized model, and check every hash."""
    from hdrq.inspection import contents, contents_table

    try:
        found = contents(file)
    except (ValueError, OSError) as error:
        _refuse(error)
    if as_json:
        print(json.dumps(found.as_dict(), indent=2))
        return
    console.print(contents_table(found))
    for name, value in found.facts.items():
        console.print(
            f"[bold]{name:>14}[/bold]  {escape(str(value).encode(errors='replace').decode())}",
            highlight=False,
            soft_wrap=True,
        )


@app.command()
def evaluate(
    files: Annotated[list[Path], typer.Argument(help="Quantized models, or states in full precision; safetensors.")],
    model: Annotated[str, typer.Option(help="The architecture: module:factory.")],
    data: Annotated[list[Path], typer.Option(help="A folder with a folder of images for each class; give it again.")],
    resize: Annotated[int, typer.Option(help="The shorter side of an image, pixels.")] = 256,
    crop: Annotated[int, typer.Option(help="The sides of its middle, pixels.")] = 224,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    batch_size: Annotated[int, typer.Option(help="Images at a time.")] = 100,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print the accuracy of models on folders of labelled images, and the harmonic mean over the folders."""
    from hdrq import run
    from hdrq.report import records, table

    try:
        rows = run.evaluate(files, data, model, device=device, batch_size=batch_size, resize=resize, crop=crop)
    except (ValueError, TypeError, OSError) as error:
        _refuse(error)
    print(json.dumps(records(rows), indent=2)) if as_json else console.print(table(rows, "Accuracy (%)"))


@app.command()
def demo(
    bits: Annotated[str, typer.Option(help="Bits of weights and activations.")] = "W3A3",
    seed: Annotated[int, typer.Option(help="Of batches, noise and draws; the same seed repeats the table.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder for table, figure and merged model.")] = None,
) -> None:
    """Quantize models adapted to three domains of digits, merge their integers, and compare."""
    from hdrq import checks
    from hdrq.model import Bits

    try:
        Bits.parse(bits)
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
        from hdrq.report import table
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


@app.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
def bench(arguments: Annotated[list[str] | None, typer.Argument(metavar="[FAMILY]... [OPTIONS]")] = None) -> None:
    """Verify the ops on this machine, then time them beside a copy, the eager formula and torch.compile."""
    from hdrq.benchmarks.__main__ import main

    raise typer.Exit(main(arguments or [], prog="hdrq bench"))


@app.command()
def parity(
    seconds: Annotated[float, typer.Option(help="How long; two rounds of all ops at least.")] = 60.0,
    seed: Annotated[int, typer.Option(help="Of the random cases.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    backends: Annotated[str, typer.Option(help='Such as "cpp,triton" or "cpp/avx2"; all that are here.')] = "",
    families: Annotated[str, typer.Option(help='Such as "noise,merge"; all there are.')] = "",
) -> None:
    """Check that every backend of this machine gives the bits of the NumPy reference; status 1 if one does not."""
    from hdrq.parity import check
    from hdrq.report import parity_table

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=errors, disable=not errors.is_terminal, transient=True) as bars:
        total = bars.add_task("comparing", total=max(seconds, 1e-9))
        try:
            report = check(
                seconds,
                seed,
                backends=[name for name in backends.split(",") if name],
                families=[name for name in families.split(",") if name],
                progress=lambda elapsed, op: bars.update(total, completed=elapsed, description=op),
            )
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
    if as_json:
        print(json.dumps(report.as_dict(), indent=2))
    else:
        console.print(parity_table(report))
        for mismatch in report.mismatches[:1]:
            console.print(escape(str(mismatch)), style="red", highlight=False, soft_wrap=True)
        for name, why in report.missing.items():
            console.print(f"{name} was not compared: {escape(why)}", highlight=False, soft_wrap=True)
    raise typer.Exit(1 if report.mismatches else 0)


if __name__ == "__main__":
    app()
