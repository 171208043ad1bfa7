"""The source: what pulls the weights, and the one that does not fit."""

import copy

import pytest
import torch
from networks import CALIBRATION, learn, net
from torch import nn

from hdrq.calibrate.data import calibration_calls
from hdrq.methods.post_training import source_weights
from hdrq.prepare.folding import fold_batchnorm
from hdrq.quantizers.layers import QuantizedLayer, input_quantizers, quantized_layers


def test_distance_pulls_towards_the_source(monkeypatch):
    monkeypatch.setattr(QuantizedLayer, "settle", lambda layer: None)  # rounding would hide small steps
    model, source = net(), net()
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(0.03)

    def away(distance):
        result = learn(model, source=source, distance=distance, iterations=40, weight_step=0.0)
        pull = source_weights(source, result, calibration_calls(CALIBRATION))
        return [float((layer.latent.detach() - pull[n]).norm()) for n, layer in quantized_layers(result).items()]

    free, pulled = away(1e-9), away(5.0)
    assert all(b < 0.6 * a for a, b in zip(free, pulled, strict=True))


def test_source_is_folded_with_its_own_batchnorm():
    # a source that equals the model but for statistics that its weights make up for: folded, the two are one
    model, source = net(), net()
    with torch.no_grad():
        source[0].weight.mul_(2)
        source[1].running_mean.mul_(2)
        source[1].running_var.mul_(4).add_(3 * source[1].eps)
    quantized = learn(model, recipe="rtn", iterations=0)
    pull = source_weights(source, quantized, calibration_calls(CALIBRATION))
    folded = copy.deepcopy(model)
    fold_batchnorm(folded, lambda m: m(CALIBRATION))
    for name in ("0", "3", "6", "9"):
        torch.testing.assert_close(pull[name], folded.get_submodule(name).weight)


def test_source_of_another_shape_lists_its_layers():
    other = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 9, 1)).eval()
    with pytest.raises(
        ValueError, match=r"source must have the layers of model, got others: 3 \(\(12, 12, 3, 3\), got \(9"
    ) as e:
        learn(source=other, distance=5e-2)
    assert "9 ((6, 256), got missing)" in str(e.value)


@pytest.mark.parametrize("source", [None, nn.Linear(2, 2).eval()])
def test_no_source_is_read_where_no_weight_is_learned(source):
    model = net()
    quantized = learn(model, recipe="hdrq", source=source, distance=5e-2, learns="activations", iterations=8)
    nearest = learn(model, recipe="rtn", iterations=0)
    scales = [torch.cat([q.scale.detach() for q in input_quantizers(m).values()]) for m in (quantized, nearest)]
    assert not torch.equal(*scales)
    codes = [[x.weight_quantizer.codes(x.latent) for x in quantized_layers(m).values()] for m in (quantized, nearest)]
    assert all(map(torch.equal, *codes))
