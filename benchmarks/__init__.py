"""Benches of the ops, one module per family: ``hdrq bench``, or ``python -m hdrq.benchmarks``."""
