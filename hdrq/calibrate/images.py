"""Data from disk: images for calibration, images with labels for evaluation, or a tensor in a file."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from hdrq import checks
from hdrq.calibrate.data import spread
from hdrq.checkpoint.library import SafetensorError, load_file

IMAGES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
PIXELS = 2**27  # of a picture, at most, as it is declared and as it is resized
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
    if not (path.is_file() or path.is_dir()):
        raise ValueError(f"data must be a folder or a file, got {path}, a device, a pipe or a socket")
    if path.is_file():
        samples = _tensor(path)
        return samples[spread(len(samples), limit)]
    files = image_files(path)
    load = image_reader(resize, crop, mean, std)
    return load([files[i] for i in spread(len(files), limit)])


def load_labelled(
    path: str | os.PathLike,
    *,
    resize: int = 256,
    crop: int = 224,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
    batch_size: int = 100,
    classes: Sequence[str] | None = None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of images and labels, from a folder with a folder for each class (as Office-Home's domains are).

    A label is the number of its class in ``classes``, int64; by default those are the folders that there are, in the
    order of their names. Images are read as they are asked for, and made as :func:`load_data` makes them; so are
    arguments and errors.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"data must be a folder with a folder for each class, got {path}, which is none")
    checks.integer("batch_size", batch_size, 1, 2**31)
    load, files = image_reader(resize, crop, mean, std), image_files(path)
    empty = sorted({*class_names(path)} - {file.relative_to(path).parts[0] for file in files})
    if empty:
        raise ValueError(f"data must have images of every class, got none in folders of {path}: {checks.listed(empty)}")
    numbers = {name: label for label, name in enumerate(class_names(path) if classes is None else classes)}
    labels = [numbers.get(file.relative_to(path).parts[0], -1) for file in files]
    if min(labels) < 0:
        known = ", ".join(numbers)
        wrong = files[labels.index(-1)]
        raise ValueError(f"data must have every image in the folder of its class, got {wrong}; classes: {known[:300]}")
    for first in range(0, len(files), batch_size):
        some = slice(first, first + batch_size)
        yield load(files[some]), torch.tensor(labels[some])


def class_names(path: str | os.PathLike) -> list[str]:
    """The visible folders in a folder, in order."""
    folders = (f.name for f in Path(path).iterdir() if f.is_dir()) if Path(path).is_dir() else ()
    return sorted(name for name in folders if not name.startswith("."))


def image_files(path: Path) -> list[Path]:
    """The visible images in a folder and below it. Linked folders are read too, unless the link leads back up."""
    files: list[Path] = []

    def read(folder: Path, above: frozenset[str]) -> None:
        real = os.path.realpath(folder)
        if real in above:
            return  # a link to a folder that it lies in
        for entry in folder.iterdir():
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                read(entry, above | {real})
            elif entry.suffix.lower() in IMAGES:
                files.append(entry)

    read(path, frozenset())
    if not files:
        raise ValueError(f"data must be a folder of images ({', '.join(IMAGES)}), got none in {path}")
    return sorted(files)


def image_reader(
    resize: int, crop: int, mean: Sequence[float], std: Sequence[float]
) -> Callable[[Sequence[Path]], torch.Tensor]:
    """A function that makes of files what :func:`load_data` makes of a folder; arguments and errors are the same."""
    checks.integer("crop", crop, 1, checks.integer("resize", resize, 1, 2**15))
    normalized = normalization(mean, std)
    return lambda files: normalized([_cropped(file, resize, crop) for file in files])


def normalization(mean: Sequence[float], std: Sequence[float]) -> Callable[[Sequence[np.ndarray]], torch.Tensor]:
    """A function that makes pictures of one size, uint8 (H, W, 3), a tensor (N, 3, H, W): ``(x/255 − mean)/std``."""
    try:
        means, stds = (torch.tensor(v, dtype=torch.float32).view(3, 1, 1) for v in (mean, std))
        right = bool(means.isfinite().all() and stds.isfinite().all() and (stds > 0).all())
    except (TypeError, ValueError, RuntimeError):
        right = False
    if not right:
        raise ValueError(f"mean and std must be 3 numbers each, std positive, got {mean!r:.100} and {std!r:.100}")

    def normalized(pictures: Sequence[np.ndarray]) -> torch.Tensor:
        x = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous().float()
        return x.div_(255).sub_(means).div_(stds)

    return normalized


def _tensor(path: Path) -> torch.Tensor:
    if path.suffix == ".npy":
        try:
            array = np.load(path, allow_pickle=False)
            tensors = {path.name: torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))}
        except (EOFError, ValueError, MemoryError, OverflowError, SyntaxError, TypeError) as error:
            raise ValueError(f"data must be an array, got {path}, which cannot be read: {error}") from error
    elif path.suffix == ".safetensors":
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"data must be a safetensors file, got {path}: {error}") from error
    else:
        raise ValueError(f"data must be a folder, a .npy or a .safetensors file, got {path}")
    if len(tensors) != 1:
        raise ValueError(f"data must be a file of one tensor, got {len(tensors)} in {path}: {', '.join(tensors)[:200]}")
    (tensor,) = tensors.values()
    if not tensor.is_floating_point() or tensor.ndim < 2:
        raise TypeError(f"data must be floats, (N, …), got {tensor.dtype} of shape {tuple(tensor.shape)} in {path}")
    return tensor.float()


def open_image(path: Path, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """A picture, converted. One of too many pixels is refused before it is decoded.

    Raises:
        ValueError: it cannot be read, or ``convert`` says so; it is named.
    """
    try:
        with Image.open(path) as file:
            if math.prod(file.size) > PIXELS:
                width, height = file.size
                raise ValueError(f"it declares {width} × {height} pixels, more than {PIXELS:,}")
            return convert(file)
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"data must be images, got {path}, which cannot be read: {error}") from error


def _cropped(path: Path, resize: int, crop: int) -> np.ndarray:
    """Pixels (crop, crop, 3), uint8."""
    image = open_image(path, rgb)
    factor = resize / min(image.size)
    width, height = (max(resize, round(side * factor)) for side in image.size)
    if width * height > PIXELS:
        raise ValueError(
            f"data must be images of at most {PIXELS:,} pixels when resized to {resize}, got {path}, which would have "
            f"{width} × {height}; leave it out, or crop it before"
        )
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - crop) // 2, (height - crop) // 2
    return np.asarray(image.crop((left, top, left + crop, top + crop)))


def rgb(image: Image.Image) -> Image.Image:
    """A picture in RGB; one of 16 bits is scaled to 8, where Pillow would clip it to white."""
    if image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        values = np.asarray(image)
        if image.mode == "F" or values.min(initial=0) < 0 or values.max(initial=0) > 65535:
            raise ValueError(f"its pixels must be of 8 or 16 bits, got mode {image.mode}")
        return Image.fromarray(((values.astype(np.int64) * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA").convert("RGB")
    return image.convert("RGB")
