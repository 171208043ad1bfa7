"""What `quantize` refuses before it learns."""

import copy

import pytest
import torch
from networks import CALIBRATION, HELD_OUT, Checkpointed, learn, net
from torch import nn


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"bits": "4"}, ValueError, "bits must be written like \"W4A4\", got '4'"),
        ({"bits": "W1A4"}, ValueError, r"weight bits must be in \[2, 16\], got 1"),
        ({"bits": "W17A4"}, ValueError, r"weight bits must be in \[2, 16\], got 17"),
        ({"bits": 4}, TypeError, "bits must be a string .* got int"),
        ({"seed": -1}, ValueError, r"seed must be in \[0, 9223372036854775807\], got -1"),
        ({"seed": 2**63}, ValueError, "seed must be in"),
        ({"seed": 0.5}, TypeError, "seed must be an int, got float"),
        ({"recipe": "adaround"}, ValueError, "recipe must be one of .*'hdrq'.*, got 'adaround'"),
        ({"preset": "mine"}, ValueError, "preset must be one of 'paper', 'official', got 'mine'"),
        ({"weight_rl": 1e-3}, ValueError, "knob must be one of .*'weight_lr'.*, got 'weight_rl'"),
        ({"recipe": "rtn"}, ValueError, 'iterations must be 0 for recipe "rtn", got 6'),
        (
            {"recipe": "qdrop", "fake_quant_fraction": 0.5},
            ValueError,
            'fake_quant_fraction must be 1 and distance 0 where learns="rounding"',
        ),
        ({"learns": "bits"}, ValueError, "learns must be one of 'weights', 'rounding', 'activations', got 'bits'"),
        ({"beta_end": 0.5}, ValueError, "beta_end must be finite and in"),
        ({"checkpoint_every": -1}, ValueError, "checkpoint_every must be in"),
        ({"held_out": CALIBRATION[:0]}, ValueError, "held_out must have at least one sample, got none"),
        ({"calibration": [CALIBRATION, CALIBRATION[:, :, 1:]]}, ValueError, "samples of one shape, got .* in batch 1"),
        ({"fake_quant_fraction": 1.5}, ValueError, r"fake_quant_fraction must be finite and in \[0, 1\], got 1.5"),
        ({"weight_lr": float("nan")}, ValueError, "weight_lr must be finite"),
        ({"iterations": -1}, ValueError, "iterations must be in"),
        ({"iterations": 2.0}, TypeError, "iterations must be an int, got float"),
        ({"per_channel": "no"}, ValueError, "per_channel must be one of False, True, got 'no'"),
        ({"distance": 5e-2}, ValueError, "source must be the model before its adaptation where distance > 0, got None"),
        ({"distance": 5e-2, "source": "net"}, TypeError, "source must be a torch.nn.Module, got str"),
        ({"distance": 5e-2, "source": net().train()}, ValueError, "source must be in evaluation mode"),
        ({"model": net().train()}, ValueError, "model must be in evaluation mode, got training mode"),
        ({"model": "net"}, TypeError, "model must be a torch.nn.Module, got str"),
        ({"calibration": None}, TypeError, "calibration must be a tensor or an iterable of batches, got NoneType"),
        ({"calibration": []}, ValueError, "calibration must have at least one sample, got none"),
        ({"calibration": CALIBRATION[:0]}, ValueError, "calibration must have at least one sample, got none"),
        ({"calibration": torch.tensor(1.0)}, ValueError, "samples along the first axis, got a scalar in batch 0"),
        ({"calibration": [CALIBRATION, (1.0,)]}, ValueError, "finite tensors, got a batch without a tensor in batch 1"),
        ({"calibration": [CALIBRATION / 0]}, ValueError, "finite tensors, got NaN or infinity in batch 0"),
    ],
)
def test_bad_input_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        learn(**options)


def test_nan_in_the_last_batch_is_found():
    broken = CALIBRATION.clone()
    broken[-1, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="got NaN or infinity in batch 1"):
        learn(calibration=[CALIBRATION, broken])


def test_quantized_model_is_not_quantized_again():
    with pytest.raises(ValueError, match="model must have plain weights, got a parametrized one"):
        learn(learn(recipe="rtn", iterations=0))


def test_one_sample_is_quantized_with_a_warning():
    with pytest.warns(UserWarning, match="calibration has one sample"):
        model = learn(calibration=CALIBRATION[:1])
    assert model(HELD_OUT).isfinite().all()


def without_gradient(run, x):
    with torch.no_grad():
        return run(x)


def in_inference_mode(run, x):
    with torch.inference_mode():
        return run(x)


@pytest.mark.parametrize("wrap", [without_gradient, in_inference_mode])
def test_a_block_without_gradient_is_refused_by_name(wrap):
    data = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(Checkpointed(wrap), Checkpointed(wrap)).eval()
    source = copy.deepcopy(model)
    for options in ({}, {"source": source, "distance": 1.0}):
        with pytest.raises(ValueError, match=r"block 0 must pass a gradient .* got none for 0\.first; 0\.second"):
            learn(model, calibration=data, **options)
