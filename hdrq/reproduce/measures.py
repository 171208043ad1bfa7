"""What test images contribute to a score, the score of many, and what they contribute as text.

To accuracy an image contributes whether it is classified rightly; to mIoU, the pixels of intersection and of union of
each class, of some images together where there are more than :data:`GROUPS`: rows of them stay small, and intervals
are as wide. A score is a function of the means, so that any sample has one.
"""

from __future__ import annotations

import base64
import zlib

import numpy as np
import torch
from torch import nn

from hdrq.evaluate.segmentation import class_counts

BATCH = 500  # test images at a time, fewer of large ones
PIXELS = 2**21  # of a batch, at most
GROUPS = 50  # of images with label maps


@torch.no_grad()
def contributions(model: nn.Module, images, labels) -> np.ndarray:
    """Of each test image bool (N,), where labels are (N,); of groups integers (G, 2, C), where they are (N, H, W)."""
    height, width = images[:1].shape[2:]
    size = max(1, min(BATCH, PIXELS // (height * width)))
    pairs = zip(images.split(size), labels.split(size), strict=True)
    if labels[:1].ndim == 3:
        counts = class_counts(model, pairs).numpy()
        return np.add.reduceat(counts, range(0, len(counts), -(-len(counts) // GROUPS)))
    return torch.cat([model(x).argmax(1) == y for x, y in pairs]).numpy()


def score(values: np.ndarray, shares: np.ndarray | None = None) -> np.ndarray:
    """Accuracy or mIoU, in [0, 1], of what is contributed.

    Args:
        values: (N,) or (G, 2, C).
        shares: of each image or group, (S, N), whose rows have a sum of 1; else all count alike.

    Returns:
        A number, or (S,).
    """
    flat = values.reshape(len(values), *(-1,) * (values.ndim > 1))
    means = flat.mean(0) if shares is None else shares @ flat
    if values.ndim == 1:
        return means
    counts = means.reshape(*means.shape[:-1], *values.shape[1:])
    with np.errstate(invalid="ignore"):
        return np.nanmean(counts[..., 0, :] / counts[..., 1, :], axis=-1)


def measures_of(values: np.ndarray) -> str:
    """The name of several scores of such values."""
    return "accuracies" if values.ndim == 1 else "mIoU"


def encoded(values: np.ndarray) -> str:
    """What is contributed as text: its shape, and its bits or numbers, compressed."""
    if values.ndim == 1:
        data = np.packbits(values)
    else:
        data = np.moveaxis(values, 0, -1).astype(np.min_scalar_type(int(values.max()))).copy()
    text = base64.b85encode(zlib.compress(data.tobytes(), 9)).decode()
    return f"{','.join(map(str, values.shape))}:{text}"


def decoded(text: str) -> np.ndarray:
    """The inverse of :func:`encoded`."""
    shape, _, packed = text.partition(":")
    count, *rest = map(int, shape.split(","))
    data = zlib.decompress(base64.b85decode(packed))
    if not rest:
        return np.unpackbits(np.frombuffer(data, np.uint8))[:count].astype(bool)
    values = np.frombuffer(data, np.dtype(f"u{len(data) // (count * int(np.prod(rest)))}"))
    return np.moveaxis(values.reshape(*rest, count), -1, 0)
