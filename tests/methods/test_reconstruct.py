"""The block-wise loop: better than rounding, repeatable, on the grid, and clear about bad input."""

import copy
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from helpers import same, state
from networks import CALIBRATION, HELD_OUT, learn, net
from torch import nn
from torch.utils.checkpoint import checkpoint

import hdrq
from hdrq.calibrate.data import calibration_calls
from hdrq.calibrate.report import report_of
from hdrq.methods.post_training import fold, source_weights
from hdrq.methods.reconstruct.learner import Learner
from hdrq.methods.reconstruct.parameters import Parameters
from hdrq.methods.reconstruct.schedule import schedule
from hdrq.prepare.folding import fold_batchnorm
from hdrq.quantizers.layers import QuantizedLayer, input_quantizers, quantized_layers
from hdrq.quantizers.modules import ActivationQuantizer, WeightQuantizer
from hdrq.recipes import Recipe, recipe


def error(model, reference):
    """Mean squared error of the outputs, relative to their variance, on data held out."""
    with torch.no_grad():
        want = reference(HELD_OUT)
        return float((model(HELD_OUT) - want).square().mean() / want.var())


# --- what is learned


@pytest.mark.parametrize(("preset", "iterations"), [("paper", 60), ("official", 150)])
def test_learned_is_well_below_round_to_nearest(preset, iterations):
    model = net()
    nearest = error(learn(model, recipe="rtn", iterations=0, bits="W2A4"), model)
    learned = error(learn(model, preset=preset, iterations=iterations, bits="W2A4"), model)
    assert learned < 0.5 * nearest


@pytest.mark.parametrize("recipe", ["brecq", "qdrop"])
def test_learned_rounding_is_well_below_round_to_nearest(recipe):
    model = net()
    nearest = error(learn(model, recipe="rtn", iterations=0, bits="W2A4"), model)
    options = {"recipe": recipe, "weight_lr": 1e-2, "iterations": 150, "bits": "W2A4"}
    assert error(learn(model, **options), model) < 0.5 * nearest


def test_learned_rounding_goes_up_or_down_and_leaves_scales():
    nearest, learned = learn(recipe="rtn", iterations=0), learn(recipe="qdrop", weight_lr=0.1, iterations=30)
    folded = copy.deepcopy(net())
    fold_batchnorm(folded, lambda m: m(CALIBRATION))
    moved = 0
    for name, layer in quantized_layers(learned).items():
        quantizer, before = layer.weight_quantizer, quantized_layers(nearest)[name].weight_quantizer
        assert torch.equal(quantizer.scale, before.scale)
        assert (quantizer.mode, quantizer.alpha, quantizer.beta) == ("round", None, None)
        down = (folded.get_submodule(name).weight / quantizer.scale).floor()
        codes = quantizer.codes(layer.latent)
        up = codes - down.clamp(quantizer.qmin, quantizer.qmax)
        assert ((up == 0) | (up == 1)).all()
        moved += int((codes != quantized_layers(nearest)[name].weight_quantizer.codes(down * before.scale)).sum())
    assert moved > 0


def test_no_iterations_is_round_to_nearest():
    a, b = learn(recipe="rtn", iterations=0), learn(iterations=0, distance=5e-2)
    assert same(state(a), state(b))


def test_weights_lie_on_the_grid():
    model = learn(net())
    for layer in quantized_layers(model).values():
        quantizer = layer.weight_quantizer
        codes = quantizer.codes(layer.latent)
        assert codes.dtype == torch.int8 and quantizer.qmin <= codes.min() and codes.max() <= quantizer.qmax
        assert torch.equal(quantizer.values(codes), layer.latent)
        assert torch.equal(layer.module.weight, layer.latent)


