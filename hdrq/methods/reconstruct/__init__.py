"""Reconstruction: a unit learns weights, scales or roundings so that its output stays (BRECQ, QDrop, HDRQ)."""
