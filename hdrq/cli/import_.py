"""``hdrq import``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hdrq.cli.terminal import console


def import_(
    path: Annotated[Path, typer.Argument(help="A quantized model that others made: an ONNX file, or a folder.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file of hdrq to write.")],
) -> None:
    """Read a quantized model of another tool, so that it can be merged; hdrq export --like writes it back."""
    from hdrq.checks import plain
    from hdrq.export.foreign import read

    manifest = read(path, out)
    counts = f"{len(manifest['weights'])} quantized weights, {len(manifest['inputs'])} quantizers of activations"
    console.print(plain(f"{out}: {counts}, from {path}"), highlight=False, markup=False, soft_wrap=True)
