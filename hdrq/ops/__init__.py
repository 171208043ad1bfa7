"""The ops: one contract each, four implementations, the same bits from all of them."""

from hdrq.ops.distance import source_distance
from hdrq.ops.drop import drop_mix
from hdrq.ops.fakequant import dequantize, fake_quantize, quantize
from hdrq.ops.merging import MergedTensor, merge
from hdrq.ops.noise import noise_quantize
from hdrq.ops.packing import pack, unpack
from hdrq.ops.ranges import search_affine, search_scale
from hdrq.ops.rounding import adaround, adaround_init, adaround_regularized
from hdrq.ops.weights import quantize_weights

__all__ = [
    "MergedTensor",
    "adaround",
    "adaround_init",
    "adaround_regularized",
    "dequantize",
    "drop_mix",
    "fake_quantize",
    "merge",
    "noise_quantize",
    "pack",
    "quantize",
    "quantize_weights",
    "search_affine",
    "search_scale",
    "source_distance",
    "unpack",
]
