"""Weights with zero points: searched, learned, saved, merged."""

import pytest
import torch
from helpers import merged_content
from networks import HELD_OUT, learn, net

import hdrq
from hdrq.checkpoint.format import Reader
from hdrq.merging.files import merge_files
from hdrq.methods.post_training import fold
from hdrq.quantizers.layers import quantized_layers

RTN = {"recipe": "rtn", "iterations": 0, "bits": {"*": "W3A8"}, "per_channel": True}


def skewed(seed=0):
    """A model whose weights are mostly positive in some channels, and mostly negative in others."""
    model = net(seed)
    with torch.no_grad():
        for layer in (model[0], model[3], model[6]):
            layer.weight.copy_(
                layer.weight.abs() * torch.where(torch.arange(len(layer.weight)) % 2 > 0, -1, 1).view(-1, 1, 1, 1)
            )
    return model


def test_skewed_weights_are_nearer_with_zero_points():
    model = skewed()
    full = fold(model, HELD_OUT)
    errors = []
    for affine in (False, True):
        layers = quantized_layers(learn(model, **RTN, affine_weights=affine))
        errors.append([float((layer.latent - full.get_submodule(n).weight).norm()) for n, layer in layers.items()])
    assert all(with_zero < 0.7 * without for without, with_zero in zip(*(e[:3] for e in errors), strict=True))


@pytest.mark.parametrize("recipe", ["rtn", "qdrop"])
def test_weights_lie_on_the_affine_grid(recipe):
    options = RTN | ({} if recipe == "rtn" else {"recipe": recipe, "iterations": 20, "weight_lr": 1e-2})
    for layer in quantized_layers(learn(skewed(), **options, affine_weights=True)).values():
        quantizer = layer.weight_quantizer
        zero, codes = quantizer.zero_point, quantizer.codes(layer.latent)
        assert zero.shape == quantizer.scale.shape and torch.equal(zero, zero.round()) and zero.any()
        shape = (-1, *[1] * (codes.ndim - 1))
        assert torch.equal((codes.float() - zero.view(shape)) * quantizer.scale.view(shape), layer.latent)
        assert quantizer.qmin <= codes.min() and codes.max() <= quantizer.qmax


def test_files_hold_and_merge_zero_points(tmp_path):
    models = [learn(skewed(seed), **RTN, affine_weights=True) for seed in (0, 1)]
    paths = [tmp_path / str(k) for k in range(2)]
    for model, path in zip(models, paths, strict=True):
        hdrq.save(model, path)
        loaded = hdrq.load(path, net())
        assert torch.equal(loaded(HELD_OUT), model(HELD_OUT))
    with Reader(paths[0]) as file:
        assert file.manifest["weights"]["0"]["affine"] and file.specs["0.weight.zero_point"] == (torch.int32, (12,))
    merge_files(paths, tmp_path / "merged", seed=1)
    merged = hdrq.merge(models, seed=1)
    hdrq.save(merged, tmp_path / "saved")
    assert merged_content(tmp_path / "merged") == merged_content(tmp_path / "saved")
    for name, layer in quantized_layers(merged).items():
        first, second = (quantized_layers(model)[name] for model in models)
        step = layer.weight_quantizer.scale.view(-1, *[1] * (layer.latent.ndim - 1))
        away = (layer.latent - (first.latent + second.latent) / 2).abs() / step
        inside = away < 1.0 + 1e-4
        assert inside.float().mean() > 0.98  # what the merged range cannot hold is clamped


def test_a_rule_merges_them_too():
    models = [learn(skewed(seed), **RTN, affine_weights=True) for seed in (0, 0)]
    for rule in ("half-even", "half-up", "half-away"):
        merged = hdrq.merge(models, rule=rule)
        assert torch.equal(merged(HELD_OUT), models[0](HELD_OUT))


def test_one_with_zero_points_is_not_merged_with_one_without(tmp_path):
    models = [learn(skewed(), **RTN, affine_weights=affine) for affine in (True, False)]
    with pytest.raises(ValueError, match=r"models must be alike to be merged, got 0.weight.zero_point"):
        hdrq.merge(models)


def test_noise_knows_no_zero_point():
    with pytest.raises(ValueError, match='affine_weights must be False where learns="weights", whose noise knows no'):
        learn(affine_weights=True)
