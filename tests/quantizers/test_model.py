"""Preparing a model: BatchNorm folded, bits assigned, blocks found, quantizers attached where tensors enter."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hdrq
from hdrq.prepare.folding import fold_batchnorm
from hdrq.prepare.units import find_blocks
from hdrq.quantizers.bits import BitWidths, bit_policy, integer_range
from hdrq.quantizers.layers import input_quantizers, quantized_layers
from hdrq.quantizers.modules import ActivationQuantizer, Quantizer

torch.set_num_threads(1)


def data(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def lively(model):
    """A model in evaluation mode whose BatchNorms are far from the identity."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.track_running_stats:
            module.running_mean.copy_(torch.randn(module.num_features, generator=generator))
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.3)
    return model.eval()


def fold(model, x):
    """The folded pairs of a copy, and the copy, whose outputs are checked."""
    folded = copy.deepcopy(model)
    pairs = fold_batchnorm(folded, lambda m: m(x))
    torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-4)
    return pairs, folded


class Scattered(nn.Module):
    """Norms are declared far from their layers and in another order; one reads the image, one a sum."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleDict({"b": nn.BatchNorm2d(6), "a": nn.BatchNorm2d(4), "sum": nn.BatchNorm2d(6)})
        self.image_norm = nn.BatchNorm2d(3)
        self.head = nn.Sequential(nn.Linear(6, 5), nn.Sequential(nn.BatchNorm1d(5)), nn.ReLU(), nn.Linear(5, 2))
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False))
        self.body = nn.Conv2d(4, 6, 3, groups=2)

    def forward(self, x):
        x = F.relu(self.norms["a"](self.stem(self.image_norm(x))))
        x = self.norms["b"](self.body(x))
        x = self.norms["sum"](x + 1).mean((2, 3))
        return self.head(x)


class Branching(nn.Module):
    """A convolution whose output goes to a BatchNorm and past it."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.conv(x)
        return self.norm(y) + y


class SamePad(nn.Conv2d):
    """A convolution that pads its input itself."""

    def forward(self, x):
        return super().forward(F.pad(x, (1, 0, 1, 0)))


class Block(nn.Module):
    """Two layers and a shortcut, both branches reading the block's input."""

    def __init__(self, width=4):
        super().__init__()
        self.first, self.second = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.shortcut = nn.Conv2d(width, width, 1)

    def forward(self, x):
        return F.relu(self.second(F.relu(self.first(x))) + self.shortcut(x))


def blocks_net():
    return lively(nn.Sequential(SamePad(3, 4, 2), nn.ReLU(), Block(), Block(), nn.Flatten(), nn.Linear(256, 3)))


# --- BatchNorm


def test_batchnorm_folds_by_execution_order():
    model = lively(Scattered())
    pairs, folded = fold(model, data(8, 3, 8, 8))
    assert pairs == {"norms.a": "stem.0", "norms.b": "body", "head.1.0": "head.0"}
    assert isinstance(folded.norms["sum"], nn.BatchNorm2d) and isinstance(folded.image_norm, nn.BatchNorm2d)
    assert folded.stem[0].bias is not None


@pytest.mark.parametrize(
    "model, shape",
    [
        (nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)), (4, 3, 5, 5)),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.BatchNorm2d(4)), (4, 3, 5, 5)),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)), (4, 3, 5, 5)),
        (nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)), (4, 5, 6)),
    ],
    ids=["no layer", "changed in place", "no statistics", "axis 1 is not the layer's channels"],
)
def test_batchnorm_that_cannot_be_folded_is_left_alone(model, shape):
    assert fold(lively(model), data(*shape))[0] == {}


def test_layer_that_runs_twice_is_left_alone():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.norm(self.conv(self.conv(x)))

    assert fold(lively(Twice()), data(4, 3, 6, 6))[0] == {}


def test_batchnorm_without_weights_folds():
    model = lively(nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5, affine=False), nn.Linear(5, 2)))
    assert fold(model, data(9, 6))[0] == {"1": "0"}
    model = lively(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False)))
    assert fold(model, data(9, 3, 5, 5))[0] == {"1": "0"}


def test_batchnorm_of_a_model_in_bfloat16_folds():
    model = lively(Scattered()).bfloat16()
    assert len(fold_batchnorm(model, lambda m: m(data(8, 3, 8, 8).bfloat16()))) == 3
    assert model.body.weight.dtype == torch.bfloat16


def test_output_read_elsewhere_is_refused():
    with pytest.raises(ValueError, match="folding BatchNorm must leave the outputs as they are, got a relative change"):
        fold_batchnorm(lively(Branching()), lambda m: m(data(4, 3, 6, 6)))


