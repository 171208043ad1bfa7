"""``hdrq.data`` of the first house."""

import warnings

from hdrq.calibrate.images import class_names, load_data, load_labelled

__all__ = ["class_names", "load_data", "load_labelled"]
warnings.warn("hdrq.data is hdrq.calibrate.images now", DeprecationWarning, stacklevel=2)