def test_result_is_finished():
    model = learn(net(), activation_lr=10.0)  # steps that would drive scales below zero
    scales = [q.scale for q in model.modules() if hasattr(q, "qmin")]
    assert len(scales) == 8 and all((s > 0).all() for s in scales)
    assert not any(p.requires_grad for p in model.parameters())
    assert all(q.mode == "round" for q in model.modules() if hasattr(q, "qmin"))
    assert all(q.keep == 1.0 for q in input_quantizers(model).values())
    assert torch.equal(model(HELD_OUT), model(HELD_OUT))


def test_model_and_source_given_are_left_as_they_were():
    model, source = net(), net(1)
    before = state(model), state(source)
    learn(model, source=source, distance=5e-2)
    assert same(before[0], state(model)) and same(before[1], state(source))
    assert all(p.requires_grad for p in model.parameters()) and not model[0]._forward_pre_hooks


def test_seed_decides_every_bit():
    first, second, other = (state(learn(seed=seed, iterations=40)) for seed in (3, 3, 4))
    assert same(first, second)
    assert not torch.equal(first["3.parametrizations.weight.original"], other["3.parametrizations.weight.original"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("recipe", ["hdrq", "qdrop"])
def test_cuda_graph_moves_no_bit(recipe):
    states = [
        state(learn(net().cuda(), CALIBRATION.cuda(), recipe=recipe, iterations=30, graph=g)) for g in (True, False)
    ]
    assert same(*states)


def test_global_random_state_does_not_matter():
    torch.manual_seed(1)
    first = state(learn())
    torch.manual_seed(2)
    assert same(first, state(learn()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("recipe", ["hdrq", "qdrop"])
def test_half_precision_is_learned_in_float32(dtype, recipe):
    model = net().to(dtype)
    nearest = learn(model, CALIBRATION.to(dtype), recipe="rtn", iterations=0, bits="W2A4")
    knobs = {"weight_lr": 1e-2, "iterations": 150} if recipe == "qdrop" else {"bias_lr": 1e-4, "iterations": 60}
    result = learn(model, CALIBRATION.to(dtype), recipe=recipe, bits="W2A4", **knobs)
    full = fold(model, CALIBRATION.to(dtype))
    for layer in quantized_layers(result).values():
        quantizer = layer.weight_quantizer
        bias = layer.module.bias
        assert bias.dtype == dtype and type(bias) is nn.Parameter and not bias.requires_grad
        assert torch.equal(bias, full.get_submodule(layer.name).bias) == (recipe == "qdrop")
        assert layer.latent.dtype == layer.module.weight.dtype == dtype and quantizer.scale.dtype == torch.float32
        assert torch.equal(quantizer.values(quantizer.codes(layer.latent)).to(dtype), layer.latent)
    want = model(HELD_OUT.to(dtype)).float().detach()
    errors = [float((m(HELD_OUT.to(dtype)).float() - want).square().mean()) for m in (nearest, result)]
    assert errors[1] < 0.6 * errors[0]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_grad_mode_of_the_caller_does_not_matter(mode):
    model, want = net(), state(learn())
    with mode():
        assert same(want, state(learn(model)))


def test_distance_pulls_towards_the_source(monkeypatch):
    monkeypatch.setattr(QuantizedLayer, "settle", lambda layer: None)  # rounding would hide small steps
    model, source = net(), net()
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(0.03)

    def away(distance):
        result = learn(model, source=source, distance=distance, iterations=60, weight_step=0.0)
        pull = source_weights(source, result, calibration_calls(CALIBRATION))
        return [float((layer.latent.detach() - pull[n]).norm()) for n, layer in quantized_layers(result).items()]

    free, pulled = away(1e-9), away(5.0)
    assert all(b < 0.6 * a for a, b in zip(free, pulled, strict=True))


def test_source_is_folded_with_its_own_batchnorm():
    # a source that equals the model but for statistics that its weights make up for: folded, the two are one
    model, source = net(), net()
    with torch.no_grad():
        source[0].weight.mul_(2)
        source[1].running_mean.mul_(2)
        source[1].running_var.mul_(4).add_(3 * source[1].eps)
    quantized = learn(model, recipe="rtn", iterations=0)
    pull = source_weights(source, quantized, calibration_calls(CALIBRATION))
    folded = copy.deepcopy(model)
    fold_batchnorm(folded, lambda m: m(CALIBRATION))
    for name in ("0", "3", "6", "9"):
        torch.testing.assert_close(pull[name], folded.get_submodule(name).weight)


# --- phases and progress


def modes_seen(**options):
    """Mode, noise, keep, and stream and step of the quantizers of a one-layer model, at each training step."""
    seen = {WeightQuantizer: [], ActivationQuantizer: []}
    forward = {kind: kind.forward for kind in seen}

    def watch(kind):
        def wrapped(self, x):
            if torch.is_grad_enabled():  # a training step
                seen[kind].append((self.mode, self.noise, getattr(self, "keep", None), tuple(self.rng.tolist()[1:])))
            return forward[kind](self, x)

        return wrapped

    with pytest.MonkeyPatch.context() as patch:
        for kind in seen:
            patch.setattr(kind, "forward", watch(kind))
        learn(nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), **options)
    return seen[WeightQuantizer], seen[ActivationQuantizer]


def test_noise_first_then_the_real_quantizer():
    weights, inputs = modes_seen(iterations=20, fake_quant_fraction=0.25)
    assert [mode for mode, *_ in weights] == ["noise"] * 15 + ["round"] * 5
    assert [mode for mode, *_ in inputs] == ["round"] * 20
    assert {noise for _, noise, *_ in weights} == {"uniform"} and {keep for *_, keep, _ in inputs} == {0.5}
    assert [step for *_, (_, step) in weights] == list(range(20))  # noise drawn anew at each step
    assert {stream for *_, (stream, _) in weights}.isdisjoint({stream for *_, (stream, _) in inputs})


def test_official_preset_has_noise_on_activations_too():
    weights, inputs = modes_seen(iterations=20, preset="official")
    assert [mode for mode, *_ in weights] == [mode for mode, *_ in inputs] == ["noise"] * 16 + ["round"] * 4
    assert {noise for _, noise, *_ in (*weights, *inputs)} == {"empirical"}


def test_progress_is_told_of_every_block():
    steps = []
    learn(iterations=60, progress=steps.append)
    assert [(s.block, s.index, s.iteration) for s in steps] == [
        (name, index, i) for index, name in enumerate(("0", "3", "6", "9")) for i in (50, 60)
    ]
    assert all(s.blocks == 4 and s.iterations == 60 and s.loss > 0 for s in steps)


def test_report_says_how_it_went():
    model = net()
    result = learn(model, iterations=60, bits="W2A4", held_out=HELD_OUT)
    report = report_of(result)
    assert [b.name for b in report.blocks] == ["0", "3", "6", "9"]
    assert all(b.loss_after < b.loss_before and b.seconds > 0 for b in report.blocks)
    assert [(name, i) for name, i, _ in report.losses] == [(n, i) for n in ("0", "3", "6", "9") for i in (50, 60)]
    assert list(report.errors) == list(report.nearest) == ["0", "3", "6", "9", "output"]
    want = model(HELD_OUT).detach().double()
    output = float((result(HELD_OUT) - want).square().sum() / want.square().sum())
    assert report.errors["output"] == pytest.approx(output, rel=1e-4) and output < report.nearest["output"]
    nearest = learn(model, recipe="rtn", iterations=0, bits="W2A4", held_out=HELD_OUT)
    assert report_of(nearest).errors == report.nearest and report.peak_memory["host"] > 2**20
    with pytest.raises(ValueError, match=r"model must be the result of hdrq.quantize, got one without a report"):
        report_of(model)


# --- recipes


def test_presets_are_the_tables():
    paper, official = recipe("hdrq"), recipe("hdrq", "official")
    assert (paper.noise, paper.noise_activations, paper.weight_lr) == ("uniform", False, 1e-3)
    assert (official.noise, official.noise_activations, official.weight_lr) == ("empirical", True, 1e-4)
    for plan, tail in ((paper, 3500), (official, 4000)):
        assert (
            plan.iterations == 20_000
            and round(plan.fake_quant_fraction * plan.iterations) == tail
            and plan.distance == 5e-2
        )
    assert recipe("rtn").iterations == 0


def test_baselines_are_the_table():
    brecq, qdrop = recipe("brecq"), recipe("qdrop")
    assert brecq.learns == qdrop.learns == "rounding"
    assert (brecq.input_keep, brecq.activation_keep, qdrop.input_keep, qdrop.activation_keep) == (1, 1, 0.5, 0.5)
    assert {(r.fake_quant_fraction, r.distance, r.activation_lr) for r in (brecq, qdrop)} == {(1, 0, 4e-5)}


def test_hdrq_without_noise_and_distance_is_qdrops_loop():
    hdrq_, qdrop = recipe("hdrq", fake_quant_fraction=1, distance=0), recipe("qdrop", learns="weights")
    same_rates = {"weight_schedule": "cosine", "warmup": hdrq_.warmup}
    assert replace(hdrq_, name="qdrop") == replace(qdrop, **same_rates)
    states = [state(learn(recipe=r, iterations=6)) for r in (hdrq_, replace(qdrop, **same_rates))]
    assert same(*states)


def test_schedule():
    plan = recipe("qdrop", iterations=100, bias_lr=0.5)
    weights, activations, beta, rounding, biases = schedule(plan).T
    assert (weights == 1e-3).all() and activations[0] == pytest.approx(4e-5) and activations[50] == pytest.approx(2e-5)
    assert biases[0] == 0.5 and biases[50] == pytest.approx(0.25)
    assert not rounding[:20].any() and (rounding[20:] == 0.01).all()
    assert (beta[:21] == 20).all() and beta[60] == pytest.approx(11) and beta[99] == pytest.approx(2.225)
    cosine = schedule(replace(plan, beta_schedule="cosine"))[:, 2]
    assert cosine[60] == pytest.approx(11) and cosine[40] == pytest.approx(20 - 9 * (1 - 0.5**0.5), rel=1e-4)
    rate = schedule(recipe("hdrq", iterations=100))[:, 0]
    assert rate[0] == pytest.approx(1e-6) and rate[20] == pytest.approx(1e-3) and rate[60] == pytest.approx(5e-4)


def test_recipe_given_is_taken_with_knobs():
    plan = recipe(Recipe("own", iterations=7), fake_quant_fraction=1.0)
    assert (plan.name, plan.iterations, plan.fake_quant_fraction) == ("own", 7, 1.0)
    model = learn(recipe=Recipe("own", distance=0.0))
    assert model.hdrq_origin["recipe"]["name"] == "own" and model.hdrq_origin["recipe"]["iterations"] == 6


# --- calibration


class Named(nn.Module):
    """A model that is called with one or two arguments, by place or by name."""

    def __init__(self):
        super().__init__()
        self.body = net()

    def forward(self, image, bias=0.0):
        return self.body(image) + bias


def test_calibration_in_every_form_gives_the_same_bits():
    first, second = CALIBRATION.split(48)
    forms = [
        CALIBRATION,
        [first, second],
        [(first,), (second,)],
        [[first], [second]],
        [{"image": first}, {"image": second}],
        [{"image": first, "bias": 1.0}, {"image": second, "bias": 1.0}],
        iter([first, second]),
        [first, CALIBRATION[:0], second],
    ]
    states = [state(learn(Named().eval(), form)) for form in forms]
    assert all(same(states[0], other) for other in states[1:])


def test_model_of_two_tensors():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 5)

        def forward(self, x, y):
            return self.b(self.a(x) * y)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x, y = Two().eval(), torch.randn(20, 4), torch.randn(20, 5)
    first = learn(model, [(x, y)])
    assert same(state(first), state(learn(model, [{"x": x, "y": y}])))


# --- bad input


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"bits": "4"}, ValueError, "bits must be written like \"W4A4\", got '4'"),
        ({"bits": "W1A4"}, ValueError, r"weight bits must be in \[2, 16\], got 1"),
        ({"bits": "W17A4"}, ValueError, r"weight bits must be in \[2, 16\], got 17"),
        ({"bits": 4}, TypeError, "bits must be a string .* got int"),
        ({"seed": -1}, ValueError, r"seed must be in \[0, 9223372036854775807\], got -1"),
        ({"seed": 2**63}, ValueError, "seed must be in"),
        ({"seed": 0.5}, TypeError, "seed must be an int, got float"),
        ({"recipe": "adaround"}, ValueError, "recipe must be one of .*'hdrq'.*, got 'adaround'"),
        ({"preset": "mine"}, ValueError, "preset must be one of 'paper', 'official', got 'mine'"),
        ({"weight_rl": 1e-3}, ValueError, "knob must be one of .*'weight_lr'.*, got 'weight_rl'"),
        ({"recipe": "rtn"}, ValueError, 'iterations must be 0 for recipe "rtn", got 6'),
        (
            {"recipe": "qdrop", "fake_quant_fraction": 0.5},
            ValueError,
            'fake_quant_fraction must be 1 and distance 0 where learns="rounding"',
        ),
        ({"learns": "bits"}, ValueError, "learns must be one of 'weights', 'rounding', 'activations', got 'bits'"),
        ({"beta_end": 0.5}, ValueError, "beta_end must be finite and in"),
        ({"checkpoint_every": -1}, ValueError, "checkpoint_every must be in"),
        ({"held_out": CALIBRATION[:0]}, ValueError, "held_out must have at least one sample, got none"),
        ({"calibration": [CALIBRATION, CALIBRATION[:, :, 1:]]}, ValueError, "samples of one shape, got .* in batch 1"),
        ({"fake_quant_fraction": 1.5}, ValueError, r"fake_quant_fraction must be finite and in \[0, 1\], got 1.5"),
        ({"weight_lr": float("nan")}, ValueError, "weight_lr must be finite"),
        ({"iterations": -1}, ValueError, "iterations must be in"),
        ({"iterations": 2.0}, TypeError, "iterations must be an int, got float"),
        ({"per_channel": "no"}, ValueError, "per_channel must be one of False, True, got 'no'"),
        ({"distance": 5e-2}, ValueError, "source must be the model before its adaptation where distance > 0, got None"),
        ({"distance": 5e-2, "source": "net"}, TypeError, "source must be a torch.nn.Module, got str"),
        ({"distance": 5e-2, "source": net().train()}, ValueError, "source must be in evaluation mode"),
        ({"model": net().train()}, ValueError, "model must be in evaluation mode, got training mode"),
        ({"model": "net"}, TypeError, "model must be a torch.nn.Module, got str"),
        ({"calibration": None}, TypeError, "calibration must be a tensor or an iterable of batches, got NoneType"),
        ({"calibration": []}, ValueError, "calibration must have at least one sample, got none"),
        ({"calibration": CALIBRATION[:0]}, ValueError, "calibration must have at least one sample, got none"),
        ({"calibration": torch.tensor(1.0)}, ValueError, "samples along the first axis, got a scalar in batch 0"),
        ({"calibration": [CALIBRATION, (1.0,)]}, ValueError, "finite tensors, got a batch without a tensor in batch 1"),
        ({"calibration": [CALIBRATION / 0]}, ValueError, "finite tensors, got NaN or infinity in batch 0"),
    ],
)
def test_bad_input_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        learn(**options)


