"""The settings of a merge: those that make no sense are refused."""

import pytest

import hdrq


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"weights": (0.5, 0.6)}, ValueError, "weights must sum to 1, got 1.1"),
        ({"weights": (1.5, -0.5)}, ValueError, r"weights\[0\] must be finite and in \[0, 1\], got 1.5"),
        ({"weights": (1.0,)}, ValueError, "weights must be as many as the models, 2, got 1"),
        ({"draws": 0}, ValueError, "draws must be in"),
        ({"seed": -1}, ValueError, "seed must be in"),
        ({"noise": "some"}, ValueError, "noise must be one of 'all', 'odd', 'none', got 'some'"),
    ],
)
def test_bad_options_are_refused(models, options, error, message):
    with pytest.raises(error, match=message):
        hdrq.merge(models[:2], **options)
