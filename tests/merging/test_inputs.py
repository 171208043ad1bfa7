"""What is read from models to merge: broken tensors are refused by name, and masks stay."""

import copy
import math

import pytest
import torch
from networks import quantized

import hdrq
from hdrq.merging.files import merge_files, readiness


def changed(model, name, value):
    """A copy of a quantized model in which the first number of one tensor is another."""
    other = copy.deepcopy(model)
    tensor = other.state_dict()[name]
    tensor.view(-1)[0] = value
    return other


@pytest.mark.parametrize(
    "name, value, stated",
    [
        ("gain", math.nan, "gain must be finite to be merged, got 1 of 6 elements not, such as nan"),
        ("norm.running_var", math.inf, "norm.running_var must be finite"),
        ("a.bias", -math.inf, "a.bias must be finite"),
        ("b.input_quantizer.scale", math.nan, "b.input.scale must be "),
    ],
)
def test_a_broken_tensor_is_refused_by_its_name(models, tmp_path, name, value, stated):
    pair = [models[0], changed(models[1], name, value)]
    with pytest.raises(ValueError, match=stated) as refusal:
        hdrq.merge(pair)
    assert "number 1" in str(refusal.value)
    with pytest.raises(ValueError, match=stated):
        readiness(pair)
    files = [tmp_path / "first", tmp_path / "second"]
    for model, path in zip(pair, files, strict=True):
        hdrq.save(model, path)
    for call in (lambda: merge_files(files, tmp_path / "merged"), lambda: readiness(files)):
        with pytest.raises(ValueError, match=stated) as refusal:
            call()
        assert str(files[1]) in str(refusal.value)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("name, value", [("original", math.nan), ("0.scale", math.nan)])
def test_a_broken_weight_is_refused_by_its_name(models, name, value):
    broken = changed(models[1], f"b.parametrizations.weight.{name}", value)
    with pytest.raises(ValueError, match=r"^b\.weight.* must .* in number 1$"):
        hdrq.merge([models[0], broken])


def test_a_scale_that_is_not_finite_names_its_file(models, tmp_path):
    broken = changed(models[1], "b.input_quantizer.scale", math.inf)
    files = [tmp_path / "first", tmp_path / "second"]
    for model, path in zip((models[0], broken), files, strict=True):
        hdrq.save(model, path)
    with pytest.raises(ValueError, match=r"b\.input\.scale must be .*second"):
        merge_files(files, tmp_path / "merged")


@pytest.mark.parametrize("weights, extrapolate", [(None, False), ((1.5, -0.5), True)])
def test_minus_infinity_that_all_models_hold_stays(models, tmp_path, weights, extrapolate):
    masked = [changed(model, "gain", -math.inf) for model in models[:2]]
    merged = hdrq.merge(masked, weights=weights, extrapolate=extrapolate)
    assert merged.gain.flatten()[0] == -math.inf and merged.gain.flatten()[1:].isfinite().all()
    readiness(masked)
    for value in (math.inf, math.nan):
        with pytest.raises(ValueError, match="gain must be finite"):
            hdrq.merge([changed(model, "gain", value) for model in models[:2]])


def test_a_model_of_weight_zero_may_hold_anything(models):
    merged = hdrq.merge([models[0], changed(models[1], "gain", math.nan)], weights=(1.0, 0.0))
    assert torch.equal(merged.gain, models[0].gain)


def test_a_mean_too_large_for_its_dtype_is_refused():
    models = [quantized(seed) for seed in range(2)]
    for model, size in zip(models, (1.0, -1.0), strict=True):
        model.gain.data.fill_(size * 3e38)
    with pytest.raises(ValueError, match=r"mean of gain must fit torch.float32"):
        hdrq.merge(models, weights=(1.5, -0.5), extrapolate=True)
