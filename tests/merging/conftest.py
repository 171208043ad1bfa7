"""Models to merge."""

import pytest
from merging import adding_models
from networks import quantized

import hdrq


@pytest.fixture(scope="session")
def models():
    """Three quantized models of one architecture; tests leave them as they are."""
    return [quantized(seed) for seed in range(3)]


@pytest.fixture(scope="module")
def model():
    """A model that changes are added to; tests leave it as it is."""
    return adding_models.quantized(per_channel=True)


@pytest.fixture
def file(model, tmp_path):
    """Its file."""
    hdrq.save(model, tmp_path / "q.safetensors")
    return tmp_path / "q.safetensors"
