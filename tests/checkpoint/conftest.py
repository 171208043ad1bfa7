"""A checkpoint to read."""

import pytest
from checkpoint.example import quantized

import hdrq


@pytest.fixture
def path(tmp_path):
    """The file of a quantized model."""
    hdrq.save(quantized(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"
