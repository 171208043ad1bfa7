"""Triton's interpreter stands in for a GPU, and must be asked for before triton is imported."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # there is a worker for each core

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def every_step_kept(monkeypatch):
    """No unit goes back to where it started, however little it has learned."""
    from hdrq.methods.reconstruct.learner import Learner
    from hdrq.methods.reconstruct.method import Reconstruction

    monkeypatch.setattr(Reconstruction, "_measure", lambda self, unit: 0.0)
    monkeypatch.setattr(Learner, "distance_term", lambda self: 0.0)
