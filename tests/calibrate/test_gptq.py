"""Rounding with compensation, against its definition and the error it lowers; second moments, against outputs."""

import pytest
import torch
from networks import data
from torch import nn

import hdrq
from hdrq.calibrate import gptq as gptq_module
from hdrq.calibrate import moments as module
from hdrq.calibrate.data import calibration_calls
from hdrq.calibrate.gptq import gptq
from hdrq.calibrate.moments import MomentsInTurn, second_moments
from hdrq.quantizers.layers import register_layer

INPUTS = data(300, 24, seed=1) @ data(24, 24, seed=2)
H = (INPUTS.T @ INPUTS).double()
W = data(12, 24)
SCALE = W.abs().amax(1) / 7


def values(codes, scale=SCALE, zero_point=0):
    return (codes.double() - zero_point) * scale.double().reshape(-1, 1)


def error(codes, weight=W, **grid):
    change = weight.double() - values(codes, **grid)
    return float((change @ H * change).sum())


def brute(weight, hessian, scale, order, damping=0.01):
    """One column at a time: the error goes to the other columns by the inverse of what is left of H."""
    w, codes = weight.double().clone(), torch.zeros(weight.shape)
    h, left = hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian)).double(), list(order)
    while left:
        j, inverse = left[0], torch.linalg.inv(h[left][:, left])
        codes[:, j] = (w[:, j] / scale.double()).round().clamp(-8, 7)
        moved = (w[:, j] - codes[:, j].double() * scale.double()) / inverse[0, 0]
        w[:, left] -= moved[:, None] * inverse[0]
        left = left[1:]
    return codes.to(torch.int8)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("block", [1, 7, 128])
def test_codes_are_those_of_the_definition(block, act_order):
    order = H.diagonal().argsort(descending=True).tolist() if act_order else range(24)
    found = gptq(W, H, SCALE, -8, 7, block=block, act_order=act_order)
    assert torch.equal(found.codes, brute(W, H, SCALE, order)) and found[1:] == (0, False)


def test_independent_inputs_are_rounded_to_nearest():
    want = hdrq.ops.quantize(W, SCALE, -8, 7, axis=0)
    assert torch.equal(gptq(W, torch.eye(24), SCALE, -8, 7).codes, want)
    assert error(gptq(W, H, SCALE, -8, 7).codes) < 0.7 * error(want)


def test_a_power_of_two_moves_no_code_and_blocks_only_round_off():
    hessian, weight = H.clone(), data(40, 24, seed=5)
    hessian[3], hessian[:, 3] = 0, 0
    scale = weight.abs().amax(1) / 7
    found = gptq(weight, hessian, scale, -8, 7).codes
    for power in (-61, -3, 1, 2, 40):
        assert torch.equal(gptq(weight, hessian * 2.0**power, scale, -8, 7).codes, found)
    for power in (-30, 1, 30):
        one = gptq(weight, torch.eye(24) * 2.0**power, scale, -8, 7).codes
        assert torch.equal(one, hdrq.ops.quantize(weight, scale, -8, 7, axis=0))


def test_panels_and_recursions_are_joined_rightly(monkeypatch):
    want = gptq(W, H, SCALE, -8, 7, block=3)
    for name, size in (("PANEL", 5), ("TOGETHER", 7)):
        monkeypatch.setattr(gptq_module, name, size)
    assert torch.equal(gptq(W, H, SCALE, -8, 7, block=2).codes, want.codes)


def test_groups_and_zero_points_are_where_the_columns_are():
    scale, zero = W.view(12, 3, 8).abs().amax(2) / 6, torch.arange(36).view(12, 3).remainder(5).float()
    wide, shift = scale.repeat_interleave(8, 1), zero.repeat_interleave(8, 1)
    for act_order in (False, True):
        grouped = gptq(W, H, scale, 0, 15, zero_point=zero, act_order=act_order).codes
        assert torch.equal(grouped, gptq(W, H, wide, 0, 15, zero_point=shift, act_order=act_order).codes)
    nearest = gptq(W, torch.eye(24), scale, 0, 15, zero_point=zero).codes
    assert torch.equal(nearest, ((W / wide).round() + shift).clamp(0, 15).to(torch.int8))
    assert grouped.min() == 0 and grouped.max() > 7


def test_dead_columns_are_counted():
    hessian = H.clone()
    hessian[3], hessian[:, 3] = 0, 0
    zeroed, rounded = (gptq(W, hessian, SCALE, -8, 7, zero_dead=zero) for zero in (True, False))
    assert zeroed.dead == rounded.dead == 1 and not zeroed.codes[:, 3].any()
    assert torch.equal(rounded.codes[:, 3], hdrq.ops.quantize(W, SCALE, -8, 7, axis=0)[:, 3])


