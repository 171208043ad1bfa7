"""The modules that quantize, alone."""

import pytest
import torch
from networks import data

from hdrq.quantizers.modules import ActivationQuantizer, Quantizer


def test_quantizer_modes():
    x = data(500)
    quantizer = Quantizer(torch.tensor([0.1]), -8, 7)
    assert torch.equal(quantizer(x), quantizer.values(quantizer.codes(x)))
    assert quantizer.codes(x).dtype == torch.int8
    quantizer.mode = "noise"
    inside = x.abs() < 0.7
    assert ((quantizer(x) - x)[inside].abs() <= 0.0501).all() and not torch.equal(quantizer(x), x)
    quantizer.mode = "float"
    assert quantizer(x) is x
    quantizer.mode = "off"
    with pytest.raises(ValueError, match="mode must be one of 'float', 'noise', 'round', got 'off'"):
        quantizer(x)


def test_activation_quantizer_leaves_elements_as_they_are():
    x = data(20_000)
    quantizer = ActivationQuantizer(torch.tensor([0.5]), -8, 7)
    rounded = quantizer(x)
    quantizer.keep = 0.25
    mixed = quantizer(x)
    kept = mixed == rounded
    assert torch.equal(torch.where(kept, rounded, x), mixed)
    assert 0.23 < kept.float().mean() < 0.27
