"""Merging whole models: layer by layer as the op does, everything else averaged."""

import pytest
import torch
from helpers import same, state
from networks import SAMPLES, Mergeable, mergeable, quantized

import hdrq
from hdrq.evaluate.averaging import average
from hdrq.quantizers.layers import input_quantizers, quantized_layers


@pytest.mark.parametrize("count, weights, noise", [(2, None, "all"), (2, None, "odd"), (3, (0.5, 0.3, 0.2), "all")])
def test_layers_are_merged_by_the_op(models, count, weights, noise):
    merged = hdrq.merge(models[:count], weights=weights, draws=4, seed=7, noise=noise)
    inputs = [quantized_layers(model) for model in models[:count]]
    for i, (name, layer) in enumerate(quantized_layers(merged).items()):
        parts = [each[name] for each in inputs]
        quantizer = layer.weight_quantizer
        want = hdrq.ops.merge(
            [t.weight_quantizer.codes(t.latent) for t in parts],
            [t.weight_quantizer.scale for t in parts],
            quantizer.qmin,
            quantizer.qmax,
            hdrq.rng_state(7, stream=64 * i),
            weights=weights,
            draws=4,
            noise=noise,
        )
        assert torch.equal(quantizer.codes(layer.latent), want.codes)
        assert torch.equal(quantizer.scale, want.scale)
        assert torch.equal(layer.module.weight, quantizer.values(want.codes))


def test_everything_else_is_averaged(models):
    weights = (0.5, 0.3, 0.2)
    merged = hdrq.merge(models, weights=weights)
    layers, scales = quantized_layers(merged), input_quantizers(merged)
    assert list(scales) == ["a", "b", "head"]
    for name, value in merged.state_dict().items():
        if "parametrizations" in name or not value.is_floating_point():
            continue
        exact = sum(w * model.state_dict()[name].double() for w, model in zip(weights, models, strict=True))
        torch.testing.assert_close(value.double(), exact, rtol=1e-6, atol=1e-7)
    assert not torch.equal(merged.gain, models[0].gain) and not torch.equal(merged.a.bias, models[0].a.bias)
    assert not torch.equal(merged.norm.running_mean, models[0].norm.running_mean)
    exact = sum(w * quantized_layers(m)["b"].weight_quantizer.scale for w, m in zip(weights, models, strict=True))
    torch.testing.assert_close(layers["b"].weight_quantizer.scale, exact)
    assert torch.equal(merged.table, torch.arange(16))


def test_models_given_are_left_as_they_were(models):
    before = [state(model) for model in models]
    hdrq.merge(models)
    assert all(same(state(model), kept) for model, kept in zip(models, before, strict=True))


def test_merge_is_finished_and_near_the_midpoint(models):
    merged = hdrq.merge(models)
    assert type(merged) is Mergeable and not merged.training and not any(p.requires_grad for p in merged.parameters())
    for name, layer in quantized_layers(merged).items():
        middle = sum(quantized_layers(m)[name].latent for m in models) / 3
        step = layer.weight_quantizer.scale
        inside = middle.abs() < 0.8 * step * layer.weight_quantizer.qmax
        assert ((layer.latent - middle).abs()[inside] <= 1.001 * step).all()  # half a step of noise, half of rounding


def test_identical_models_merge_to_themselves(models):
    assert same(state(hdrq.merge([models[0]] * 2, noise="none", draws=1)), state(models[0]))
    assert same(state(hdrq.merge([models[0]] * 2, noise="odd")), state(models[0]))  # the sums are even


def test_seed_decides_every_bit(models):
    first, second, other = (state(hdrq.merge(models, draws=2, seed=seed)) for seed in (1, 1, 2))
    assert same(first, second) and not same(first, other)
    quiet = [state(hdrq.merge(models, noise="none", seed=seed)) for seed in (1, 2)]
    assert same(*quiet)


def test_all_weight_on_one_model_is_that_model(models):
    merged, kept = state(hdrq.merge(models, weights=(0, 1, 0), noise="none")), state(models[1])
    count = "norm.num_batches_tracked"  # nothing reads it: the first model's
    assert merged.pop(count) != kept.pop(count) and same(merged, kept)


def test_merged_models_merge_and_are_remembered(models):
    merged = hdrq.merge([hdrq.merge(models[:2], seed=1), models[2]], weights=(2 / 3, 1 / 3))
    assert merged(SAMPLES).isfinite().all()
    assert [set(origin) for origin in merged.hdrq_origin["models"]] == [
        {"contract", "folded", "merge", "models", "coverage"},
        {"contract", "folded", "recipe", "bits", "seed", "fingerprints", "coverage"},
    ]


def test_sixteen_bit_models():
    models = [quantized(seed, {"*": "W12A8"}) for seed in range(2)]
    merged = hdrq.merge(models)
    layer = quantized_layers(merged)["a"]
    assert layer.weight_quantizer.codes(layer.latent).dtype == torch.int16
    torch.testing.assert_close(layer.latent, average([m.a for m in map(dequantized, models)]).weight, rtol=0, atol=1e-3)


def dequantized(model):
    """A float model with the weights that a quantized one stands for."""
    plain = mergeable(0)
    for name, layer in quantized_layers(model).items():
        plain.get_submodule(name).weight.data.copy_(layer.latent)
    return plain


def test_average_of_floats():
    a, b = mergeable(0), mergeable(1)
    merged = average([a, b], (0.25, 0.75))
    torch.testing.assert_close(merged.a.weight, 0.25 * a.a.weight + 0.75 * b.a.weight)
    with pytest.raises(ValueError, match=r"number of models must be in \[1, 64\], got 0"):
        average([])


def test_models_must_be_quantized_modules(models):
    with pytest.raises(ValueError, match=r"number of models must be in \[2, 64\], got 1"):
        hdrq.merge(models[:1])
    with pytest.raises(TypeError, match=r"models must be torch.nn.Modules, got str as number 1"):
        hdrq.merge([models[0], "b.safetensors"])
    with pytest.raises(ValueError, match=r"models must be results of hdrq.quantize, got a plain Mergeable as number 1"):
        hdrq.merge([models[0], mergeable(1)])