# --- bits


@pytest.mark.parametrize("text, weight, activation", [("W4A4", 4, 4), ("W2A16", 2, 16), ("W16A8", 16, 8)])
def test_bits_are_read(text, weight, activation):
    assert BitWidths.parse(text) == BitWidths(weight, activation)


@pytest.mark.parametrize("text", ["4", "", "w4a4", "W4", "W4A", "W4A4 ", "W4.5A4", "W-4A4", None, 4])
def test_bits_written_otherwise_are_refused(text):
    with pytest.raises(ValueError, match='bits must be written like "W4A4", got'):
        BitWidths.parse(text)


@pytest.mark.parametrize("text, which", [("W1A4", "weight"), ("W17A4", "weight"), ("W4A1", "activation")])
def test_bits_out_of_range_are_refused(text, which):
    with pytest.raises(ValueError, match=rf"{which} bits must be in \[2, 16\], got"):
        BitWidths.parse(text)


def test_policy_gives_the_edges_eight_bits():
    policy = bit_policy(["stem", "a", "b", "head"], "W3A4")
    assert policy == {"stem": BitWidths(8, 8), "a": BitWidths(3, 4), "b": BitWidths(3, 4), "head": BitWidths(8, 8)}


def test_first_pattern_decides_and_edges_are_the_patterns_too():
    policy = bit_policy(["stem", "blocks.0", "blocks.1", "head"], {"blocks.1": "W2A2", "blocks.*": "W5A5", "*": "W6A6"})
    assert policy == {
        "stem": BitWidths(6, 6),
        "blocks.0": BitWidths(5, 5),
        "blocks.1": BitWidths(2, 2),
        "head": BitWidths(6, 6),
    }


@pytest.mark.parametrize(
    "bits, error, message",
    [
        ({"a": "W4A4"}, ValueError, "a pattern for every layer .* got none for 'b'"),
        ({"c*": "W4A4", "*": "W4A4"}, ValueError, r"patterns that match a layer, got 'c\*'; layers: a, b"),
        ({"*": "4"}, ValueError, "written like"),
        (4, TypeError, "bits must be a string .* got int"),
    ],
)
def test_bad_policy_is_refused(bits, error, message):
    with pytest.raises(error, match=message):
        bit_policy(["a", "b"], bits)


# --- blocks


def test_blocks_of_the_demo_are_stem_six_residual_blocks_head():
    pytest.importorskip("safetensors")
    pytest.importorskip("PIL")
    from hdrq.demo.model import resnet

    model, x = resnet().eval(), data(2, 3, 32, 32)
    assert find_blocks(model, lambda m: m(x)) == ["stem.0", *(f"blocks.{i}" for i in range(6)), "head"]


def test_blocks_come_in_execution_order_and_unreached_ones_not_at_all():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.idle = nn.Linear(4, 4)
            self.late, self.early = Block(), Block()
            self.stem = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return self.late(self.early(self.stem(x)))

    x = data(2, 3, 6, 6)
    assert find_blocks(Backwards().eval(), lambda m: m(x)) == ["stem", "early", "late"]


def test_module_without_a_layer_that_runs_is_no_block():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = (nn.MultiheadAttention(8, 2, batch_first=True) for _ in range(2))

        def forward(self, x):
            return self.two(self.one(x, x, x)[0], x, x)[0]

    model, x = nn.Sequential(nn.Linear(5, 8), Attention(), Attention()).eval(), data(9, 6, 5)
    assert find_blocks(model, lambda m: m(x)) == ["0"]  # attention calls its projections' weights, not the modules
    kept = hdrq.quantize(model, x, "rtn", bits={"1": "float", "2": "float", "0": "W4A4"})
    assert list(input_quantizers(kept)) == ["0"]


def test_a_weight_that_is_read_without_a_call_is_refused():
    class Subclass(nn.MultiheadAttention):
        def forward(self, x):
            return super().forward(x, x, x)[0]

    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.bias, self.idle = nn.Linear(8, 8), nn.Parameter(torch.zeros(8)), nn.Linear(8, 8)
            self.tied = nn.Linear(8, 8)

        def forward(self, x):
            return F.linear(x, self.qkv.weight, self.bias) + self.tied(x) + F.linear(x, self.tied.weight)

    x = data(9, 6, 5)
    for module, name, more in ((Subclass(8, 2), "1", " and 1 more"), (Reader(), "1.qkv", "")):
        model = nn.Sequential(nn.Linear(5, 8), module).eval()
        for bits in ("W4A4", {"*": "W4A4", name: "float"}):  # the first pattern decides
            with pytest.raises(
                ValueError, match=rf"must call its layers .* got '{name}'{more}, whose weights are read"
            ):
                hdrq.quantize(model, x, "rtn", bits=bits)
        hdrq.quantize(model, x, "rtn", bits={name: "float", "*": "W4A4"})


