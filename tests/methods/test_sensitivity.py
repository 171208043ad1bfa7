"""What the bits of a layer do to the output, and the choice of bits under a budget."""

import itertools

import pytest
import torch
from helpers import same, state
from networks import CALIBRATION, learn, net
from torch import nn

import hdrq
from hdrq.methods.post_training import fold
from hdrq.methods.sensitivity import _least
from hdrq.quantizers.layers import quantized_layers
from hdrq.quantizers.provenance import origin


class Tied(nn.Module):
    """Two layers of one weight, one that reads the input too, and a head."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.skip = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))) + self.skip(x))


def tied():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Tied().eval()


X = torch.randn((64, 8), generator=torch.Generator().manual_seed(3))


def test_an_error_is_that_of_the_output_with_one_weight_rounded():
    model, found = net(), hdrq.sensitivity(net(), CALIBRATION, widths=(3, 4), samples=32)
    full = fold(model, CALIBRATION)
    layer = full.get_submodule("3")
    x = CALIBRATION[:32]
    with torch.no_grad():
        before = full(x).double()
        scale = hdrq.ops.search_scale(layer.weight, -4, 3)
        layer.weight.copy_(hdrq.ops.fake_quantize(layer.weight, scale, -4, 3))
        want = float((full(x).double() - before).square().sum() / before.square().sum())
    assert found.layers[1].layers == ("3",)
    assert found.layers[1].errors[3] == pytest.approx(want, rel=1e-6)
    assert found.error({"3": 3}) == found.layers[1].errors[3]


def test_weights_and_multiply_adds_are_counted():
    found = hdrq.sensitivity(net(), CALIBRATION, widths=(4,), samples=8)
    # 3×3 convolutions on 8×8, then on 4×4 after the stride, and a linear layer.
    assert [layer.weights for layer in found.layers] == [324, 1296, 1728, 1536]
    assert [layer.macs for layer in found.layers] == [324 * 64, 1296 * 64, 1728 * 16, 1536]


def test_the_model_is_left_as_it_was():
    model = net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hdrq.sensitivity(model, CALIBRATION, widths=(2,), samples=8).error({"0": 2})
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_no_choice_within_the_budget_is_better():
    generator = torch.Generator().manual_seed(1)
    costs = torch.randint(1, 1000, (5,), generator=generator).tolist()
    # Layers differ by six decades, as they may.
    errors = [{b: float(torch.rand((), generator=generator)) * 4.0**-b / 10**k for b in (2, 3, 4, 8)} for k in range(5)]

    def spent(widths):
        return sum(c * b for c, b in zip(costs, widths, strict=True))

    def error(widths):
        return sum(e[b] for e, b in zip(errors, widths, strict=True))

    for budget in (2.0, 2.7, 3.5, 4.4, 5.2, 6.0, 7.1, 8.0):
        allowed = [w for w in itertools.product((2, 3, 4, 8), repeat=5) if spent(w) <= budget * sum(costs)]
        chosen = _least(costs, errors, budget)
        assert spent(chosen) <= budget * sum(costs)
        assert error(chosen) == pytest.approx(min(map(error, allowed)), rel=1e-9)


@pytest.mark.parametrize("cost", ["weights", "macs"])
def test_a_budget_is_kept_and_used(cost):
    found = hdrq.sensitivity(net(), CALIBRATION, samples=16)
    tight, loose = (found.assign(budget, cost) for budget in (3.3, 5.5))
    assert found.mean_bits(tight, cost) <= 3.3
    assert 4.5 < found.mean_bits(loose, cost) <= 5.5
    assert found.error(loose) < found.error(tight)


def test_a_run_takes_the_bits_that_were_found():
    found = hdrq.sensitivity(net(), CALIBRATION, bits="auto:W3.5A4")
    want = found.bits(found.assign())
    quantized = hdrq.quantize(net(), CALIBRATION, "rtn", bits="auto:W3.5A4")
    assert origin(quantized)["bits"] == [list(pair) for pair in want.items()]
    got = {name: layer.weight_quantizer.qmax + 1 for name, layer in quantized_layers(quantized).items()}
    assert got == {name: 2 ** (int(text[1]) - 1) for name, text in want.items()}
    assert len(set(want.values())) > 1  # or any assignment would do
    assert [text[-1] for text in want.values()] == ["8", "4", "4", "8"]  # the ends read 8 bits


@pytest.fixture
def no_measurement(monkeypatch):
    """From now on nothing can be measured."""

    def forbidden(*_, **__):
        raise AssertionError("measured")

    return lambda: monkeypatch.setattr("hdrq.methods.sensitivity.measure", forbidden)


def test_a_resumed_run_takes_the_bits_that_its_folder_keeps(tmp_path, no_measurement):
    options = {"bits": "auto:W3.5A4", "workdir": tmp_path}
    whole = learn(**options)
    (tmp_path / "block-003.safetensors").unlink()
    no_measurement()
    with pytest.raises(AssertionError, match="measured"):
        learn(bits="auto:W3.5A4")
    resumed = learn(**options, resume=True)
    assert same(state(resumed), state(whole)) and origin(resumed)["bits"] == origin(whole)["bits"]


def test_a_folder_of_another_run_is_refused_before_anything_is_measured(tmp_path, no_measurement):
    learn(bits="auto:W3.5A4", workdir=tmp_path)
    no_measurement()
    for options, message in (
        ({"bits": "auto:W3A4", "resume": True}, r"bits \(auto:W3.5A4, now auto:W3A4\)$"),
        ({"bits": "auto:W3.5A4", "seed": 1, "resume": True}, r"others: seed \(0, now 1\)$"),
        ({"bits": "auto:W3.5A4"}, "workdir must hold no run"),
    ):
        with pytest.raises((ValueError, FileExistsError), match=message):
            learn(workdir=tmp_path, **options)


def test_a_measurement_that_fails_begins_no_run(tmp_path, no_measurement):
    no_measurement()
    with pytest.raises(AssertionError, match="measured"):
        learn(bits="auto:W3.5A4", workdir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_patterns_keep_what_they_say_and_the_rest_shares_the_budget():
    found = hdrq.sensitivity(net(), CALIBRATION, bits={"0": "float", "9": "W8A8", "*": "auto:W3A4"}, samples=16)
    assert [layer.layers for layer in found.layers] == [("3",), ("6",)]
    text = found.bits(found.assign())
    assert text["0"] == "float"
    assert text["9"] == "W8A8"
    assert found.mean_bits(found.assign()) <= 3


def test_layers_that_share_a_weight_are_one():
    found = hdrq.sensitivity(tied(), X, bits="auto:W4A4", samples=64)
    assert [layer.layers for layer in found.layers] == [("first", "second"), ("skip",), ("head",)]
    assert found.layers[0].macs == 2 * found.layers[0].weights == 128
    widths = found.assign(3.5)
    assert widths["first"] == widths["second"]
    hdrq.quantize(tied(), X, "rtn", bits=found.bits(widths))  # layers that read one tensor agree


class Two(nn.Module):
    """Two outputs, each of a layer of its own, and a third layer that no output depends on."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.unheard = nn.Linear(8, 4), nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x):
        return self.a(x), {"other": self.b(x), "none": self.unheard(x) * 0}


