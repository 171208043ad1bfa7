"""No value passes two quantizers, no tensor has two, and the residual stream of pre-norm blocks has none."""

import pytest
import torch
import torch.nn.functional as F
from networks import data
from torch import nn

import hdrq
from hdrq.quantizers.layers import input_quantizers, input_readers
from hdrq.report import report_of


class FrozenNorm(nn.Module):
    """One of the norms that no operation shows: its statistics are constants."""

    def forward(self, x):
        return 2 * x + 1


class TwoLayers(nn.Module):
    """A block that computes ``compute(self, x)`` with two convolutions."""

    def __init__(self, compute, width, inside):
        super().__init__()
        self.compute = compute
        self.a, self.b = nn.Conv2d(width, 8, 3, padding=1), nn.Conv2d(inside, 8, 1)
        self.norm, self.frozen = nn.GroupNorm(2, 8), FrozenNorm()

    def forward(self, x):
        return self.compute(self, x)


def network(compute, width=8, inside=8):
    torch.manual_seed(0)
    blocks = nn.Sequential(*(TwoLayers(compute, width, inside) for _ in range(2)))
    stem, head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4)
    return nn.Sequential(stem, nn.ReLU(), blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).eval()


def placed(compute, bits="W8A4", width=8, inside=8, **options):
    """Which of the first block's modules have quantizers ("": the block), and what the report says of the block."""
    bits = bits if isinstance(bits, dict) else {"*": bits}
    quantized = hdrq.quantize(network(compute, width, inside), data(8, 3, 8, 8), "rtn", bits=bits, **options)
    names = [name[3:].lstrip(".") for name in input_quantizers(quantized) if name.startswith("2.0")]
    return names, report_of(quantized).placement["2.0"]


def behind(read):
    """``a(x) + b(read(x))``."""
    return lambda block, x: F.relu(block.a(x) + block.b(read(x)))


def residual(read):
    """``x + b(a(read(x)))``."""
    return lambda block, x: x + block.b(F.relu(block.a(read(block, x))))


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x,
        F.relu,
        lambda x: F.max_pool2d(x, 3, 1, 1),
        lambda x: F.pad(x[:, :, 1:, 1:], (1, 0, 1, 0)),
        lambda x: torch.cat([x[:, 4:], x[:, :4]], 1),
        lambda x: torch.cat(x.chunk(4, 1)[::-1], 1),
        lambda x: x.flatten(2).transpose(1, 2).contiguous().transpose(1, 2).unflatten(2, (8, 8)),
        lambda x: F.dropout(F.channel_shuffle(x, 2), training=False),
    ],
)
def test_what_is_on_a_grid_already_has_no_second_quantizer(read):
    assert placed(behind(read)) == ([""], "block")
    assert placed(behind(read), activation_placement="block") == ([""], "block")
    quantized = hdrq.quantize(network(behind(read)), data(8, 3, 8, 8), "rtn", bits={"*": "W8A4"})
    quantizer, seen = quantized[2][0].input_quantizer, []
    quantized[2][0].b.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    quantized(data(4, 3, 8, 8, seed=1))
    assert torch.equal(seen[0], quantizer.values(quantizer.codes(seen[0])))


def test_a_chunk_of_what_a_block_reads_has_no_second_quantizer():
    def half(block, x):
        return F.relu(block.a(x.chunk(2, 1)[0])) + F.relu(block.b(x.chunk(2, 1)[1]))

    assert placed(half, width=4, inside=4) == ([""], "block")


@pytest.mark.parametrize(
    "compute, inside",
    [
        (lambda block, x: F.relu(block.b(torch.cat([x, F.relu(block.a(x))], 1))), 16),
        (behind(lambda x: F.avg_pool2d(x, 3, 1, 1)), 8),
        (behind(lambda x: F.interpolate(F.avg_pool2d(x, 2), scale_factor=2)), 8),
    ],
)
def test_where_values_are_mixed_the_layers_quantize_what_they_read(compute, inside):
    assert placed(compute, inside=inside) == (["a", "b"], "layers")
    assert placed(compute, inside=inside, activation_placement="block") == (["", "b"], "block")
    assert placed(compute, inside=inside, activation_placement="input") == (["a", "b"], "layers")


