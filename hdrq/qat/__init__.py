"""Quantization-aware training: LSQ, sharpness-aware steps, and freezing by the disorder of scales' gradients."""

from hdrq.qat import lsq
from hdrq.qat.flatness import ASAM, SAGM, SAM
from hdrq.qat.freezing import DisorderFreezer, FreezeRule, disorder
from hdrq.qat.lsq import convert, prepare, quantizers

__all__ = [
    "ASAM",
    "SAGM",
    "SAM",
    "DisorderFreezer",
    "FreezeRule",
    "convert",
    "disorder",
    "lsq",
    "prepare",
    "quantizers",
]