def test_nan_in_the_last_batch_is_found():
    broken = CALIBRATION.clone()
    broken[-1, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="got NaN or infinity in batch 1"):
        learn(calibration=[CALIBRATION, broken])


def test_source_of_another_shape_lists_its_layers():
    other = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 9, 1)).eval()
    with pytest.raises(
        ValueError, match=r"source must have the layers of model, got others: 3 \(\(12, 12, 3, 3\), got \(9"
    ) as e:
        learn(source=other, distance=5e-2)
    assert "9 ((6, 256), got missing)" in str(e.value)


def test_quantized_model_is_not_quantized_again():
    with pytest.raises(ValueError, match="model must have plain weights, got a parametrized one"):
        learn(learn(recipe="rtn", iterations=0))


def test_one_sample_is_quantized_with_a_warning():
    with pytest.warns(UserWarning, match="calibration has one sample"):
        model = learn(calibration=CALIBRATION[:1])
    assert model(HELD_OUT).isfinite().all()


@pytest.mark.parametrize("recipe", ["hdrq", "qdrop"])
def test_scales_stay_positive_and_finite_whatever_the_optimiser_does(recipe):
    for rates in ({"activation_lr": 1e3}, {"activation_lr": 1e38}):
        with suppress(hdrq.DivergenceError):
            model = learn(recipe=recipe, **rates)
            scales = torch.cat([q.scale for q in model.modules() if hasattr(q, "qmin")])
            assert ((scales > 0) & scales.isfinite()).all()


