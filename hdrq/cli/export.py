"""``hdrq export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hdrq.cli.terminal import console, left_out

KINDS = {".onnx": "onnx", ".pt2": "pt2"}
# What is read for a kind of file alone.
OF_GRAPHS = ("data", "runtime", "allow_float", "opset", "samples", "resize", "crop", "check")
UNUSED = {"onnx": ("activations",), "pt2": ("activations", "opset"), "compressed-tensors": OF_GRAPHS}


def export(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="A quantized model.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file, or folder, to write.")],
    model: Annotated[str | None, typer.Option(help="The architecture: module:factory.")] = None,
    data: Annotated[Path | None, typer.Option(help="A folder of images, a .npy or a .safetensors file.")] = None,
    like: Annotated[Path | None, typer.Option(help="What it was imported from, in whose form it is written.")] = None,
    to: Annotated[
        str | None, typer.Option(help="onnx, pt2 or compressed-tensors; by default what the file's name ends in.")
    ] = None,
    runtime: Annotated[
        str | None, typer.Option(help="openvino, onnxruntime, tensorrt or standard; of pt2 inductor.")
    ] = None,
    activations: Annotated[
        str, typer.Option(help="Of compressed-tensors: static, their scales are written, or drop.")
    ] = "static",
    allow_float: Annotated[bool, typer.Option("--allow-float", help="Let it compute in float what it must.")] = False,
    opset: Annotated[int, typer.Option(help="Of ONNX, 21 to 25.")] = 21,
    samples: Annotated[int, typer.Option(help="How many samples of the data are read.")] = 64,
    resize: Annotated[
        int | None, typer.Option(help="The shorter side of an image, pixels; as the file was calibrated, or 256.")
    ] = None,
    crop: Annotated[int | None, typer.Option(help="The sides of its middle, pixels; likewise, or 224.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Run the file, and count its integer kernels.")] = False,
) -> None:
    """Write a quantized model for another runtime; status 1 if --check finds a quantized layer computed in float."""
    from hdrq import checks
    from hdrq import export as exporting
    from hdrq.checkpoint.loading import load
    from hdrq.evaluate.files import load_as_calibrated

    if like is not None:
        left_out(context, "with --like", "model", "to", "activations", *OF_GRAPHS)
        exporting.write_like(file, like, out)
        console.print(f"{out}: {file} in the form of {like}", highlight=False, markup=False, soft_wrap=True)
        return
    if to is None and out.suffix not in KINDS:
        raise ValueError(f"to must be given where out ends in none of {', '.join(KINDS)}, got {str(out)!r}")
    to = checks.choice("to", KINDS[out.suffix] if to is None else to, tuple(UNUSED))
    left_out(context, f"for {to}", *UNUSED[to])
    if model is None:
        raise ValueError("model must be given, or --like with what the file was imported from")
    if to == "compressed-tensors":
        section = exporting.to_compressed_tensors(load(file, model), out, activations=activations)
        said = f"{out}: {len(section['config_groups'])} kinds of layers, {section['format']}"
        console.print(said, highlight=False, markup=False, soft_wrap=True)
        return
    if data is None:
        raise ValueError(f"data must be given for {to}, got none")
    runtime = runtime or {"onnx": "openvino", "pt2": "inductor"}[to]
    if (to == "pt2") != (runtime == "inductor"):
        raise ValueError(f'runtime must be "inductor" for pt2, and only there, got {runtime!r} for {to}')
    inputs = load_as_calibrated(file, data, samples, resize, crop)
    quantized = load(file, model)
    if to == "pt2":
        written = exporting.to_pt2(quantized, inputs, out, allow_float=allow_float)
    else:
        written = exporting.to_onnx(
            quantized, inputs, out, runtime=runtime, data=inputs, allow_float=allow_float, opset=opset
        )
    console.print(str(written), highlight=False, soft_wrap=True)
    if check:
        checked = runtime if runtime in ("openvino", "inductor") else "onnxruntime"
        found = exporting.check(out, quantized, inputs, runtime=checked)
        console.print(str(found), highlight=False, soft_wrap=True)
        raise typer.Exit(1 if found.floats and not allow_float else 0)
