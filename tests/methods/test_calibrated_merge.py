"""Merges of integers that are rounded for a few samples of each task."""

import pytest
import torch
from helpers import same, state
from networks import CALIBRATION, TASKS, deviation, net, relative
from torch import nn

import hdrq
from hdrq.checkpoint.history import history
from hdrq.methods.calibrated_merge import merge_calibrated
from hdrq.quantizers.layers import quantized_layers
from hdrq.report import report_of


@pytest.fixture(scope="module")
def models():
    return [relative(k, "W4A16") for k in range(2)]


def test_a_few_samples_of_each_task_are_worth_having(models):
    before = [state(m) for m in models]
    plain = hdrq.merge(models, rule="half-even")
    mean, guided = (merge_calibrated(models, TASKS, target=t, progress=False) for t in ("mean", "experts"))
    assert deviation(guided, models) < 0.9 * deviation(mean, models)
    assert deviation(guided, models) < 0.9 * deviation(plain, models)
    layers = [layer for block in report_of(mean).blocks for layer in block.layers]
    assert sum(layer.error for layer in layers) < 0.7 * sum(layer.nearest for layer in layers)
    for name, layer in quantized_layers(mean).items():
        assert torch.equal(layer.weight_quantizer.scale, quantized_layers(plain)[name].weight_quantizer.scale)
    assert all(same(state(m), s) for m, s in zip(models, before, strict=True))


def test_equal_models_give_that_model(models):
    for target in ("mean", "experts"):
        found = merge_calibrated([models[0]] * 2, [TASKS[0]] * 2, target=target, bias="keep", progress=False)
        for name, layer in quantized_layers(found).items():
            assert torch.equal(layer.latent, quantized_layers(models[0])[name].latent), name


def test_a_strong_anchor_is_the_mean_rounded_to_nearest(models):
    found = merge_calibrated(models, TASKS, lam=1e9, bias="keep", progress=False)
    plain = hdrq.merge(models, rule="half-even")
    for name, layer in quantized_layers(found).items():
        codes = [layer.weight_quantizer.codes(each[name].latent) for each in map(quantized_layers, (found, plain))]
        assert (codes[0] != codes[1]).float().mean() < 0.01  # the merge rounds a mean in float32


def test_the_file_says_how_and_loads(models, tmp_path):
    found = merge_calibrated(models, TASKS, progress=False)
    hdrq.save(found, tmp_path / "m.safetensors")
    loaded = hdrq.load(tmp_path / "m.safetensors", net())
    assert torch.equal(loaded(CALIBRATION), found(CALIBRATION))
    from hdrq.quantizers.provenance import origin

    assert origin(loaded)["calibrated"]["target"] == "experts" and origin(loaded)["calibrated"]["lam"] == 0.01
    told = list(history(origin(loaded)).lines())
    assert "target experts" in told[0] and len(told) == 3 and "quantized" in told[1]


def test_bad_arguments_are_refused(models):
    for change, message in (
        ({"target": "max"}, "target must be one of"),
        ({"lam": -1.0}, "lam must be finite and in"),
        ({"calibration": TASKS[:1]}, "calibration must be as many data as the models, 2, got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            merge_calibrated(models, **{"calibration": TASKS, **change})
    with pytest.raises(ValueError, match=r"must be results of hdrq\.quantize"):
        merge_calibrated([nn.Sequential(nn.Flatten(), nn.Linear(192, 2)).eval()] * 2, TASKS)
