"""``hdrq.quantize(group_size=…)``: linear layers in groups, every other layer per channel; saved, loaded, merged."""

import pytest
import torch
from helpers import assert_same_bits, merged_content
from torch import nn

import hdrq
from hdrq.checkpoint.format import Reader
from hdrq.merging.files import merge_files
from hdrq.quantizers.layers import quantized_layers

X = torch.randn((24, 3, 4, 4), generator=torch.Generator().manual_seed(0))
OPTIONS = {"bits": {"*": "W4A8"}, "group_size": 8, "progress": False}


def net(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 5)
        return nn.Sequential(*layers).eval()


def quantized(seed=0, recipe="rtn", **options):
    model = net(seed)
    given = {"source": net(seed)} if recipe == "hdrq" else {}
    return hdrq.quantize(model, X, recipe, **OPTIONS, **given, **options)


def test_linear_layers_have_groups_and_convolutions_channels():
    layers = quantized_layers(quantized())
    assert {name: tuple(layer.weight_quantizer.scale.shape) for name, layer in layers.items()} == {
        "0": (6,),
        "3": (16, 3),
        "5": (5, 2),
    }
    weight, quantizer = net()[3].weight.detach(), layers["3"].weight_quantizer
    for row, group in ((0, 0), (15, 2)):
        part = weight[row, 8 * group : 8 * group + 8]
        assert_same_bits(quantizer.scale[row, group], hdrq.ops.search_scale(part, -8, 7)[0])


@pytest.mark.parametrize(("recipe", "options"), [("hdrq", {}), ("qdrop", {}), ("qdrop", {"affine_weights": True})])
def test_reconstruction_learns_with_groups(recipe, options):
    """What is learned lies on the groups' grid at the end, and the learned output is nearer than the nearest."""
    model = quantized(recipe=recipe, iterations=40, weight_lr=1e-3, batch_size=8, judged_samples=0, **options)
    layer = quantized_layers(model)["3"]
    quantizer = layer.weight_quantizer
    assert_same_bits(quantizer.values(quantizer.codes(layer.latent)), layer.latent.detach())
    if recipe == "hdrq":
        start = quantized_layers(quantized())["3"].weight_quantizer.scale
        assert (quantizer.scale != start).any(1).all()  # scales of groups learn

    def error(result):
        return float((result(X) - net()(X)).square().mean())

    with torch.no_grad():
        assert error(model) < error(quantized(**options))


@pytest.mark.parametrize("affine", [False, True])
def test_files_keep_groups(affine, tmp_path):
    model = quantized(affine_weights=affine)
    hdrq.save(model, tmp_path / "q.safetensors")
    with Reader(tmp_path / "q.safetensors") as file:
        assert file.manifest["weights"]["3"]["group_size"] == 8
        assert file.specs["3.weight.scale"] == (torch.float32, (16, 3))
        assert "group_size" not in file.manifest["weights"]["0"]
    loaded = hdrq.load(tmp_path / "q.safetensors", net())
    assert_same_bits(loaded(X), model(X))
    assert "group_size=8" in repr(loaded)
    again = quantized(1, affine_weights=affine)
    again.load_state_dict(model.state_dict())
    assert_same_bits(again(X), model(X))


@pytest.mark.parametrize("rule", ["systematic", "noise", "half-up", "requantize"])
@pytest.mark.parametrize("affine", [False, True])
def test_merged_in_memory_as_in_files(rule, affine, tmp_path):
    models = [quantized(seed, affine_weights=affine) for seed in (0, 1)]
    paths = [tmp_path / f"{k}.safetensors" for k in range(2)]
    for model, path in zip(models, paths, strict=True):
        hdrq.save(model, path)
    options = {"rule": rule, "draws": 3} if rule == "noise" else {"rule": rule}
    merged = hdrq.merge(models, **options)
    report = merge_files(paths, tmp_path / "m.safetensors", report=True, **options)
    hdrq.save(merged, tmp_path / "memory.safetensors")
    assert merged_content(tmp_path / "m.safetensors") == merged_content(tmp_path / "memory.safetensors")
    # The mean lies on no grid, but each weight is within a step of its group (with noise, and zero points that round,
    # of one and a half).
    mean = sum(quantized_layers(m)["3"].latent for m in models) / 2
    layer = quantized_layers(merged)["3"]
    steps = (layer.latent - mean) / layer.weight_quantizer.broadcast(layer.weight_quantizer.scale, mean)
    assert steps.abs().max() <= (1.0 if rule in ("systematic", "half-up") and not affine else 2.0)
    assert report.layers[1].rounding_error < 0.25


def test_models_in_other_groups_are_refused():
    other = hdrq.quantize(net(1), X, "rtn", **OPTIONS | {"group_size": 4})
    with pytest.raises(ValueError, match="3: weight group_size \\(8 in the first, 4 in number 1\\)"):
        hdrq.merge([quantized(), other])


def test_layers_that_groups_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="group_size must divide the 24 inputs of 3, got 16; keep that layer in float"):
        hdrq.quantize(net(), X, "rtn", **OPTIONS | {"group_size": 16})
    with pytest.raises(ValueError, match="group_size must be in"):
        hdrq.quantize(net(), X, "rtn", **OPTIONS | {"group_size": -1})


def test_a_layer_with_its_inputs_elsewhere_is_refused():
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    model = nn.Sequential(conv1d(16, 8)).eval()
    with pytest.raises(ValueError, match="0 must have its inputs along the last axis of its weight for group_size=8"):
        hdrq.quantize(model, torch.randn(8, 8), "rtn", **OPTIONS)


def test_a_damaged_manifest_is_refused(tmp_path):
    from hdrq.checkpoint.format import Writer

    hdrq.save(quantized(), tmp_path / "q.safetensors")
    with Reader(tmp_path / "q.safetensors") as file:
        for size, message in ((7, "group_size must divide"), ("8", "group_size must be an int"), (4, "must be torch")):
            manifest = {**file.manifest, "weights": {n: dict(f) for n, f in file.manifest["weights"].items()}}
            manifest["weights"]["3"]["group_size"] = size
            with pytest.raises((TypeError, ValueError), match=message):
                Writer(tmp_path / "new.safetensors", file.specs, manifest)
