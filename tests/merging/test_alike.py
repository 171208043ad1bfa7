"""What must agree between models: unlike ones are refused with what differs."""

import pytest
from networks import quantized

import hdrq


@pytest.mark.parametrize(
    "other, differences",
    [
        (
            {"width": 7},
            ["a.bias ((6,) torch.float32 in the first, (7,) torch.float32 in number 1)", "head: weight shape ((4, 6)"],
        ),
        (
            {"bits": "W3A4"},
            ["b: weight range ((-8, 7) in the first, (-4, 3) in number 1)", "; bits says what the result has"],
        ),
        ({"bits": "W4A5"}, ["b: input levels (16 in the first, 32 in number 1)"]),
        ({"table": 17}, ["table ((16,) torch.int64 in the first, (17,) torch.int64 in number 1)"]),
    ],
)
def test_unlike_models_are_refused_with_what_differs(models, other, differences):
    with pytest.raises(ValueError, match="models must be alike to be merged, got") as refusal:
        hdrq.merge([models[0], quantized(1, **other)])
    assert all(difference in str(refusal.value) for difference in differences), str(refusal.value)


def test_integer_buffers_must_agree(models):
    other = quantized(1)
    other.table[9] = 0
    with pytest.raises(ValueError, match=r"got table \(other integers in number 1\)"):
        hdrq.merge([models[0], other])
