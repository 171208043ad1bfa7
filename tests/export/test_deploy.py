"""The deploy form: the same bits from weights that stay packed integers."""

import copy
import io
import pickle

import pytest
import torch
from architectures import MODELS, built, output
from helpers import assert_same_bits
from torch import nn

import hdrq
from hdrq import ops
from hdrq.export import deploy
from hdrq.export.deployed import PackedWeight
from hdrq.quantizers.layers import quantized_layers

X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randint(20, (6, 5), generator=torch.Generator().manual_seed(0))


def net(seed=0):
    torch.manual_seed(seed)
    layers = nn.Conv2d(3, 6, 3), nn.ReLU(), nn.ConvTranspose2d(6, 4, 2, 2), nn.Flatten(), nn.Linear(576, 5)
    return nn.Sequential(*layers).eval()


def quantized(bits="W4A4", seed=0, **options):
    return hdrq.quantize(net(seed), X, "rtn", bits=bits, progress=False, **options)


def held(model):
    """What a model holds, each tensor once."""
    return {id(t): t for t in (*model.parameters(), *model.buffers())}.values()


@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_has_the_same_bits(name):
    model, data = built(name)
    model = hdrq.quantize(model, data, "rtn", bits="W3A4", progress=False, per_channel=True)
    deployed = deploy(model)
    assert_same_bits(output(deployed, data), output(model, data))
    biggest = max(layer.latent.numel() for layer in quantized_layers(model).values())
    assert all(t.numel() < biggest for t in held(deployed) if t.is_floating_point())


OTHERS = [
    {"bits": {"*": "W2A5"}, "per_channel": True, "affine_weights": True},
    {"bits": "W8A8", "affine_weights": True},
    {"bits": {"*": "W12A16"}},
    {"bits": {"*": "W4A8"}, "group_size": 8},
]


@pytest.mark.parametrize("options", OTHERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_grids_and_types(options, dtype):
    model = hdrq.quantize(net().to(dtype), X.to(dtype), "rtn", progress=False, **options)
    with torch.no_grad():
        assert_same_bits(deploy(model)(X.to(dtype)), model(X.to(dtype)))


@pytest.mark.parametrize(("bits", "size"), [(4, 0.5), (5, 1), (8, 1), (12, 2)])
def test_memory_is_what_is_said(bits, size):
    """Codes, biases, a scale for each channel, and a scale for each input."""
    model = quantized({"*": f"W{bits}A8"}, per_channel=True)
    weights = sum(layer.latent.numel() for layer in quantized_layers(model).values())
    assert sum(t.nbytes for t in held(deploy(model))) == size * weights + 4 * (15 + 15 + 3)


def test_the_model_stays_as_it_is():
    model = quantized()
    with torch.no_grad():
        before = model(X)
        deploy(model)
        assert_same_bits(model(X), before)
    assert len(quantized_layers(model)) == 3


def test_it_is_pickled_copied_and_loaded():
    model = quantized(per_channel=True)
    deployed = deploy(model)
    file = io.BytesIO()
    torch.save(deployed, file)
    file.seek(0)
    other = deploy(quantized(per_channel=True, seed=1))
    other.load_state_dict(deployed.state_dict())
    with torch.no_grad():
        want = model(X)
        for same in (pickle.loads(pickle.dumps(deployed)), torch.load(file, weights_only=False), other):
            assert_same_bits(same(X), want)
            assert_same_bits(copy.deepcopy(same)(X), want)
    with pytest.raises(RuntimeError, match=r"0\.quantized_weight\.codes must be int8, got int16"):
        deploy(quantized("W8A8")).load_state_dict(deploy(quantized({"*": "W12A8"})).state_dict())


def test_it_is_exported_and_compiled():
    deployed = deploy(quantized())
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(deployed, (X,), dynamic_shapes=({0: batch},), strict=True)
    compiled = torch.compile(deployed, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for size in (1, 3, 8):
            want = deployed(X[:size])
            assert_same_bits(program.module()(X[:size]), want)
            assert_same_bits(compiled(X[:size]), want)


@pytest.mark.parametrize("columns", [8, 7])
@pytest.mark.parametrize("options", [{}, {"per_channel": True}, {"per_channel": True, "affine_weights": True}])
@pytest.mark.parametrize("bits", ["W3A8", "W8A8"])
def test_an_embedding_reads_its_rows(columns, options, bits, monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, columns, padding_idx=1), nn.Linear(columns, 4))
    model = hdrq.quantize(model.eval(), TOKENS, "rtn", bits={"*": bits}, progress=False, **options)
    deployed, dequantize, shapes = deploy(model), ops.dequantize, []
    monkeypatch.setattr(
        ops, "dequantize", lambda codes, *a, **k: shapes.append(codes.shape) or dequantize(codes, *a, **k)
    )
    with torch.no_grad():
        assert_same_bits(deployed(TOKENS), model(TOKENS))
    assert shapes == [(30, columns), (4, columns)]
    with pytest.raises(IndexError):
        deployed(torch.tensor([20]))


def test_an_embedding_in_groups_reads_its_rows():
    layer = nn.Embedding(20, 8)
    quantizer = hdrq.quantizers.modules.WeightQuantizer(torch.rand(20, 2) + 0.1, -8, 7, group_size=4)
    weight = PackedWeight(quantizer, layer.weight.detach())
    assert_same_bits(weight.rows(TOKENS), weight()[TOKENS])


def test_tied_weights_are_held_once():
    model, data = built("language")
    model = hdrq.quantize(model, data, "rtn", bits="W8A8", progress=False)
    deployed = deploy(model)
    assert deployed.head.quantized_weight is deployed.embedding.quantized_weight
    again = pickle.loads(pickle.dumps(deployed))
    assert again.head.quantized_weight is again.embedding.quantized_weight


def test_a_second_parametrization_stays():
    model = quantized()
    nn.utils.parametrize.register_parametrization(model[0], "bias", nn.Tanh())
    with torch.no_grad():
        assert_same_bits(deploy(model)(X), model(X))


def test_a_merged_and_loaded_model(tmp_path):
    merged = hdrq.merge([quantized(), quantized(seed=1)])
    hdrq.save(merged, tmp_path / "m.safetensors")
    with torch.no_grad():
        assert_same_bits(deploy(hdrq.load(tmp_path / "m.safetensors", net()))(X), merged(X))


def noisy():
    model = quantized()
    model[0].input_quantizer.mode = "noise"
    return model


BAD = [
    (net, ValueError, "model must be quantized by hdrq.quantize, got a plain Sequential"),
    (int, TypeError, "model must be a quantized torch.nn.Module, got int"),
    (noisy, ValueError, "quantizers must round to be exported, got mode 'noise' for the input of 0"),
]


@pytest.mark.parametrize(("build", "error", "message"), BAD)
def test_bad_input(build, error, message):
    with pytest.raises(error, match=message):
        deploy(build())
