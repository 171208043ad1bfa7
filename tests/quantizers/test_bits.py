"""Bits are read from text, layer by layer, and refused where they are none."""

import pytest
import torch
from torch import nn

import hdrq
from hdrq.quantizers.bits import BitWidths, bit_policy, integer_range
from hdrq.quantizers.layers import quantized_layers


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


def test_a_shared_weight_takes_the_widest_of_its_layers_widths():
    layers = ["embed", "a", "again", "b", "head"]
    policy = bit_policy(layers, "W3A4", [["again", "head"]])
    assert policy["again"] == BitWidths(8, 4) and policy["head"] == BitWidths(8, 8)
    assert policy["a"] == policy["b"] == BitWidths(3, 4)
    wide = bit_policy(layers, "W10A12", [["embed", "again"]])
    assert wide["embed"] == BitWidths(10, 8) and wide["again"] == BitWidths(10, 12)


@pytest.mark.parametrize("other, text", [("W8A8", "8 bits"), ("float", "float")])
def test_patterns_that_give_a_shared_weight_two_widths_are_refused(other, text):
    with pytest.raises(
        ValueError, match=f"agree where layers share a weight, got 4 bits for 'a'; {text} for 'b'; give"
    ):
        bit_policy(["a", "b"], {"b": other, "*": "W4A4"}, [["a", "b"]])
    policy = bit_policy(["a", "b"], {"b": "W4A8", "*": "W4A4"}, [["a", "b"]])
    assert policy == {"a": BitWidths(4, 4), "b": BitWidths(4, 8)}


@pytest.mark.parametrize("bits, signed, want", [(2, True, (-2, 1)), (8, True, (-128, 127)), (16, False, (0, 65535))])
def test_integer_range(bits, signed, want):
    assert integer_range(bits, signed) == want


def test_an_embedding_that_encoder_and_decoder_share_is_quantized_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.encode, self.inner, self.decode = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Embedding(9, 6)
            self.head = nn.Linear(6, 9, bias=False)
            self.decode.weight = self.head.weight = self.encode.weight

        def forward(self, x):
            return self.head(self.inner(self.encode(x)) + self.decode(x))

    model, x = Tied().eval(), torch.arange(9).repeat(4, 1)
    q = hdrq.quantize(model, x, "rtn", bits="W3A3")
    layers = quantized_layers(q)
    assert layers["decode"].weight_quantizer is layers["encode"].weight_quantizer is layers["head"].weight_quantizer
    assert layers["decode"].weight_quantizer.qmax == 127 and layers["inner"].weight_quantizer.qmax == 3
    with pytest.raises(
        ValueError, match="bits must agree where layers share a weight, got 8 bits for 'encode'; 4 bits"
    ):
        hdrq.quantize(model, x, "rtn", bits={"encode": "W8A8", "*": "W4A4"})
