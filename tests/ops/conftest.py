import pytest
from helpers import DEVICE, MISSING


@pytest.fixture(autouse=True)
def short_programs(monkeypatch):
    """A program of an interpreted kernel loops over little: several programs share even a small tensor, and fast."""
    if MISSING["triton"] is None and DEVICE == "cpu":
        for name, size in {"noise.TILES": 2, "merging.TOGETHER": 4, "ranges.CANDIDATES": 16}.items():
            monkeypatch.setattr(f"hdrq.kernels.{name}", size)
