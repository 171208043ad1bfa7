"""What is learned is well below round to nearest: in each recipe, in half types, with biases."""

import pytest
import torch
from networks import CALIBRATION, HELD_OUT, error, learn, net
from torch import nn

from hdrq.methods.post_training import fold
from hdrq.quantizers.layers import quantized_layers


@pytest.mark.parametrize("preset", ["paper", "official"])
def test_learned_is_well_below_round_to_nearest(preset):
    model = net()
    nearest = error(learn(model, recipe="rtn", iterations=0, bits="W2A4"), model)
    learned = error(learn(model, preset=preset, iterations=50, weight_lr=1e-3, bits="W2A4"), model)

    assert learned < 0.5 * nearest


@pytest.mark.parametrize("recipe", ["brecq", "qdrop"])
def test_learned_rounding_is_well_below_round_to_nearest(recipe):
    model = net()
    nearest = error(learn(model, recipe="rtn", iterations=0, bits="W2A4"), model)
    options = {"recipe": recipe, "weight_lr": 3e-2, "iterations": 50, "bits": "W2A4"}
    assert error(learn(model, **options), model) < 0.5 * nearest


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("recipe", ["hdrq", "qdrop"])
def test_half_precision_is_learned_in_float32(dtype, recipe, every_step_kept):
    model = net().to(dtype)
    nearest = learn(model, CALIBRATION.to(dtype), recipe="rtn", iterations=0, bits="W2A4")
    knobs = {"weight_lr": 3e-2, "iterations": 60} if recipe == "qdrop" else {"bias_lr": 1e-4, "iterations": 40}
    result = learn(model, CALIBRATION.to(dtype), recipe=recipe, bits="W2A4", **knobs)
    full = fold(model, CALIBRATION.to(dtype))
    for layer in quantized_layers(result).values():
        quantizer = layer.weight_quantizer
        bias = layer.module.bias
        assert bias.dtype == dtype and type(bias) is nn.Parameter and not bias.requires_grad
        assert torch.equal(bias, full.get_submodule(layer.name).bias) == (recipe == "qdrop")
        assert layer.latent.dtype == layer.module.weight.dtype == dtype and quantizer.scale.dtype == torch.float32
        assert torch.equal(quantizer.values(quantizer.codes(layer.latent)).to(dtype), layer.latent)
    want = model(HELD_OUT.to(dtype)).float().detach()
    errors = [float((m(HELD_OUT.to(dtype)).float() - want).square().mean()) for m in (nearest, result)]
    assert errors[1] < 0.6 * errors[0]


@pytest.mark.parametrize("recipe", ["hdrq", "brecq"])
def test_biases_are_learned_where_asked_for(recipe, every_step_kept):
    """The mean that coarse weights shift comes back: the loss falls further; without a rate no bias moves."""
    model = net()
    full = fold(model, CALIBRATION)
    how = {"recipe": recipe, "iterations": 20, "weight_lr": 1e-3, "bits": "W2A8"}
    stays, learns = (learn(model, bias_lr=rate, **how) for rate in (0.0, 1e-2))
    for result, moved in ((stays, False), (learns, True)):
        for name, layer in quantized_layers(result).items():
            assert torch.equal(layer.module.bias, full.get_submodule(name).bias) != moved
    assert error(learns, model) < 0.95 * error(stays, model)
