"""Calibration data from disk: a folder of images, or a tensor in a file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from hdrq import checks

IMAGES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's training images, in [0, 1]


def load_data(
    path: str | os.PathLike,
    *,
    resize: int = 256,
    crop: int = 224,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
    limit: int | None = None,
) -> torch.Tensor:
    """Samples for calibration, float32, along the first axis.

    Args:
        path: a ``.npy`` or ``.safetensors`` file of one tensor, taken as it is; or a folder of images, flat or with a
            folder for each class (as Office-Home has them): each resized so that its shorter side is ``resize`` pixels
            (bilinear), cropped to the ``crop`` × ``crop`` pixels in its middle, and normalized, ``(x/255 − mean)/std``.
        limit: how many samples at most, evenly over all in the order of their names, so that every class has its share.

    Returns:
        (N, 3, crop, crop) from images.

    Raises:
        FileNotFoundError, TypeError, ValueError: "X must be …, got …"; a file that is no image is named.
    """
    path = Path(path)
    if limit is not None:
        checks.integer("limit", limit, 1, 2**31)
    if not path.exists():
        raise FileNotFoundError(f"data must be a folder or a file, got {path}, which does not exist")
    if path.is_file():
        samples = _tensor(path)
        return samples[_spread(len(samples), limit)]
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGES)
    if not files:
        raise ValueError(f"data must be a folder of images ({', '.join(IMAGES)}), got none in {path}")
    checks.integer("crop", crop, 1, checks.integer("resize", resize, 1, 2**15))
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError(f"mean and std must be 3 numbers each, std positive, got {list(mean)} and {list(std)}")
    pixels = np.stack([_image(files[i], resize, crop) for i in _spread(len(files), limit)])
    normalized = (pixels.astype(np.float32) / 255 - np.array(mean, np.float32)) / np.array(std, np.float32)
    return torch.from_numpy(normalized.transpose(0, 3, 1, 2).copy())


def _spread(count: int, limit: int | None) -> list[int]:
    wanted = count if limit is None else min(limit, count)
    return [i * count // wanted for i in range(wanted)]


def _tensor(path: Path) -> torch.Tensor:
    if path.suffix == ".npy":
        array = np.load(path, allow_pickle=False)
        tensors = {path.name: torch.from_numpy(array)} if array.dtype != object else {}
    elif path.suffix == ".safetensors":
        from safetensors.torch import load_file

        tensors = load_file(path)
    else:
        raise ValueError(f"data must be a folder, a .npy or a .safetensors file, got {path}")
    if len(tensors) != 1:
        raise ValueError(f"data must be a file of one tensor, got {len(tensors)} in {path}: {', '.join(tensors)[:200]}")
    (tensor,) = tensors.values()
    if not tensor.is_floating_point() or tensor.ndim < 2:
        raise TypeError(f"data must be floats, (N, …), got {tensor.dtype} of shape {tuple(tensor.shape)} in {path}")
    return tensor.float()


def _image(path: Path, resize: int, crop: int) -> np.ndarray:
    """Pixels (crop, crop, 3), uint8."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"data must be images, got {path}, which cannot be read: {error}") from error
    factor = resize / min(image.size)
    width, height = (max(resize, round(side * factor)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - crop) // 2, (height - crop) // 2
    return np.asarray(image.crop((left, top, left + crop, top + crop)))
