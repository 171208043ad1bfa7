"""A small model, its files and its images, and ``hdrq quantize`` on them."""

import json

import numpy as np
import pytest
import torch
from torch import nn

for package in ("typer", "rich", "safetensors", "yaml", "PIL", "matplotlib"):
    pytest.importorskip(package)

from PIL import Image  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from hdrq.cli import app  # noqa: E402

MODULE = """
import torch
from torch import nn

def tiny(width=4):
    return nn.Sequential(
        nn.Conv2d(3, width, 3, stride=2), nn.ReLU(), nn.Conv2d(width, 6, 3, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(54, 3)
    )

class Block(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm, self.a, self.b = norm, nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return x + self.b(self.a(self.norm(x)))

def blocks():
    layers = nn.Conv2d(3, 6, 16), nn.Flatten(), Block(nn.Identity()), Block(nn.LayerNorm(6))
    return nn.Sequential(*layers, nn.Linear(6, 3))

def number():
    return 3

def half():
    return tiny().bfloat16()

def missing():
    import nothing_of_this_name

def strict(width=4):
    assert width > 12, "twelve or more"
"""


def furnish(folder):
    """Put into a folder a module, images of two classes, and states of two models."""
    (folder / "tinynet.py").write_text(MODULE)
    draw = np.random.default_rng(0)
    for label in ("bike", "mug"):
        (folder / "images" / label).mkdir(parents=True)
        for i in range(10):
            pixels = draw.integers(0, 256, (20 + i, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "images" / label / f"{i}.png")
    for name, seed in (("w", 0), ("s", 1)):
        save_file(model(seed).state_dict(), folder / f"{name}.safetensors")


def model(seed=0, width=4):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            *(nn.Conv2d(3, width, 3, stride=2), nn.ReLU(), nn.Conv2d(width, 6, 3, stride=2), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(54, 3)),
        ).eval()


OPTIONS = {
    "model": "tinynet:tiny",
    "weights": "w.safetensors",
    "source": "s.safetensors",
    "data": "images",
    "iterations": "4",
    "out": "q.safetensors",
}
SETTINGS = ("--set", "resize=20", "--set", "crop=16")


def call(*arguments, **options):
    flags = [part for name, value in options.items() for part in (f"--{name}", value)]
    return CliRunner().invoke(app, ["quantize", *map(str, arguments), *flags])


def manifest(path):
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["hdrq"])


def tensors(path):
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
