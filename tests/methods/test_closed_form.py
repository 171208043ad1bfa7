"""GPTQ and AWQ over a model: each layer against its equation on what it reads in the finished model."""

import copy

import pytest
import torch
from helpers import same, state
from networks import CALIBRATION, blocks_net, data, error, lively, net
from torch import nn

import hdrq
from hdrq.calibrate.data import calibration_calls
from hdrq.calibrate.gptq import gptq
from hdrq.calibrate.moments import second_moments
from hdrq.methods.post_training import fold
from hdrq.quantizers.layers import quantized_layers
from hdrq.report import report_of


class Transformer(nn.Module):
    """Attention and a gated MLP behind norms; channels that the norms make large."""

    def __init__(self, width=16):
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.gate, self.up, self.down = nn.Linear(width, 24), nn.Linear(width, 24), nn.Linear(24, width)
        self.up.bias = None

    def forward(self, x):
        h = self.norm(x)
        x = x + self.o(torch.softmax(self.q(h) @ self.k(h).mT / 4, -1) @ self.v(h))
        h = self.norm2(x)
        return x + self.down(nn.functional.gelu(self.gate(h)) * self.up(h))


def transformer():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), Transformer(), Transformer(), nn.Linear(16, 4))
    model.eval().requires_grad_(False)
    for block in model[1:3]:
        for k, norm in enumerate((block.norm, block.norm2)):
            norm.weight.data = data(16, seed=k).exp() ** 1.5
    return model


TOKENS = data(64, 6, 8)


def layerwise(model, calibration, **options):
    return hdrq.quantize(model, calibration, "gptq", **{"bits": "W3A8", "attention": False, **options})


@pytest.mark.parametrize(
    ("make", "calibration", "options"),
    [
        (net, CALIBRATION, {}),
        (net, CALIBRATION, {"per_channel": False, "act_order": True}),
        (net, CALIBRATION, {"affine_weights": True, "damping": 0.1}),
        (transformer, TOKENS, {"group_size": 8}),
        (transformer, TOKENS, {"group_size": 4, "affine_weights": True, "act_order": True}),
    ],
)
def test_each_layer_is_gptq_of_what_it_reads_behind_those_before_it(make, calibration, options):
    model = layerwise(make(), calibration, **options)
    full, layers = fold(make(), calibration), quantized_layers(model)
    moments = second_moments(model, calibration_calls(calibration), layers)
    for name, layer in layers.items():
        quantizer, like = layer.weight_quantizer, moments[name]
        weight = full.get_submodule(name).weight
        grid = [quantizer.scale, quantizer.zero_point]
        wide = [None if v is None else like.matrices(quantizer.broadcast(v, weight).expand_as(weight))[0] for v in grid]
        knobs = {"damping": options.get("damping", 0.01), "act_order": options.get("act_order", False)}
        found = gptq(
            like.matrices(weight)[0], like.hessian[0], wide[0], quantizer.qmin, quantizer.qmax,
            zero_point=wide[1], zero_dead=False, **knobs
        )  # fmt: skip
        codes = like.matrices(quantizer.codes(layer.latent))[0]
        assert (codes != found.codes).float().mean() < 0.01, name  # H is summed in another order


def test_gptq_is_better_than_nearest_and_says_what_each_layer_came_to():
    reference = net()
    found = layerwise(net(), CALIBRATION)
    nearest = hdrq.quantize(net(), CALIBRATION, "rtn", bits="W3A8", per_channel=True)
    assert error(found, reference) < 0.6 * error(nearest, reference)
    blocks = report_of(found).blocks
    assert [layer.name for block in blocks for layer in block.layers] == ["0", "3", "6", "9"]
    assert all(layer.error < layer.nearest and layer.best == 0 and not layer.note for b in blocks for layer in b.layers)


def test_groups_of_a_convolution_are_rounded_each_by_its_own_inputs():
    layers = (nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8))
    model = layerwise(lively(nn.Sequential(*layers, nn.Flatten(), nn.Linear(32, 3))), CALIBRATION)
    reports = [layer for block in report_of(model).blocks for layer in block.layers]
    assert [layer.name for layer in reports] == ["0", "2", "4", "6"]
    assert reports[1].error < 0.8 * reports[1].nearest and reports[2].error < 1.05 * reports[2].nearest


def test_layers_that_cannot_be_served_are_rounded_to_nearest_and_named():
    with pytest.warns(UserWarning, match="recipe gptq could not serve 0 .rounded to nearest: SamePad is not a linear"):
        model = layerwise(blocks_net(), data(48, 3, 8, 8))
    nearest = hdrq.quantize(blocks_net(), data(48, 3, 8, 8), "rtn", bits="W3A8", per_channel=True)
    assert torch.equal(model[0].weight, nearest[0].weight)
    assert not torch.equal(model[2].first.weight, nearest[2].first.weight)


