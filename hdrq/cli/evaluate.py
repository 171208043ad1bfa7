"""``hdrq evaluate``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from hdrq.cli.terminal import console, left_out, numbers


def evaluate(
    context: typer.Context,
    files: Annotated[list[Path], typer.Argument(help="Quantized models, or states in full precision; safetensors.")],
    model: Annotated[str, typer.Option(help="The architecture: module:factory.")],
    data: Annotated[list[Path], typer.Option(help="A folder with a folder of images for each class; give it again.")],
    label_maps: Annotated[
        list[str] | None,
        typer.Option(
            help="Of segmentation: the layout of the folder of images with label maps, cityscapes, idd, gta5 or plain; "
            "one for all, or one for each."
        ),
    ] = None,
    resize: Annotated[
        int | None, typer.Option(help="The shorter side of an image, pixels; as the files were calibrated, or 256.")
    ] = None,
    crop: Annotated[int | None, typer.Option(help="The sides of its middle, pixels; likewise, or 224.")] = None,
    mean: Annotated[
        str | None, typer.Option(help="Of red, green and blue, with commas; likewise, or ImageNet's.")
    ] = None,
    std: Annotated[str | None, typer.Option(help="Their standard deviations; likewise.")] = None,
    model_args: Annotated[
        str | None, typer.Option(help="The factory's arguments, like {width: 8}; those that the files name.")
    ] = None,
    size: Annotated[str, typer.Option(help="With --label-maps, of images: height and width.")] = "512x1024",
    label_size: Annotated[str | None, typer.Option(help="With --label-maps, of label maps; as images.")] = None,
    split: Annotated[str, typer.Option(help="With --label-maps: test, or train.")] = "test",
    top: Annotated[int, typer.Option(help="An image is right if its label is among so many of the first.")] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    offload_folder: Annotated[
        Path | None, typer.Option(help="On a disk: weights lie there and take no memory of their own.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images at a time; 100, or 4 with label maps.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print the accuracy, or mIoU, of models on folders of images with labels, and the harmonic mean over folders."""
    from hdrq.evaluate.files import evaluate_files, evaluate_label_maps
    from hdrq.evaluate.metrics import Row
    from hdrq.methods.job import parse_setting
    from hdrq.report.tables import classes_table, records, table

    arguments = None if model_args is None else parse_setting(f"model_args={model_args}")[1]
    if arguments is not None and not isinstance(arguments, dict):
        raise TypeError(f"model_args must be a mapping, like {{width: 8}}, got {model_args!r}")
    if label_maps:
        left_out(context, "with --label-maps", "top", "resize", "crop", "mean", "std")
        layouts = label_maps * len(data) if len(label_maps) == 1 else label_maps
        if len(layouts) != len(data):
            raise ValueError(
                f"label_maps must be one layout, or one for each of {len(data)} folders, got {len(layouts)}"
            )
        segmented = evaluate_label_maps(
            *(files, [*zip(data, layouts, strict=True)], model),
            split=split,
            model_args=arguments,
            device=device,
            offload_folder=offload_folder,
            batch_size=4 if batch_size is None else batch_size,
            size=_size(size),
            label_size=_size(label_size or size),
        )
        rows: Sequence[Row] = segmented
        tables = [classes_table(segmented, "IoU (%)"), table(rows, "mIoU (%)")]
    else:
        left_out(context, "without --label-maps", "size", "label_size", "split")
        made = {"resize": resize, "crop": crop, "mean": numbers("mean", mean), "std": numbers("std", std)}
        rows = evaluate_files(
            files,
            data,
            model,
            model_args=arguments,
            device=device,
            offload_folder=offload_folder,
            batch_size=100 if batch_size is None else batch_size,
            top=top,
            **made,
        )
        tables = [table(rows, "Accuracy (%)" if top == 1 else f"Accuracy, top {top} (%)")]
    if as_json:
        print(json.dumps(records(rows), indent=2))
        return
    for each in tables:
        console.print(each)


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise ValueError(f"size must be height x width in pixels, like 512x1024, got {text!r}")
    return int(height), int(width)
