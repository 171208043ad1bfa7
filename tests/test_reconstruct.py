"""The block-wise loop: better than rounding, repeatable, on the grid, and clear about bad input."""

import copy

import pytest
import torch
from torch import nn

import hdrq
from hdrq.block import SMALLEST_SCALE, reconstruction_loss
from hdrq.calibration import calibration_calls
from hdrq.model import fold_batchnorm, input_quantizers, quantized_layers
from hdrq.quantizers import ActivationQuantizer, WeightQuantizer
from hdrq.recipes import Recipe, recipe
from hdrq.reconstruct import source_weights

torch.set_num_threads(1)

CALIBRATION = torch.randn((96, 3, 8, 8), generator=torch.Generator().manual_seed(0)).cumsum(3) * 0.5
HELD_OUT = torch.randn((64, 3, 8, 8), generator=torch.Generator().manual_seed(1)).cumsum(3) * 0.5


def net(seed=0):
    """Convolutions with BatchNorm, then a linear layer: the weights are random, so every bit counts."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(3, 12, 3, padding=1, bias=False),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.Conv2d(12, 12, 3, padding=1, bias=False),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.Conv2d(12, 16, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(256, 6),
        )
        with torch.no_grad():
            model(CALIBRATION)  # the statistics of BatchNorm
    return model.eval()


def error(model, reference):
    """Mean squared error of the outputs, relative to their variance, on data held out."""
    with torch.no_grad():
        want = reference(HELD_OUT)
        return float((model(HELD_OUT) - want).square().mean() / want.var())


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def learn(model=None, calibration=CALIBRATION, **options):
    return hdrq.quantize(model or net(), calibration, **{"bits": "W3A3", "iterations": 6, "distance": 0, **options})


# --- what is learned


@pytest.mark.parametrize("preset", ["paper", "official"])
def test_learned_is_well_below_round_to_nearest(preset):
    model = net()
    nearest = error(learn(model, recipe="rtn", iterations=0, bits="W2A4"), model)
    learned = error(learn(model, preset=preset, iterations=150, bits="W2A4"), model)
    assert learned < 0.5 * nearest


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
    assert len(scales) == 8 and all((s >= SMALLEST_SCALE).all() for s in scales)
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
    first, second, other = (state(learn(seed=seed)) for seed in (3, 3, 4))
    assert same(first, second)
    assert not torch.equal(first["3.parametrizations.weight.original"], other["3.parametrizations.weight.original"])


def test_global_random_state_does_not_matter():
    torch.manual_seed(1)
    first = state(learn())
    torch.manual_seed(2)
    assert same(first, state(learn()))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_grad_mode_of_the_caller_does_not_matter(mode):
    model, want = net(), state(learn())
    with mode():
        assert same(want, state(learn(model)))


def test_distance_pulls_towards_the_source(monkeypatch):
    for module in (hdrq.block, hdrq.reconstruct):
        monkeypatch.setattr(module, "settle", lambda layer: None)  # rounding would hide small steps
    model, source = net(), net()
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(0.03)

    def away(distance):
        result = learn(model, source=source, distance=distance, iterations=60)
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
    weights, inputs = modes_seen(iterations=20, tail=0.25)
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


def test_loss_sums_channels_and_averages_the_rest():
    images, tokens = torch.zeros(2, 5, 3, 3), torch.zeros(2, 7, 5)
    assert reconstruction_loss(images, images + 2) == reconstruction_loss(tokens, tokens + 2) == 20
    assert reconstruction_loss(torch.zeros(2, 5), torch.full((2, 5), 2.0)) == 20


# --- recipes


def test_presets_are_the_tables():
    paper, official = recipe("hdrq"), recipe("hdrq", "official")
    assert (paper.noise, paper.noise_activations, paper.weight_lr) == ("uniform", False, 1e-3)
    assert (official.noise, official.noise_activations, official.weight_lr) == ("empirical", True, 1e-4)
    for plan, tail in ((paper, 3500), (official, 4000)):
        assert plan.iterations == 20_000 and round(plan.tail * plan.iterations) == tail and plan.distance == 5e-2
    assert recipe("rtn").iterations == 0


def test_recipe_given_is_taken_with_knobs():
    plan = recipe(Recipe("own", iterations=7), tail=1.0)
    assert (plan.name, plan.iterations, plan.tail) == ("own", 7, 1.0)
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
        ({"tail": 1.5}, ValueError, r"tail must be finite and in \[0, 1\], got 1.5"),
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


@pytest.mark.parametrize("options", [{}, {"preset": "official"}])
def test_loss_that_is_not_finite_names_the_block(options):
    with pytest.raises(FloatingPointError, match=r"loss of block 0 must be finite, got (inf|nan) at iteration \d+"):
        learn(iterations=60, weight_lr=1e30, scale_step=1e30, **options)