def test_divergence_names_the_layer_and_the_iteration(monkeypatch):
    def broken(self, i):
        if i == 7:
            with torch.no_grad():
                self.unit.layers[1].latent[0, 0] = torch.nan
        return "round"

    monkeypatch.setattr(Learner, "_phase", broken)
    with pytest.raises(
        hdrq.DivergenceError, match=r"block 0 must be finite, got nan at iteration 8, first in layer 0.1; "
    ) as e:
        learn(nn.Sequential(Pair(), Pair()).eval(), calibration=torch.randn(20, 4), iterations=60)
    assert (e.value.iteration, e.value.good) == (8, 0) and e.value.model is not None


class Pair(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(4, 4), nn.Linear(4, 4))


@pytest.mark.parametrize("per_channel", [False, True])
def test_weights_step_by_a_share_of_their_scale(per_channel, every_step_kept):
    """At a rate that would tear them apart, each weight stays within so many steps of Adam's, each bounded."""
    options = {"iterations": 4, "warmup": 0.0, "scale_step": 0.0, "bits": {"*": "W8A8"}, "per_channel": per_channel}
    full = fold(net(), CALIBRATION)

    def steps(**knobs):
        layers = quantized_layers(learn(weight_lr=10.0, fake_quant_fraction=1.0, **options, **knobs))
        return max(
            float(((layer.latent - full.get_submodule(name).weight) / per_element(layer)).abs().max())
            for name, layer in layers.items()
        )

    def per_element(layer):
        scale = layer.weight_quantizer.scale
        return scale.view(-1, *[1] * (layer.latent.ndim - 1))

    assert 1 < steps(weight_step=0.5) < 4 * 0.5 * 1.5 + 0.5 < steps(weight_step=0.0)


