"""The modules that quantize, alone."""

import copy
import io

import pytest
import torch
from networks import SAMPLES, data, quantized
from torch import nn

import hdrq
from hdrq import ops
from hdrq.quantizers.layers import quantized_layers
from hdrq.quantizers.modules import ActivationQuantizer, Quantizer, mean_range


def test_quantizer_modes():
    x = data(500)
    quantizer = Quantizer(torch.tensor([0.1]), -8, 7)
    assert torch.equal(quantizer(x), quantizer.values(quantizer.codes(x)))
    assert quantizer.codes(x).dtype == torch.int8
    quantizer.mode = "noise"
    inside = x.abs() < 0.7
    assert ((quantizer(x) - x)[inside].abs() <= 0.0501).all() and not torch.equal(quantizer(x), x)
    quantizer.mode = "float"
    assert quantizer(x) is x
    quantizer.mode = "off"
    with pytest.raises(ValueError, match="mode must be one of 'float', 'noise', 'round', got 'off'"):
        quantizer(x)


def test_activation_quantizer_leaves_elements_as_they_are():
    x = data(20_000)
    quantizer = ActivationQuantizer(torch.tensor([0.5]), -8, 7)
    rounded = quantizer(x)
    quantizer.keep = 0.25
    mixed = quantizer(x)
    kept = mixed == rounded
    assert torch.equal(torch.where(kept, rounded, x), mixed)
    assert 0.23 < kept.float().mean() < 0.27


