"""Quantization-aware training: LSQ, sharpness-aware steps, and freezing by the disorder of scales' gradients."""

from hdrq.qat import lsq
from hdrq.qat.flatness import ASAM, SAGM, SAM
from hdrq.qat.freezing import DisorderFreezer, FreezeRule, disorder
from hdrq.qat.lsq import convert, prepare, quantizers
from hdrq.qat.settings import Training
from hdrq.qat.training import Trained, leave_one_out, selected, train

__all__ = [
    "ASAM",
    "SAGM",
    "SAM",
    "DisorderFreezer",
    "FreezeRule",
    "Trained",
    "Training",
    "convert",
    "disorder",
    "leave_one_out",
    "lsq",
    "prepare",
    "quantizers",
    "selected",
    "train",
]
