"""QDrop's mixing, in plain PyTorch. Definition: :mod:`hdrq.backends.reference.drop`."""

from __future__ import annotations

import torch

from hdrq import rng as stream


def keep_mask(shape: torch.Size, threshold: int, rng: torch.Tensor | None) -> torch.Tensor | None:
    """True where the element's coin keeps it; None where all are kept."""
    if threshold == stream.KEEP_ALL or rng is None:
        return None
    return (stream.torch_coins(rng, shape.numel()) < threshold).reshape(shape)


def drop_mix(a, b, threshold, rng) -> torch.Tensor:
    keep = keep_mask(a.shape, threshold, rng)
    return a.clone() if keep is None else torch.where(keep, a, b)


def drop_mix_backward(grad, threshold, rng) -> tuple[torch.Tensor, torch.Tensor]:
    keep = keep_mask(grad.shape, threshold, rng)
    if keep is None:
        return grad.clone(), torch.zeros_like(grad)
    return grad.masked_fill(~keep, 0), grad.masked_fill(keep, 0)