def reloaded(state):
    """A state dict that went through a file."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("bits", ["W4A4", "W8A6", {"*": "W3A8"}])
def test_a_state_dict_holds_the_ranges(bits):
    first, second = quantized(0, bits), quantized(1, "W5A5")
    wanted = first(SAMPLES)
    assert not torch.equal(second(SAMPLES), wanted)
    second.load_state_dict(reloaded(first.state_dict()))
    assert torch.equal(second(SAMPLES), wanted)
    ranges = [[(m.qmin, m.qmax, m.axis) for m in q.modules() if isinstance(m, Quantizer)] for q in (first, second)]
    assert ranges[0] == ranges[1]


def test_a_state_dict_without_the_ranges_is_refused():
    first, second = quantized(0), quantized(1)
    state = {name: value for name, value in first.state_dict().items() if "extra_state" not in name}
    with pytest.raises(RuntimeError, match=r'"a.input_quantizer._extra_state"'):
        second.load_state_dict(state)


@pytest.mark.parametrize("wrong", [[7, -8], [1], [0.5, 2.0], [0, 2**20], None])
def test_a_range_that_is_none_is_refused_by_name(wrong):
    model = quantized(0)
    state = model.state_dict()
    state["b.input_quantizer._extra_state"] = wrong if wrong is None else torch.tensor(wrong)
    with pytest.raises((TypeError, ValueError), match=r"state of b\.input_quantizer: .* must be "):
        model.load_state_dict(state)


def test_the_axis_is_in_the_state():
    quantizer, other = Quantizer(torch.ones(2), -8, 7, axis=-1), Quantizer(torch.ones(2), 0, 3, axis=0)
    other.load_state_dict(quantizer.state_dict())
    assert (other.qmin, other.qmax, other.axis) == (-8, 7, -1)


@pytest.fixture
def counted(monkeypatch):
    """A finished model, and the shapes that the op that fake-quantizes was called with."""
    calls, fake_quantize = [], ops.fake_quantize

    def counting(x, *args, **kwargs):
        calls.append(tuple(x.shape))
        return fake_quantize(x, *args, **kwargs)

    model = quantized(0)
    monkeypatch.setattr(ops, "fake_quantize", counting)
    return model, calls


def weights_among(calls, model):
    shapes = [tuple(layer.latent.shape) for layer in quantized_layers(model).values()]
    found = [shape for shape in calls if shape in shapes]
    calls.clear()
    return len(found)


@torch.no_grad()
def test_a_finished_weight_is_quantized_once(counted):
    model, calls = counted
    wanted = model(SAMPLES)
    count = len(quantized_layers(model))
    assert weights_among(calls, model) == count
    assert torch.equal(model(SAMPLES), wanted) and weights_among(calls, model) == 0
    with torch.inference_mode():
        assert torch.equal(model(SAMPLES), wanted) and weights_among(calls, model) == 0
    with torch.enable_grad():
        assert torch.equal(model(SAMPLES), wanted) and weights_among(calls, model) == count
    model.b.train()
    assert torch.equal(model(SAMPLES), wanted) and weights_among(calls, model) == 1
    model.eval()
    names = model.state_dict().keys()
    assert not any("kept" in name for name in names) and len(names) == len(quantized(0).state_dict())
    other = copy.deepcopy(model)
    calls.clear()
    assert torch.equal(other(SAMPLES), wanted) and weights_among(calls, other) == count
    model.to(torch.float32)
    assert torch.equal(model(SAMPLES), wanted)


CHANGES = {
    "latent in place": lambda layer: layer.latent.mul_(0.5),
    "latent": lambda layer: setattr(layer.latent, "data", layer.latent * 0.5),
    "latent of a state": lambda layer: layer.module.state_dict()["parametrizations.weight.original"].mul_(0.5),
    "scale in place": lambda layer: layer.weight_quantizer.scale.mul_(2),
    "scale": lambda layer: setattr(layer.weight_quantizer.scale, "data", layer.weight_quantizer.scale * 2),
    "range": lambda layer: setattr(layer.weight_quantizer, "qmax", 1),
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_what_is_kept_follows_every_change(change):
    model = quantized(0)
    model(SAMPLES)
    layer = quantized_layers(model)["b"]
    before = layer.module.weight.clone()
    CHANGES[change](layer)
    quantizer = layer.weight_quantizer
    grid = (quantizer.scale, quantizer.qmin, quantizer.qmax)
    wanted = ops.fake_quantize(layer.latent, *grid, axis=quantizer.axis)
    assert torch.equal(layer.module.weight, wanted) and not torch.equal(wanted, before)
    assert torch.equal(layer.module.weight, wanted)


def test_a_learned_scale_has_its_gradient_factor():
    x = data(500)
    gradients = []
    for low, high in ((-8, 7), (-3, 12), (-12, 3)):
        quantizer = Quantizer(torch.tensor([0.1]), low, high)
        quantizer(x).sum().backward()
        scale = quantizer.scale.detach().clone().requires_grad_()
        ops.fake_quantize(x, scale, low, high).sum().backward()
        largest = max(high, -low) if low < -high - 1 else high
        gradients.append((quantizer.scale.grad, scale.grad / (500 * largest) ** 0.5))
    for got, want in gradients:
        torch.testing.assert_close(got, want)


def test_a_finished_model_compiles_once_for_all_batches():
    model = quantized(0)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        for count in (8, 4, 6, 3, 7):
            assert torch.equal(compiled(SAMPLES[:count]), model(SAMPLES[:count]))
    assert len(graphs) <= 2  # the first shape, and one with a dynamic batch


def test_a_finished_model_is_exported_with_a_dynamic_batch():
    model = quantized(0)
    model.norm.eval()
    exported = torch.export.export(model, (SAMPLES[:4],), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    for count in (4, 7):
        torch.testing.assert_close(exported.module()(SAMPLES[:count]), model(SAMPLES[:count]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("affine", [False, True])
def test_a_finished_model_takes_a_half_type_and_keeps_its_codes_and_scales(dtype, affine):
    x, layers = data(120).view(20, 6), (nn.Linear(6, 50), nn.Linear(50, 5))
    model = hdrq.quantize(nn.Sequential(*layers).eval(), x, "rtn", affine_weights=affine)
    half = copy.deepcopy(model).to(dtype)
    for before, after in zip(quantized_layers(model).values(), quantized_layers(half).values(), strict=True):
        assert torch.equal(before.weight_quantizer.scale, after.weight_quantizer.scale)
        codes = [layer.weight_quantizer.codes(layer.latent) for layer in (before, after)]
        assert after.latent.dtype == dtype and torch.equal(*codes)
    got = half(x.to(dtype))
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), model(x), rtol=0, atol=0.05 * float(model(x).abs().max()))


@pytest.mark.parametrize("scale", [torch.inf, 0.0, torch.nan, -3.0])
def test_scales_without_a_positive_finite_mean_are_refused(scale):
    with pytest.raises(ValueError, match="the mean scale of an input must be positive and finite, got"):
        mean_range([0.5, 0.5], [scale, 0.0 if scale == 0 else 1.0], [[0, 15], [0, 15]], 16)
