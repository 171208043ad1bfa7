"""What a learned model is: on its grids, finished, and apart from the models that were given."""

import copy

import torch
from helpers import same, state
from networks import CALIBRATION, HELD_OUT, learn, net

from hdrq.prepare.folding import fold_batchnorm
from hdrq.quantizers.layers import input_quantizers, quantized_layers


def test_learned_rounding_goes_up_or_down_and_leaves_scales():
    nearest, learned = learn(recipe="rtn", iterations=0), learn(recipe="qdrop", weight_lr=0.1, iterations=30)
    folded = copy.deepcopy(net())
    fold_batchnorm(folded, lambda m: m(CALIBRATION))
    moved = 0
    for name, layer in quantized_layers(learned).items():
        quantizer, before = layer.weight_quantizer, quantized_layers(nearest)[name].weight_quantizer
        assert torch.equal(quantizer.scale, before.scale)
        assert (quantizer.mode, quantizer.alpha, quantizer.beta) == ("round", None, None)
        down = (folded.get_submodule(name).weight / quantizer.scale).floor()
        codes = quantizer.codes(layer.latent)
        up = codes - down.clamp(quantizer.qmin, quantizer.qmax)
        assert ((up == 0) | (up == 1)).all()
        moved += int((codes != quantized_layers(nearest)[name].weight_quantizer.codes(down * before.scale)).sum())
    assert moved > 0


def test_no_iterations_is_round_to_nearest():
    a, b = learn(recipe="rtn", iterations=0), learn(iterations=0, distance=5e-2)
    assert same(state(a), state(b))


def test_weights_lie_on_the_grid():
    model = learn(net())
    for layer in quantized_layers(model).values():
        quantizer = layer.weight_quantizer
        codes = quantizer.codes(layer.latent)
        assert codes.dtype == torch.int8 and quantizer.qmin <= codes.min() and codes.max() <= quantizer.qmax
        assert torch.equal(quantizer.values(codes), layer.latent)
        assert torch.equal(layer.module.weight, layer.latent)


def test_result_is_finished():
    model = learn(net(), activation_lr=10.0)  # steps that would drive scales below zero
    scales = [q.scale for q in model.modules() if hasattr(q, "qmin")]
    assert len(scales) == 8 and all((s > 0).all() for s in scales)
    assert not any(p.requires_grad for p in model.parameters())
    assert all(q.mode == "round" for q in model.modules() if hasattr(q, "qmin"))
    assert all(q.keep == 1.0 for q in input_quantizers(model).values())
    assert torch.equal(model(HELD_OUT), model(HELD_OUT))


def test_model_and_source_given_are_left_as_they_were():
    model, source = net(), net(1)
    before = state(model), state(source)
    learn(model, source=source, distance=5e-2)
    assert same(before[0], state(model)) and same(before[1], state(source))
    assert all(p.requires_grad for p in model.parameters()) and not model[0]._forward_pre_hooks
