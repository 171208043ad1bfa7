"""The modules that quantize, alone."""

import io

import pytest
import torch
from networks import SAMPLES, data, quantized

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


def reloaded(state):
    """A state dict that went through a file."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("bits", ["W4A4", "W8A6", {"*": "W3A8"}])
def test_a_state_dict_holds_the_ranges(bits):
    first, second = quantized(0, bits), quantized(1, "W5A5")
    wanted = first(SAMPLES)
    assert not torch.equal(second(SAMPLES), wanted)
    second.load_state_dict(reloaded(first.state_dict()))
    assert torch.equal(second(SAMPLES), wanted)
    ranges = [[(m.qmin, m.qmax, m.axis) for m in q.modules() if isinstance(m, Quantizer)] for q in (first, second)]
    assert ranges[0] == ranges[1]


def test_a_state_dict_without_the_ranges_is_refused():
    first, second = quantized(0), quantized(1)
    state = {name: value for name, value in first.state_dict().items() if "extra_state" not in name}
    with pytest.raises(RuntimeError, match=r'"a.input_quantizer._extra_state"'):
        second.load_state_dict(state)


@pytest.mark.parametrize("wrong", [[7, -8], [1], [0.5, 2.0], [0, 2**20], None])
def test_a_range_that_is_none_is_refused_by_name(wrong):
    model = quantized(0)
    state = model.state_dict()
    state["b.input_quantizer._extra_state"] = wrong if wrong is None else torch.tensor(wrong)
    with pytest.raises((TypeError, ValueError), match=r"state of b\.input_quantizer: .* must be "):
        model.load_state_dict(state)


def test_the_axis_is_in_the_state():
    quantizer, other = Quantizer(torch.ones(2), -8, 7, axis=-1), Quantizer(torch.ones(2), 0, 3, axis=0)
    other.load_state_dict(quantizer.state_dict())
    assert (other.qmin, other.qmax, other.axis) == (-8, 7, -1)