@pytest.mark.parametrize("recipe", ["hdrq", "brecq"])
def test_biases_are_learned_where_asked_for(recipe):
    """The mean that coarse weights shift comes back: the loss falls further; without a rate no bias moves."""
    model = net()
    full = fold(model, CALIBRATION)
    stays, learns = (learn(model, recipe=recipe, iterations=40, bits="W2A8", bias_lr=rate) for rate in (0.0, 1e-2))
    for result, moved in ((stays, False), (learns, True)):
        for name, layer in quantized_layers(result).items():
            assert torch.equal(layer.module.bias, full.get_submodule(name).bias) != moved
    assert error(learns, model) < 0.95 * error(stays, model)


@pytest.mark.parametrize("options", [{}, {"preset": "official"}])
def test_loss_that_is_not_finite_names_the_block(options):
    with pytest.raises(FloatingPointError, match=r"loss of block 0 must be finite, got (inf|nan) at iteration \d+"):
        learn(iterations=60, bias_lr=1e30, **options)


class Small(nn.Module):
    """The function of a network of ordinary weights, computed with weights and activations of other sizes."""

    def __init__(self, weights=1.0, activations=1.0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(16, 32, bias=False), nn.Linear(32, 16, bias=False)
        for layer in (self.first, self.second):
            layer.weight.data *= weights
        self.weights, self.activations = weights, activations

    def forward(self, x):
        x = self.first(x * self.activations).relu() / self.weights
        return self.second(x) / (self.weights * self.activations)


@pytest.mark.parametrize("recipe", ["hdrq", "qdrop", "brecq"])
@pytest.mark.parametrize("size", [{"weights": 1e-3}, {"weights": 1e-5}, {"activations": 1e-5}, {"activations": 1e-8}])
@pytest.mark.filterwarnings("ignore:block .* is rounded to nearest")
def test_rates_follow_the_size_of_what_is_learned(recipe, size):
    data, model = torch.randn(128, 16, generator=torch.Generator().manual_seed(0)), Small(**size).eval()
    options = {"bits": {"*": "W4A4"}, "progress": False}
    learned = hdrq.quantize(model, data, recipe, iterations=100, distance=0, **options)
    nearest = hdrq.quantize(model, data, "rtn", **options)
    with torch.no_grad():
        after, before = ((each(data) - model(data)).norm() for each in (learned, nearest))
    assert after < 1.1 * before


def test_a_unit_that_learning_made_worse_is_rounded_to_nearest_with_a_warning(monkeypatch):
    def worse(self):
        for layer in self.unit.layers:
            layer.latent.data.add_(0.5)

    monkeypatch.setattr(Parameters, "step", worse)
    with pytest.warns(UserWarning, match=r"block 0 is rounded to nearest: learning did not lower its loss of"):
        learned = learn(bias_lr=1e-3)
    assert same(state(learned), state(learn(recipe="rtn", iterations=0)))
    assert all(block.loss_after == block.loss_before for block in report_of(learned).blocks)


class Checkpointed(nn.Module):
    """Two layers that are computed anew during the backward pass, or under a decorator."""

    def __init__(self, wrap):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.wrap = wrap

    def inner(self, x):
        return x + self.second(self.first(x).relu())

    def forward(self, x):
        return self.wrap(self.inner, x)


def recomputed(run, x):
    return checkpoint(run, x, use_reentrant=False)


def without_gradient(run, x):
    with torch.no_grad():
        return run(x)


def in_inference_mode(run, x):
    with torch.inference_mode():
        return run(x)


@pytest.mark.parametrize("recipe", ["hdrq", "brecq"])
def test_a_block_that_recomputes_is_learned_alike(recipe):
    data = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    options = {"calibration": data, "recipe": recipe, "iterations": 20}
    results = [
        state(learn(nn.Sequential(Checkpointed(wrap), Checkpointed(wrap)).eval(), **options))
        for wrap in (recomputed, lambda run, x: run(x))
    ]
    assert same(*results)


@pytest.mark.parametrize("wrap", [without_gradient, in_inference_mode])
def test_a_block_without_gradient_is_refused_by_name(wrap):
    data = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(Checkpointed(wrap), Checkpointed(wrap)).eval()
    source = copy.deepcopy(model)
    for options in ({}, {"source": source, "distance": 1.0}):
        with pytest.raises(ValueError, match=r"block 0 must pass a gradient .* got none for 0\.first; 0\.second"):
            learn(model, calibration=data, **options)
