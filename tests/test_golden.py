"""Whole runs give the codes, scales and biases that they gave before: golden fingerprints, taken on one processor."""

import json

import pytest
from golden import fingerprints

STORED = json.loads(fingerprints.STORED.read_text())


@pytest.mark.parametrize("name", fingerprints.RUNS)
def test_a_run_gives_the_stored_bits(name):
    if fingerprints.environment() != STORED["environment"]:
        pytest.skip(f"fingerprints were taken on {STORED['environment']}, this is {fingerprints.environment()}")
    assert fingerprints.fingerprint(name) == STORED["runs"][name]