def test_all_outputs_count_and_a_layer_that_none_depends_on_is_named():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Two().eval()
    with pytest.warns(UserWarning, match="does not depend on the weights of unheard"):
        found = hdrq.sensitivity(model, X, widths=(2, 8))
    assert [layer.errors[2] > 0 for layer in found.layers] == [True, True, False]


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, x):
        return self.layer(x).index_fill(1, torch.tensor([1]), -torch.inf)


def test_what_is_masked_in_both_is_no_error():
    found = hdrq.sensitivity(Masked().eval(), X, widths=(2, 8))
    assert 0 < found.layers[0].errors[8] < found.layers[0].errors[2] < 1


class Rare(nn.Module):
    """A layer that is called for few samples."""

    def __init__(self):
        super().__init__()
        self.layer, self.rare = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        y = self.layer(x)
        return self.rare(y) if (x[:, 0] > 90).any() else y


def test_layers_are_those_that_a_run_reaches():
    x = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    x[161, 0] = 99.0
    found = hdrq.sensitivity(Rare().eval(), x, bits={"*": "auto:3"}, range_samples=200)
    assert [layer.layers for layer in found.layers] == [("layer",), ("rare",)]


class Odd(nn.Module):
    """Names that patterns of a shell read otherwise, and a layer inside another."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleDict({"a[1]": nn.Linear(8, 8), "a1": nn.Linear(8, 8)})
        self.parts["a1"].inner = nn.Linear(8, 8)

    def forward(self, x):
        return self.parts["a1"].inner(self.parts["a1"](self.parts["a[1]"](x)))


def test_bits_reach_the_layers_that_they_name():
    found = hdrq.sensitivity(Odd().eval(), X, bits={"*": "auto:4"})
    widths = {"parts.a[1]": 3, "parts.a1": 4, "parts.a1.inner": 5}
    quantized = hdrq.quantize(Odd().eval(), X, "rtn", bits=found.bits(widths))
    assert {name: layer.weight_quantizer.qmax for name, layer in quantized_layers(quantized).items()} == {
        name: 2 ** (width - 1) - 1 for name, width in widths.items()
    }


class Shortcut(nn.Module):
    """A block whose last layer, the last of the model, reads what the block reads."""

    def __init__(self):
        super().__init__()
        self.first, self.block = nn.Linear(8, 8), nn.Module()
        self.block = Branches()

    def forward(self, x):
        return self.block(self.first(x))


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.down = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        y = self.two(torch.relu(self.one(x)))
        return y + self.down(x)


@pytest.mark.parametrize("recipe", ["rtn", "gptq"])
def test_layers_that_read_one_tensor_read_the_same_bits(recipe):
    hdrq.quantize(Shortcut().eval(), X, recipe, bits="auto:W4A4")


@pytest.mark.parametrize("call", ["bits", "mean_bits", "error"])
def test_assignments_are_checked(call):
    found = hdrq.sensitivity(net(), CALIBRATION, widths=(4,), samples=8)
    whole = found.assign(4)
    with pytest.raises(ValueError, match="widths must be of layers that were measured, got 'typo'; layers: 0; 3"):
        getattr(found, call)({**whole, "typo": 3})
    with pytest.raises(ValueError, match=r"widths of 3 must be in \[2, 16\], got 99"):
        getattr(found, call)({**whole, "3": 99})
    if call != "error":
        with pytest.raises(ValueError, match="widths must have every layer that was measured, got none for 9"):
            getattr(found, call)({name: 4 for name in ("0", "3", "6")})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"bits": "auto:3", "widths": (4, 8)}, r"budget must be finite and in \[4, inf\], got 3"),
        ({"bits": "W4A4"}, "bits must ask for a budget"),
        ({"bits": {"*": "W4A4"}}, "bits must ask for a budget"),
        ({"bits": "auto:1.5"}, r"weight bits must be finite and in \[2, 16\], got 1.5"),
        ({"bits": "auto:W4"}, 'bits must be written like "auto:4.5"'),
        ({"bits": {"0": "auto:3", "*": "auto:4"}}, "bits must have one budget, got auto:3; auto:4"),
        ({"bits": {"nothing": "auto:3", "*": "W4A4"}}, "bits must have patterns that match a layer, got 'nothing'"),
        ({"widths": (1, 4)}, r"widths must be in \[2, 16\], got 1"),
        ({"widths": ()}, "widths must be one or more, got none"),
        ({"samples": 0}, "samples must be"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        hdrq.sensitivity(net(), CALIBRATION, **options)


def test_a_budget_below_the_narrowest_width_is_refused():
    found = hdrq.sensitivity(net(), CALIBRATION, bits="auto:5", widths=(4, 8), samples=8)
    with pytest.raises(ValueError, match=r"budget must be finite and in \[4, inf\], got 3"):
        found.assign(3)


def test_a_shared_weight_has_a_budget_or_a_width():
    with pytest.raises(ValueError, match="for all layers that share a weight, or for none, got widths for first"):
        hdrq.sensitivity(tied(), X, bits={"first": "W8A8", "*": "auto:W3A8"})


def test_patterns_and_widths_have_their_types():
    with pytest.raises(TypeError, match="bits must have patterns of names, got 1"):
        hdrq.quantize(net(), CALIBRATION, "rtn", bits={1: "auto:4"})
    with pytest.raises(TypeError, match="widths must be a sequence of bits, got int"):
        hdrq.sensitivity(net(), CALIBRATION, widths=4)


def test_where_layers_must_be_given_a_budget_is_refused():
    with pytest.raises(ValueError, match="bits must be widths here, got 'auto:4'"):
        hdrq.qat.prepare(net(), CALIBRATION, bits="auto:4")