def test_a_hessian_without_a_factor_falls_back_to_nearest_and_says_so():
    found = gptq(W, -H, SCALE, -8, 7)
    assert found.fell_back and torch.equal(found.codes, hdrq.ops.quantize(W, SCALE, -8, 7, axis=0))
    ones = torch.ones(24, 24, dtype=torch.float64)
    assert not gptq(W, ones, SCALE, -8, 7).fell_back and gptq(W, ones, SCALE, -8, 7, damping=0.0).fell_back


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hessian": torch.eye(23)}, r"hessian must have the shape \(24, 24\), given this weight, got \(23, 23\)"),
        ({"hessian": torch.full((24, 24), torch.nan)}, "hessian must be finite, got 576"),
        ({"weight": data(3, 4, 24)}, "weight must have two axes, outputs and inputs, got the shape"),
        (
            {"scale": torch.ones(12, 5)},
            r"scale must be \(1 or 12, G\), G dividing 24, given this weight, got \(12, 5\)",
        ),
        ({"scale": -SCALE}, "scale must be positive, got -"),
        ({"damping": -1.0}, "damping must be finite and in"),
        ({"block": 0}, "block must be in"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        gptq(**{"weight": W, "hessian": H, "scale": SCALE, "qmin": -8, "qmax": 7, **change})


class Swapped(nn.Linear):
    """A layer that does more than its class."""

    def forward(self, x):
        return super().forward(x.flip(-1))


GROUPED = {"stride": 2, "padding": 1, "dilation": 2, "groups": 2, "padding_mode": "reflect"}
LAYERS = {
    "linear": (nn.Linear(6, 4, bias=False), data(2, 5, 6)),
    "groups": (nn.Conv2d(6, 8, 3, bias=False, **GROUPED), data(5, 6, 9, 9)),
    "depthwise": (nn.Conv3d(4, 8, 3, groups=4, bias=False), data(2, 4, 5, 5, 5)),
    "same": (nn.Conv1d(6, 8, (3,), padding="same", bias=False), data(5, 6, 9)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_moments_say_how_large_the_outputs_are(name, monkeypatch):
    layer, x = LAYERS[name]
    monkeypatch.setattr(module, "AT_ONCE", 50)  # in parts
    moments = second_moments(nn.Sequential(layer), calibration_calls(x), ["0"])["0"]
    weight = layer.weight.detach().double()
    matrices = moments.matrices(weight)
    energy = (matrices @ moments.hessian * matrices).sum()
    torch.testing.assert_close(energy, layer(x).detach().double().square().sum(), rtol=1e-5, atol=0)
    assert torch.equal(moments.weight(matrices, weight.shape), weight)
    assert moments.rows * len(weight) == layer(x).numel()


def test_moments_of_gpt2s_layer_whose_inputs_lie_along_the_first_axis():
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    layer, x = pytorch_utils.Conv1D(3, 5), data(7, 5)
    moments = second_moments(nn.Sequential(layer), calibration_calls(x), ["0"])["0"]
    matrices = moments.matrices(layer.weight.detach().double())
    energy = (x @ layer.weight.detach()).double().square().sum()
    torch.testing.assert_close((matrices @ moments.hessian * matrices).sum(), energy, rtol=1e-5, atol=0)
    assert torch.equal(moments.weight(matrices, (5, 3)), layer.weight.double())


def test_layers_whose_rows_are_unknown_have_no_moments():
    register_layer(Swapped)
    model = nn.Sequential(Swapped(4, 4), nn.Linear(4, 4), nn.ConvTranspose1d(2, 2, 1)).eval()
    model.idle = nn.Linear(4, 4)
    model.forward = lambda x: model[1](model[0](x))
    found = second_moments(model, calibration_calls(data(9, 4)), ["0", "1", "2", "idle"])
    assert list(found) == ["1"]


def test_inputs_are_taken_as_the_weight_meets_them():
    model = hdrq.quantize(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2)).eval(), data(64, 6), "rtn")
    moments = second_moments(model, calibration_calls(data(64, 6)), ["0"])["0"]
    x = model[0].input_quantizer(data(64, 6)).double()
    torch.testing.assert_close(moments.hessian[0], x.T @ x)
    assert not torch.allclose(moments.hessian[0], (data(64, 6).T @ data(64, 6)).double(), rtol=1e-4)


def test_moments_are_gathered_in_parts_that_fit(monkeypatch):
    model, calls = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5))).eval(), calibration_calls(data(9, 4))
    runs = []
    model.register_forward_hook(lambda *_: runs.append(1))
    names = list("01234")
    whole = second_moments(model, calls, names)
    runs.clear()
    monkeypatch.setattr(module, "TOGETHER", 40)
    parts = MomentsInTurn(model, calls, names)
    for name in names:
        assert torch.equal(parts.of(name).hessian, whole[name].hessian)
    assert len(runs) == 3
