"""The released HDRQ: outputs are quantized where they are returned, and learned there."""

import pytest
import torch
from networks import blocks_net
from torch import nn

import hdrq
from hdrq.methods.reconstruct.learner import Learner
from hdrq.quantizers.layers import input_quantizers, input_readers

DATA = torch.randn((48, 3, 8, 8), generator=torch.Generator().manual_seed(0))
OPTIONS = {"bits": {"*": "W3A3"}, "progress": False, "distance": 0}


@pytest.fixture
def first_losses(monkeypatch):
    """Of each unit, by name: its learner, its first batch, the loss on it, and what its first layer reads meanwhile."""
    seen = {}
    loss = Learner._reconstruction_loss

    def watched(self, batch):
        if self.unit.name in seen:
            return loss(self, batch)
        read = []
        layer = self.unit.layers[0].module
        handle = layer.register_forward_hook(lambda module, args, output: read.append(args[0].clone()))
        value = loss(self, [x.clone() for x in batch])
        handle.remove()
        seen[self.unit.name] = self, batch, value.detach(), read[0]
        if self.unit.output is not None:
            with torch.no_grad():
                seen["returned"] = self.unit.output(self.unit.module(batch[0]))
        return value

    monkeypatch.setattr(Learner, "_reconstruction_loss", watched)
    return seen


def test_a_scale_is_learned_by_the_block_that_returns_what_it_quantizes(first_losses):
    model = hdrq.quantize(blocks_net(), DATA, "hdrq", learn_outputs=True, iterations=2, **OPTIONS)
    units = {name: first_losses[name][0].unit for name in ("0", "2", "3", "5")}
    assert sorted(units["2"].activations) == ["2.input_quantizer", "2.output_quantizer", "2.second.input_quantizer"]
    assert sorted(units["3"].activations) == ["3.second.input_quantizer"]
    assert units["2"].output is units["3"].entry is model[3].input_quantizer
    assert units["3"].output is units["2"].entry is None  # an operation lies between


def test_the_loss_is_taken_behind_the_quantizer_of_the_output(first_losses):
    knobs = {"input_keep": 1.0, "activation_keep": 1.0, "fake_quant_fraction": 1.0, "iterations": 1}
    hdrq.quantize(blocks_net(), DATA, "hdrq", learn_outputs=True, **knobs, **OPTIONS)
    _, (_, target), loss, _ = first_losses["2"]
    want = (first_losses["returned"] - target).square().sum(1).mean()
    assert loss == pytest.approx(float(want), rel=1e-6)


def test_the_next_block_mixes_what_is_quantized_with_full_precision(first_losses):
    hdrq.quantize(blocks_net(), DATA, "hdrq", learn_outputs=True, fake_quant_fraction=1.0, iterations=1, **OPTIONS)
    learner, (quantized, full, _), _, read = first_losses["3"]
    entry = learner.unit.entry
    with torch.no_grad():
        taken = read == full
        assert torch.equal(read[~taken], entry(quantized)[~taken]) and 0.3 < taken.float().mean() < 0.8
        assert not torch.equal(entry(full), full)  # so what the block reads is no grid


def test_the_models_own_input_stays_as_it_is():
    for quantize_input in (True, False):
        model = hdrq.quantize(blocks_net(), DATA, "rtn", bits={"*": "W4A4"}, quantize_input=quantize_input)
        assert ("0" in input_readers(model)) is quantize_input and "2" in input_readers(model)


def test_activations_have_no_zero_point_where_none_is_wanted():
    model, data = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).eval(), torch.rand(64, 8) * 3 - 0.5
    ranges = [
        (q.qmin, q.qmax)
        for affine in (True, False)
        for q in input_quantizers(
            hdrq.quantize(model, data, "rtn", bits={"*": "W4A4"}, affine_activations=affine)
        ).values()
    ]
    assert ranges[0] not in ((-8, 7), (0, 15)) and ranges[2] == (-8, 7)


def test_union_takes_the_widest_range_of_the_samples():
    model = nn.Sequential(nn.Linear(64, 4)).eval()
    data = torch.randn((8, 64), generator=torch.Generator().manual_seed(0)) * torch.arange(1, 9).view(-1, 1)
    options = {"bits": {"*": "W4A4"}, "range_samples": 8, "affine_activations": False}
    union, joint = (
        float(hdrq.quantize(model, data, "rtn", range_union=union, **options)[0].input_quantizer.scale)
        for union in (True, False)
    )
    each = max(float(hdrq.ops.search_scale(row, -8, 7)) for row in data)
    assert union == pytest.approx(each) and joint < union


def test_samples_that_do_not_reach_a_quantizer_are_refused_by_name():
    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.always, self.rare = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            y = self.always(x)
            return y + self.rare(y) if len(x) > 3 else y

    with pytest.raises(ValueError, match=r"range_samples must be as many as reach every quantizer, got 2, .* rare"):
        hdrq.quantize(Routed().eval(), torch.randn(16, 4), "rtn", bits={"*": "W4A4"}, range_samples=2)