def test_what_a_block_hands_on_unchanged_is_quantized_once():
    def shuffled(block, x):
        """As ShuffleNet has it: half of the channels pass, and every next block would quantize them again."""
        kept, read = x.chunk(2, 1)
        return F.channel_shuffle(torch.cat([kept, F.relu(block.b(F.relu(block.a(read))))[:, :4]], 1), 2)

    assert placed(shuffled, width=4) == (["a", "b"], "layers")


@pytest.mark.parametrize(
    "read",
    [
        lambda block, x: block.norm(x),
        lambda block, x: F.layer_norm(x, x.shape[1:]),
        lambda block, x: F.gelu(F.group_norm(x + 0.5, 2)),
        lambda block, x: x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-6),
        lambda block, x: (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-6),
        lambda block, x: F.normalize(x, dim=1),
        lambda block, x: F.batch_norm(x, torch.zeros(8), torch.ones(8)),
        lambda block, x: block.frozen(x),
    ],
)
def test_a_norm_that_reads_first_leaves_the_quantizers_to_the_layers(read):
    assert placed(residual(read)) == (["a", "b"], "layers")
    assert placed(residual(read), activation_placement="block") == (["", "a", "b"], "block")


@pytest.mark.parametrize(
    "compute, names",
    [
        (residual(lambda block, x: x), ["", "b"]),
        (residual(lambda block, x: F.relu(x)), ["", "b"]),
        (residual(lambda block, x: F.gelu(x)), ["", "a", "b"]),
        (residual(lambda block, x: 2 * x + 1), ["", "a", "b"]),
        (lambda block, x: x + block.b(F.relu(block.norm(block.a(x)))), ["", "b"]),
        (lambda block, x: block.norm(x + block.b(F.relu(block.a(x)))), ["", "b"]),
    ],
)
def test_a_block_quantizes_what_a_layer_or_an_activation_reads(compute, names):
    assert placed(compute) == (names, "block")


def test_patterns_that_give_one_tensor_two_widths_are_refused():
    for placement in ("qdrop", "block", "input"):
        with pytest.raises(ValueError, match=r"bits must agree .* got A6 for '2\.0\.a'; A4 for '2\.0\.b'; give them"):
            placed(behind(lambda x: x), {"2.0.a": "W8A6", "*": "W8A4"}, activation_placement=placement)


def test_a_layer_with_bits_of_its_own_has_them():
    compute = behind(lambda x: F.max_pool2d(x, 3, 1, 1))
    bits = {"2.0.b": "W8A6", "*": "W8A4"}
    for placement in ("qdrop", "block"):
        quantized = hdrq.quantize(network(compute), data(8, 3, 8, 8), "rtn", bits=bits, activation_placement=placement)
        assert {n: q.qmax for n, q in input_quantizers(quantized).items() if "2.0" in n} == {"2.0.a": 15, "2.0.b": 63}
        assert report_of(quantized).placement == {"2.0": "layers", "2.1": "block"}


def test_a_layer_in_float_reads_what_nobody_has_quantized():
    bits = {"2.0.a": "float", "*": "W8A4"}
    for placement in ("qdrop", "block"):
        quantized = hdrq.quantize(
            network(behind(lambda x: x)), data(8, 3, 8, 8), "rtn", bits=bits, activation_placement=placement
        )
        seen = {}
        for name in "ab":
            layer = quantized[2][0].get_submodule(name)
            layer.register_forward_pre_hook(lambda m, args, name=name, seen=seen: seen.update({name: args[0]}))
        quantized(data(4, 3, 8, 8, seed=1))
        assert len(seen["a"].unique()) > 100 and len(seen["b"].unique()) <= 16


