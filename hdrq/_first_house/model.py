"""``hdrq.model`` of the first house."""

import warnings

from hdrq.calibrate.ranges import attach_quantizers
from hdrq.quantizers.bits import BitWidths as Bits
from hdrq.quantizers.layers import QuantizedLayer, input_quantizers, input_readers, quantized_layers, weighted_layers
from hdrq.quantizers.provenance import origin

__all__ = [
    "Bits",
    "QuantizedLayer",
    "attach_quantizers",
    "input_quantizers",
    "input_readers",
    "origin",
    "quantized_layers",
    "weighted_layers",
]
warnings.warn("hdrq.model is hdrq.quantizers now (layers, bits, provenance)", DeprecationWarning, stacklevel=2)