@pytest.mark.parametrize("recipe", ["gptq", "awq"])
def test_a_run_that_is_resumed_ends_with_the_same_bits_and_reports(recipe, tmp_path):
    options = {"bits": "W3A8", "attention": False, "workdir": tmp_path}
    first = hdrq.quantize(transformer(), TOKENS, recipe, **options)
    again = hdrq.quantize(transformer(), TOKENS, recipe, **options, resume=True)
    assert same(state(first), state(again))
    assert [b.layers for b in report_of(first).blocks] == [b.layers for b in report_of(again).blocks]
    hdrq.save(first, tmp_path / "q.safetensors")
    loaded = hdrq.load(tmp_path / "q.safetensors", transformer())
    assert torch.equal(loaded(TOKENS), first(TOKENS))


def test_knobs_that_contradict_are_refused():
    for knobs, message in (
        ({"iterations": 5}, 'iterations must be 0 for method "gptq", got 5'),
        ({"method": "awq", "affine_weights": True}, "affine_weights must be False for method"),
        ({"damping": -1.0}, "damping must be finite"),
        ({"method": "smooth"}, "method must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            hdrq.recipes.recipe("gptq", **knobs)
    with pytest.raises(ValueError, match=r"group_size must divide the 16 inputs of 1\.q, got 5"):
        layerwise(transformer(), TOKENS, group_size=5, bits={"0": "float", "*": "W3A8"})


def awq(model=None, **options):
    return hdrq.quantize(model or transformer(), TOKENS, "awq", **{"bits": "W3A16", "attention": False, **options})


def test_awq_folds_into_norms_and_linear_layers_and_lowers_every_error():
    with pytest.warns(UserWarning, match="could not serve 0 .its inputs keep their scale: nothing before it"):
        model = awq()
    full, layers = transformer(), [layer for block in report_of(model).blocks for layer in block.layers]
    assert [layer.name for layer in layers if layer.note] in (["0"], ["0", "3"])
    assert sum(layer.error for layer in layers) < 0.7 * sum(layer.nearest for layer in layers)
    names = [f"{block}.{norm}.weight" for block in "12" for norm in ("norm", "norm2")]
    assert sum(not torch.equal(model.get_parameter(name), full.get_parameter(name)) for name in names) > 1
    nearest = hdrq.quantize(transformer(), TOKENS, "rtn", bits="W3A16", attention=False, per_channel=True)
    unseen = data(32, 6, 8, seed=3)
    wrong = [float((m(unseen) - full(unseen)).square().mean()) for m in (model, nearest)]
    assert wrong[0] < 0.8 * wrong[1]


def test_what_awq_folds_leaves_the_float_network_as_it_was():
    """At 16 bits nothing is left of rounding, and everything of a fold that is wrong."""
    model = awq(bits={"*": "W16A16"}, clip=False)
    want = transformer()(TOKENS)
    moved = [n for n in ("1.norm", "1.v", "1.up", "2.norm2") if not torch.allclose(
        model.get_submodule(n).weight, transformer().get_submodule(n).weight, rtol=0.05)]  # fmt: skip
    assert moved and (model(TOKENS) - want).norm() < 2e-3 * want.norm()


def test_scales_of_activations_follow_what_awq_folds():
    model, before = (
        awq(bits={"*": "W3A8"}),
        hdrq.quantize(transformer(), TOKENS, "rtn", bits={"*": "W3A8"}, attention=False),
    )
    read = {}
    for name in ("1.q", "1.gate", "1.down", "2.gate"):
        model.get_submodule(name).input_quantizer.register_forward_pre_hook(
            lambda _, args, name=name: read.setdefault(name, args[0])
        )
    model(TOKENS)
    moved = 0
    for name, x in read.items():
        quantizer, old = (m.get_submodule(name).input_quantizer for m in (model, before))
        moved += abs(float(quantizer.scale / old.scale) - 1) > 0.2
        used = float(x.max() - x.min()) / float(quantizer.scale * (quantizer.qmax - quantizer.qmin))
        assert 0.45 < used < 1.5, name
    assert moved > 1


def test_awq_leaves_alone_what_more_than_one_thing_reads():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.first, self.second = nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            h = self.norm(x)
            return h + self.second(torch.tanh(self.first(h)))  # the norm is the residual too, and tanh keeps no scale

    model = lively(nn.Sequential(nn.Linear(8, 16), Shared(), Shared(), nn.Linear(16, 4)))
    for block in model[1:3]:
        block.norm.weight.data = data(16).exp() ** 1.5
    before = copy.deepcopy(model)
    with pytest.warns(UserWarning, match=r"1.first \(its inputs keep their scale"):
        found = awq(model)
    assert torch.equal(found[1].norm.weight, before[1].norm.weight)
    assert same(state(model), state(before))
