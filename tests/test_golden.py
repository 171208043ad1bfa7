"""Whole runs give the codes, scales and biases that they gave before: golden fingerprints, taken on each processor."""

import pytest
from golden import fingerprints


@pytest.mark.parametrize("name", fingerprints.RUNS)
def test_a_run_gives_the_stored_bits(name):
    stored, here = fingerprints.stored(), fingerprints.environment()
    if here not in stored:
        pytest.skip(f"fingerprints were taken on {' and '.join(stored)}, this is {here}")
    assert fingerprints.fingerprint(name) == stored[here][name]
