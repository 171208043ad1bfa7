"""Models to merge."""

import pytest
from networks import quantized


@pytest.fixture(scope="session")
def models():
    """Three quantized models of one architecture; tests leave them as they are."""
    return [quantized(seed) for seed in range(3)]
