"""Bits are read from text, layer by layer, and refused where they are none."""

import pytest

from hdrq.quantizers.bits import BitWidths, bit_policy, integer_range


@pytest.mark.parametrize("text, weight, activation", [("W4A4", 4, 4), ("W2A16", 2, 16), ("W16A8", 16, 8)])
def test_bits_are_read(text, weight, activation):
    assert BitWidths.parse(text) == BitWidths(weight, activation)


@pytest.mark.parametrize("text", ["4", "", "w4a4", "W4", "W4A", "W4A4 ", "W4.5A4", "W-4A4", None, 4])
def test_bits_written_otherwise_are_refused(text):
    with pytest.raises(ValueError, match='bits must be written like "W4A4", got'):
        BitWidths.parse(text)


@pytest.mark.parametrize("text, which", [("W1A4", "weight"), ("W17A4", "weight"), ("W4A1", "activation")])
def test_bits_out_of_range_are_refused(text, which):
    with pytest.raises(ValueError, match=rf"{which} bits must be in \[2, 16\], got"):
        BitWidths.parse(text)


def test_policy_gives_the_edges_eight_bits():
    policy = bit_policy(["stem", "a", "b", "head"], "W3A4")
    assert policy == {"stem": BitWidths(8, 8), "a": BitWidths(3, 4), "b": BitWidths(3, 4), "head": BitWidths(8, 8)}


def test_first_pattern_decides_and_edges_are_the_patterns_too():
    policy = bit_policy(["stem", "blocks.0", "blocks.1", "head"], {"blocks.1": "W2A2", "blocks.*": "W5A5", "*": "W6A6"})
    assert policy == {
        "stem": BitWidths(6, 6),
        "blocks.0": BitWidths(5, 5),
        "blocks.1": BitWidths(2, 2),
        "head": BitWidths(6, 6),
    }


@pytest.mark.parametrize(
    "bits, error, message",
    [
        ({"a": "W4A4"}, ValueError, "a pattern for every layer .* got none for 'b'"),
        ({"c*": "W4A4", "*": "W4A4"}, ValueError, r"patterns that match a layer, got 'c\*'; layers: a, b"),
        ({"*": "4"}, ValueError, "written like"),
        (4, TypeError, "bits must be a string .* got int"),
    ],
)
def test_bad_policy_is_refused(bits, error, message):
    with pytest.raises(error, match=message):
        bit_policy(["a", "b"], bits)


@pytest.mark.parametrize("bits, signed, want", [(2, True, (-2, 1)), (8, True, (-128, 127)), (16, False, (0, 65535))])
def test_integer_range(bits, signed, want):
    assert integer_range(bits, signed) == want
