"""Quantizers are attached where tensors enter layers."""

import pytest
import torch
import torch.nn.functional as F
from networks import SamePad, blocks_net, data, lively
from torch import nn

import hdrq
from hdrq.quantizers.attach import first_tensor
from hdrq.quantizers.layers import input_quantizers, quantized_layers


def test_quantizers_sit_where_tensors_enter():
    x = data(16, 3, 8, 8)
    model = hdrq.quantize(blocks_net(), x, "rtn", bits="W3A5")
    assert list(quantized_layers(model)) == [
        "0",
        *(f"{b}.{n}" for b in "23" for n in ("first", "second", "shortcut")),
        "5",
    ]
    ranges = {name: (q.qmin, q.qmax) for name, q in input_quantizers(model).items()}
    assert ranges == {
        "0": (-128, 127),  # the image takes both signs
        "2": (0, 31),  # for both branches
        "2.second": (0, 31),
        "3": (0, 31),
        "3.second": (0, 31),
        "5": (0, 255),
    }
    weights = {n: (q.weight_quantizer.qmin, q.weight_quantizer.qmax) for n, q in quantized_layers(model).items()}
    assert weights["0"] == weights["5"] == (-128, 127) and weights["2.shortcut"] == (-4, 3)


def test_both_branches_read_the_quantized_input():
    model = hdrq.quantize(blocks_net(), data(16, 3, 8, 8), "rtn")
    read = {}
    for name in ("first", "shortcut"):
        layer = model[2].get_submodule(name)
        layer.register_forward_pre_hook(lambda m, args, name=name: read.update({name: args[0]}))
    model(data(4, 3, 8, 8, seed=1))
    assert read["first"] is read["shortcut"]
    steps = read["first"] / model[2].input_quantizer.scale
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-4)
    assert len(steps.round().unique()) <= 16


def test_layers_that_read_one_tensor_share_its_quantizer():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 3), nn.Linear(6, 3)

        def forward(self, x):
            return self.a(x) + self.b(x)

    quantized = hdrq.quantize(lively(Heads()), data(9, 6), "rtn")
    assert list(input_quantizers(quantized)) == ["a"]
    assert quantized.b.input_quantizer is quantized.a.input_quantizer


def test_layer_that_pads_in_its_forward_quantizes_its_weight():
    x = data(8, 3, 8, 8)
    model = hdrq.quantize(lively(nn.Sequential(SamePad(3, 4, 2))), x, "rtn", bits={"*": "W2A8"})
    assert len(model[0].weight.unique()) <= 4 and model(x).shape == (8, 4, 8, 8)
    restored = F.conv2d(F.pad(model[0].input_quantizer(x), (1, 0, 1, 0)), model[0].weight, model[0].bias)
    assert torch.equal(model(x), restored)


def test_scale_for_each_channel():
    model = hdrq.quantize(blocks_net(), data(8, 3, 8, 8), "rtn", per_channel=True)
    assert all(q.weight_quantizer.scale.shape == q.module.weight.shape[:1] for q in quantized_layers(model).values())


def test_model_in_bfloat16():
    x = data(16, 3, 8, 8)
    model = hdrq.quantize(blocks_net().bfloat16(), x.bfloat16(), "rtn", bits="W8A8")
    assert model(x.bfloat16()).dtype == torch.bfloat16
    assert all(q.weight_quantizer.scale.dtype == torch.float32 for q in quantized_layers(model).values())


@pytest.mark.parametrize(
    "model, message",
    [
        (nn.Sequential(nn.ReLU()), "must run at least one convolution or linear layer on calibration, got none"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(6, 3)), "must have plain weights, got a parametrized one"),
    ],
)
def test_models_without_plain_layers_are_refused(model, message):
    with pytest.raises(ValueError, match=f"model {message}"):
        hdrq.quantize(model.eval(), data(9, 6), "rtn")


def test_weight_that_is_not_finite_is_named():
    model = blocks_net()
    model[2].second.weight.data[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"layer '2\.second' \(Conv2d\), whose weight is not finite"):
        hdrq.quantize(model, data(8, 3, 8, 8), "rtn")


class Chain(nn.Sequential):
    """A block that is a container: it calls its children in turn."""


def test_a_container_has_no_quantizer_among_the_children_that_it_calls():
    model = lively(nn.Sequential(*(Chain(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)) for _ in range(2))))
    quantized = hdrq.quantize(model, data(9, 6), "rtn", bits={"*": "W8A8"})
    assert {*input_quantizers(quantized)} == {"0.0", "0.2", "1.0", "1.2"}
    assert [len(block) for block in quantized] == [3, 3]


class Writes(nn.Module):
    """A block that reads a list and a tensor, and writes to a dict of its caller's."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x, others, log):
        log["calls"] = log.get("calls", 0) + 1
        assert others[0] is x
        return F.relu(self.a(x) + self.b(others[0]))


class Caller(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks, self.head = nn.ModuleList([Writes(), Writes()]), nn.Linear(6, 3)

    def forward(self, x):
        log = {}
        for block in self.blocks:
            x = block(x, [x], log)
        assert log["calls"] == 2
        return self.head(x)


def test_the_tensor_is_quantized_in_containers_too_and_other_arguments_stay_what_they_are():
    quantized = hdrq.quantize(lively(Caller()), data(20, 6), "rtn", bits={"*": "W8A4"})
    assert list(input_quantizers(quantized)) == ["blocks.0", "blocks.1", "head"]
    quantized(data(3, 6))


def test_integers_and_numbers_inside_containers_are_passed_over():
    tokens, x = torch.arange(3), torch.rand(3)
    assert first_tensor(([2, {"tokens": tokens, "x": x}],), {}) is x
    assert first_tensor(([tokens],), {"y": (x,)}) is x
    with pytest.raises(ValueError, match="block must be called with a tensor, got list"):
        first_tensor(([tokens, 2],), {}, "block")
