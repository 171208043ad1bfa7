"""QDrop's mixing of two tensors, element by element (Wei et al., ICLR 2022)."""

from __future__ import annotations

import numpy as np

from hdrq import rng as stream


def keep_mask(shape: tuple[int, ...], threshold: int, rng: np.ndarray) -> np.ndarray:
    """True where the element's coin is below ``threshold = round(p·2¹⁶)``."""
    if threshold == stream.KEEP_ALL:  # then no coin matters, and there may be no stream
        return np.ones(shape, bool)
    return stream.coins(rng, int(np.prod(shape))).reshape(shape) < threshold


def drop_mix(a, b, threshold, rng) -> np.ndarray:
    """``a`` where the mask keeps it, else ``b``."""
    return np.where(keep_mask(a.shape, threshold, rng), a, b)


def drop_mix_backward(grad, threshold, rng) -> tuple[np.ndarray, np.ndarray]:
    """The gradient goes where the value came from."""
    keep = keep_mask(grad.shape, threshold, rng)
    return np.where(keep, grad, np.float32(0)), np.where(keep, np.float32(0), grad)
