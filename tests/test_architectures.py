"""Models that hdrq has never seen: all four recipes quantize them, and they are saved, loaded and merged."""

import pytest
import torch
import torch.nn.functional as F
from architectures import (
    MODELS,
    built,
    disagreements,
    images,
    output,
)
from torch import nn

import hdrq
from hdrq.calibrate.report import report_of
from hdrq.prepare.units import find_blocks
from hdrq.quantizers.layers import input_quantizers, input_readers, quantized_layers

RECIPES = ("rtn", "qdrop", "hdrq")


@pytest.mark.parametrize("name", MODELS)
def test_all_recipes_then_saved_loaded_and_merged(name, tmp_path):
    model, data = built(name)
    source, _ = built(name, seed=1)
    options = {"bits": "W4A4", "source": source, "batch_size": 2, "progress": False}
    quantized = [
        hdrq.quantize(model, data, recipe, iterations=0 if recipe == "rtn" else 2, **options) for recipe in RECIPES
    ]
    want = output(model, data)
    for each in quantized:
        assert output(each, data).isfinite().all()
        assert not torch.equal(output(each, data), want)
        assert output(each, data).shape == want.shape
    assert not disagreements(model, quantized[2], data)
    hdrq.save(quantized[2], tmp_path / "model.safetensors")
    loaded = hdrq.load(tmp_path / "model.safetensors", model)
    assert torch.equal(output(loaded, data), output(quantized[2], data))
    assert output(hdrq.merge(quantized, draws=2), data).isfinite().all()


@pytest.mark.parametrize("name", MODELS)
def test_units_of_reconstruction(name):
    model, data = built(name)
    units = find_blocks(model, lambda m: output(m, data))
    assert len(units) == MODELS[name][2], units


def test_a_transformer_block_is_one_unit_and_its_projections_share_a_quantizer():
    model, data = built("ViT")
    quantized = hdrq.quantize(model, data, "rtn")
    units = find_blocks(model, lambda m: output(m, data))
    assert [u for u in units if "layers" in u] == ["vit.layers.0", "vit.layers.1"]
    readers, owners = input_readers(quantized), input_quantizers(quantized)
    attention = [n for n in readers if n.endswith(("q_proj", "k_proj", "v_proj", "query", "key", "value"))]
    assert len(attention) == 6
    assert len({id(readers[n]) for n in attention}) == 2
    assert len(readers) > len(owners)


def test_what_is_the_same_for_every_sample_is_left_out_of_the_loop():
    model, data = built("BERT")
    quantized = hdrq.quantize(model, data, "hdrq", iterations=1, distance=0, batch_size=2, progress=False)
    learned = [block.name for block in report_of(quantized).blocks]
    assert len(learned) == 6 and "bert.embeddings.position_embeddings" not in learned
    assert "bert.embeddings.position_embeddings" in quantized_layers(quantized)


def test_a_skip_to_the_decoder_is_quantized_where_it_is_read():
    model, data = built("U-Net")
    names = set(input_quantizers(hdrq.quantize(model, data, "rtn")))
    assert {"up1", "up2", "join1.a", "join2.a", "middle"} <= names


@pytest.mark.parametrize(("placement", "extra"), [("qdrop", True), ("input", False)])
def test_placement(placement, extra):
    model, data = built("ResNet-50")
    names = input_quantizers(hdrq.quantize(model, data, "rtn", activation_placement=placement))
    assert ("layer1.1" in names) is extra
    assert ("layer1.1.conv1" in names) is not extra
    assert "layer1.1.conv2" in names


def test_a_tied_weight_stays_tied():
    model, data = built("language")
    quantized = hdrq.quantize(model, data, "hdrq", iterations=2, distance=0, progress=False)
    layers = quantized_layers(quantized)
    assert set(layers) == {"embedding", "inner", "head"}
    assert torch.equal(quantized.embedding.weight, quantized.head.weight)
    assert "embedding" not in input_readers(quantized)  # its input is integers


def test_blocks_by_name_and_layers_in_float():
    model, data = built("ResNet-50")
    bits = {"conv1": "W8A8", "fc": "float", "layer4": "W8A8", "*": "W4A4"}
    quantized = hdrq.quantize(
        model, data, "qdrop", bits=bits, blocks=["layer1", "layer2"], iterations=1, batch_size=2, progress=False
    )
    layers = quantized_layers(quantized)
    assert "fc" not in layers
    assert layers["layer4.0.conv1"].weight_quantizer.qmax == 127
    assert layers["layer1.0.conv1"].weight_quantizer.qmax == 7
    for names, message in (
        (["nowhere"], "a block must be one of"),
        (["layer1", "layer1.0"], "blocks must lie apart, got 'layer1.0' inside 'layer1'"),
        (["maxpool"], "a block must hold a convolution"),
    ):
        with pytest.raises(ValueError, match=message):
            hdrq.quantize(model, data, "rtn", blocks=names)


def test_an_input_that_leans_to_one_side_has_a_zero_point_and_is_merged():
    class Lean(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.b(F.elu(self.a(x)))

    torch.manual_seed(0)
    model, x = Lean().eval(), 4 * torch.randn(200, 6)
    models = [hdrq.quantize(model, shift + x, "rtn", bits={"*": "W8A4"}) for shift in (0, 3)]
    ranges = [(m.b.input_quantizer.qmin, m.b.input_quantizer.qmax) for m in models]
    assert all(low > -8 and high - low == 15 for low, high in ranges)
    merged = hdrq.merge(models).b.input_quantizer
    steps = [m.b.input_quantizer.scale.item() for m in models]
    low = sum(s * r[0] for s, r in zip(steps, ranges, strict=True)) / sum(steps)
    assert (merged.qmin, merged.qmax) == (round(low), round(low) + 15)


def test_a_transposed_convolution_in_groups_has_no_scale_for_each_channel():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 4, 2, groups=2)).eval()
    hdrq.quantize(model, images(8), "rtn")
    with pytest.raises(ValueError, match="1 must have one group for a scale for each output channel, got 2"):
        hdrq.quantize(model, images(8), "rtn", per_channel=True)


def test_channels_of_a_transposed_convolution_lie_on_axis_1():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 7, 2)).eval()
    quantized = hdrq.quantize(model, images(8), "rtn", per_channel=True)
    assert quantized_layers(quantized)["1"].weight_quantizer.scale.numel() == 7
