"""``hdrq evaluate``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from hdrq.cli.terminal import console


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
    from hdrq.evaluate.files import evaluate_files
    from hdrq.report.tables import records, table

    rows = evaluate_files(files, data, model, device=device, batch_size=batch_size, resize=resize, crop=crop)
    print(json.dumps(records(rows), indent=2)) if as_json else console.print(table(rows, "Accuracy (%)"))
