"""The sequential pipeline: calibration data, tracing, propagating activations, ranges, and the walk over units."""