def test_nested_blocks_are_the_smallest():
    class Stage(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(Block(), Block())

        def forward(self, x):
            return self.inner(x)

    model, x = nn.Sequential(Stage(), Stage()).eval(), data(2, 4, 6, 6)
    assert find_blocks(model, lambda m: m(x)) == ["0.inner.0", "0.inner.1", "1.inner.0", "1.inner.1"]


# --- quantizers


def test_quantizers_sit_where_tensors_enter():
    x = data(16, 3, 8, 8)
    model = hdrq.quantize(blocks_net(), x, "rtn", bits="W3A5")
    assert list(quantized_layers(model)) == [
        "0",
        *(f"{b}.{n}" for b in "23" for n in ("first", "second", "shortcut")),
        "5",
    ]
    ranges = {name: (q.qmin, q.qmax) for name, q in input_quantizers(model).items()}
    assert ranges == {
        "0": (-128, 127),  # the image takes both signs
        "2": (0, 31),  # for both branches
        "2.second": (0, 31),
        "3": (0, 31),
        "3.second": (0, 31),
        "5": (0, 255),
    }
    weights = {n: (q.weight_quantizer.qmin, q.weight_quantizer.qmax) for n, q in quantized_layers(model).items()}
    assert weights["0"] == weights["5"] == (-128, 127) and weights["2.shortcut"] == (-4, 3)


def test_both_branches_read_the_quantized_input():
    model = hdrq.quantize(blocks_net(), data(16, 3, 8, 8), "rtn")
    read = {}
    for name in ("first", "shortcut"):
        layer = model[2].get_submodule(name)
        layer.register_forward_pre_hook(lambda m, args, name=name: read.update({name: args[0]}))
    model(data(4, 3, 8, 8, seed=1))
    assert read["first"] is read["shortcut"]
    steps = read["first"] / model[2].input_quantizer.scale
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-4)
    assert len(steps.round().unique()) <= 16


def test_layers_that_read_one_tensor_share_its_quantizer():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 3), nn.Linear(6, 3)

        def forward(self, x):
            return self.a(x) + self.b(x)

    quantized = hdrq.quantize(lively(Heads()), data(9, 6), "rtn")
    assert list(input_quantizers(quantized)) == ["a"]
    assert quantized.b.input_quantizer is quantized.a.input_quantizer


def test_layer_that_pads_in_its_forward_quantizes_its_weight():
    x = data(8, 3, 8, 8)
    model = hdrq.quantize(lively(nn.Sequential(SamePad(3, 4, 2))), x, "rtn", bits={"*": "W2A8"})
    assert len(model[0].weight.unique()) <= 4 and model(x).shape == (8, 4, 8, 8)
    restored = F.conv2d(F.pad(model[0].input_quantizer(x), (1, 0, 1, 0)), model[0].weight, model[0].bias)
    assert torch.equal(model(x), restored)


def test_scale_for_each_channel():
    model = hdrq.quantize(blocks_net(), data(8, 3, 8, 8), "rtn", per_channel=True)
    assert all(q.weight_quantizer.scale.shape == q.module.weight.shape[:1] for q in quantized_layers(model).values())


def test_model_in_bfloat16():
    x = data(16, 3, 8, 8)
    model = hdrq.quantize(blocks_net().bfloat16(), x.bfloat16(), "rtn", bits="W8A8")
    assert model(x.bfloat16()).dtype == torch.bfloat16
    assert all(q.weight_quantizer.scale.dtype == torch.float32 for q in quantized_layers(model).values())


@pytest.mark.parametrize(
    "model, message",
    [
        (nn.Sequential(nn.ReLU()), "must run at least one convolution or linear layer on calibration, got none"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(6, 3)), "must have plain weights, got a parametrized one"),
    ],
)
def test_models_without_plain_layers_are_refused(model, message):
    with pytest.raises(ValueError, match=f"model {message}"):
        hdrq.quantize(model.eval(), data(9, 6), "rtn")


def test_weight_that_is_not_finite_is_named():
    model = blocks_net()
    model[2].second.weight.data[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"(input|weight) of 2\.second must be finite, got 1 of 144"):
        hdrq.quantize(model, data(8, 3, 8, 8), "rtn")


# --- the quantizers themselves


@pytest.mark.parametrize("bits, signed, want", [(2, True, (-2, 1)), (8, True, (-128, 127)), (16, False, (0, 65535))])
def test_integer_range(bits, signed, want):
    assert integer_range(bits, signed) == want


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
