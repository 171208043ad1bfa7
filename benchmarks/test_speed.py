"""Our ops under pytest-benchmark, one function a test: what compares one commit of ours with another.

``pytest benchmarks --benchmark-autosave``, then, after a change, ``pytest benchmarks --benchmark-compare``. Figures
against others are ``hdrq bench``'s: providers take turns there, and the fixture times one function to its end.
"""

import pytest
import torch

from hdrq.benchmarks.harness import families, load, pinned


@pytest.mark.parametrize("elements", [2**12, 2**20])
@pytest.mark.parametrize("family, operation", [(f, operation) for f in families() for operation in load(f).operations])
def test_speed(benchmark, family, operation, elements):
    bench = load(family)
    tensors = bench.inputs((elements,), "cpu", torch.float32)
    bench.verify(*tensors)
    ours = next(p for p in bench.operations[operation](*tensors) if p.ours)
    with pinned(1):
        benchmark(ours.run)
