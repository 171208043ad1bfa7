"""Full float32 precision, whatever the settings are, where outputs are compared."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_precision() -> Iterator[None]:
    """Products of float32 are computed in float32 inside the block, not in TF32 or bfloat16; the settings come back.

    TF32 keeps 10 bits of mantissa: it changes the outputs of two equal networks by more than a comparison allows.
    """
    operations = _operations()
    saved = [place.fp32_precision for place in operations]
    older = _older_settings()
    try:
        if older is not None:
            _set_older("highest", False)
        for place in operations:
            if place.fp32_precision not in ("none", "ieee"):  # it stands above the older settings
                place.fp32_precision = "ieee"
        yield
    finally:
        if older is not None:
            _set_older(*older)
        for place, value in zip(operations, saved, strict=True):
            place.fp32_precision = value


def _operations() -> list[Any]:
    """Where this PyTorch has a setting for one operation; older ones have none."""
    places: list[Any] = [torch.backends.cuda.matmul]
    for backend, names in (("cudnn", ("conv", "rnn")), ("mkldnn", ("matmul", "conv", "rnn"))):
        places += [getattr(getattr(torch.backends, backend, None), name, None) for name in names]
    return [place for place in places if hasattr(place, "fp32_precision")]


def _older_settings() -> tuple[str, bool] | None:
    """The settings for all operations at once; None where those of single operations contradict them."""
    try:
        _ = torch.backends.cuda.matmul.allow_tf32
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    except RuntimeError:
        return None


def _set_older(matmul: str, convolution: bool) -> None:
    torch.set_float32_matmul_precision(matmul)
    torch.backends.cudnn.allow_tf32 = convolution