def test_the_edges_of_a_string_give_one_tensor_the_widest():
    class Stems(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.head(F.relu(self.a(x) + self.b(x)))

    torch.manual_seed(0)
    quantized = hdrq.quantize(Stems().eval(), data(20, 6), "rtn", bits="W4A4")
    assert {n: q.qmax - q.qmin for n, q in input_readers(quantized).items()} == {"a": 255, "b": 255, "head": 255}
    assert quantized.b.input_quantizer is quantized.a.input_quantizer and quantized.b.weight.unique().numel() <= 16


@pytest.mark.parametrize("change", [lambda y, z: F.relu_(y), lambda y, z: y.add_(z), lambda y, z: y[:, ::2].mul_(2)])
def test_a_tensor_that_was_changed_in_place_is_another(change):
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(6, 6) for _ in range(3))

        def forward(self, x):
            y = self.a(x)
            z = self.b(y)
            change(y, z)
            return z + self.c(y)

    torch.manual_seed(0)
    quantized = hdrq.quantize(InPlace().eval(), data(20, 6), "rtn", bits={"*": "W8A4"})
    assert list(input_quantizers(quantized)) == ["a", "b", "c"]
    assert quantized.c.input_quantizer.scale != quantized.b.input_quantizer.scale


def test_views_of_one_tensor_share_its_quantizer():
    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Linear(8, 8)

        def forward(self, x):
            x = self.stem(x)
            return self.a(x).flatten(2).transpose(1, 2) + self.b(x.flatten(2).transpose(1, 2))

    torch.manual_seed(0)
    quantized = hdrq.quantize(Views().eval(), data(8, 3, 4, 4), "rtn", bits={"*": "W8A4"})
    assert list(input_quantizers(quantized)) == ["stem", "a"]
    assert quantized.b.input_quantizer is quantized.a.input_quantizer


def test_every_argument_that_is_the_tensor_is_quantized():
    torch.manual_seed(0)
    model, x = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval(), data(64, 5, 16)
    quantized, levels = hdrq.quantize(model, x, "rtn", bits={"*": "W8A4"}), {}
    for name in ("q_proj", "k_proj", "v_proj"):
        layer = quantized.self_attn.get_submodule(name)
        layer.register_forward_pre_hook(lambda m, args, name=name: levels.update({name: len(args[0].unique())}))
    quantized(x)
    assert levels == dict.fromkeys(("q_proj", "k_proj", "v_proj"), 16)
    assert report_of(quantized).placement == {"self_attn": "block"}
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True), 2).eval()
    assert set(report_of(hdrq.quantize(model, x, "rtn")).placement.values()) == {"layers"}


def test_a_block_has_the_bits_of_what_reads_its_values_and_hands_them_on():
    """The first layer that runs reads something else; the second block reads nothing but the first one's values."""

    def other_first(block, x):
        return F.relu(block.a(F.gelu(x)) + block.b(x))

    quantized = hdrq.quantize(network(other_first), data(8, 3, 8, 8), "rtn", bits={"2.*.a": "W8A6", "*": "W8A4"})
    assert {n: q.qmax for n, q in input_quantizers(quantized).items() if n in ("2.0", "2.1")} == {"2.0": 15, "2.1": 15}

    class Pooled(TwoLayers):
        def forward(self, x):
            self.compute(self, x)
            return F.max_pool2d(x, 3, 1, 1)

    torch.manual_seed(0)
    blocks = nn.Sequential(*(Pooled(behind(lambda x: x), 8, 8) for _ in range(2)))
    model = nn.Sequential(nn.Conv2d(3, 8, 1), blocks, nn.Flatten(), nn.Linear(512, 3)).eval()
    quantized = hdrq.quantize(model, data(8, 3, 8, 8), "rtn", bits={"*": "W8A4"})
    assert list(input_quantizers(quantized)) == ["0", "1.0"]


@pytest.mark.parametrize("mode", ["qdrop", "block"])
def test_a_block_that_writes_to_its_arguments_has_no_quantizer(mode):
    """A quantized copy in their place would take the writes, and whoever reads the arguments later would miss them."""

    class Writing(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x, seen):
            x.relu_()
            seen.append(self.b(self.a(x)))

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Writing(), Writing()])

        def forward(self, x):
            seen = [x]
            for block in self.blocks:
                block(x := seen[-1] * 1, seen)
                seen.append(seen[-1] + x)
            return sum(seen[1:])

    torch.manual_seed(0)
    model, x = Network().eval(), data(16, 6)
    quantized = hdrq.quantize(model, x, "rtn", bits={"*": "W8A8"}, activation_placement=mode)
    assert set(report_of(quantized).placement.values()) == {"layers"}
    with torch.no_grad():
        assert (quantized(x) - model(x)).norm() < 0.03 * model(x).norm()
