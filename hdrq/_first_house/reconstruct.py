"""``hdrq.reconstruct`` of the first house."""

import warnings

from hdrq.methods.post_training import fold, quantize

__all__ = ["fold", "quantize"]
warnings.warn("hdrq.reconstruct is hdrq.methods.post_training now", DeprecationWarning, stacklevel=2)
