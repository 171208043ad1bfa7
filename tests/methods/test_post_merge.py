"""Quantized merges of experts: each layer against its objective, limits, controls, and what is refused."""

import os

import pytest
import torch
from helpers import same, state
from networks import CALIBRATION, blocks_net, data, net
from torch import nn

import hdrq
from hdrq.calibrate.data import calibration_calls
from hdrq.calibrate.gptq import gptq
from hdrq.calibrate.least_squares import anchored
from hdrq.calibrate.moments import second_moments
from hdrq.calibrate.sequential import Fitted
from hdrq.evaluate.averaging import average
from hdrq.methods.post_training import fold
from hdrq.quantizers.layers import quantized_layers
from hdrq.report import report_of

TASKS = [CALIBRATION, CALIBRATION.flip(2) + 0.5, CALIBRATION.mT * 1.5]
BASE = net()


def expert(number, distance=0.4):
    """The base, moved: experts of one origin can be merged."""
    model = net()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(data(*p.shape, seed=100 * number + len(name)) * distance * p.abs().mean())
        model.train()(TASKS[number])  # the statistics of its BatchNorms
    return model.eval()


EXPERTS = [expert(k) for k in range(3)]


def merged(experts=EXPERTS, tasks=TASKS, **options):
    options = {"bits": {"*": "W4A16"}, "group_size": None, "progress": False, **options}
    return hdrq.post_merge(experts, tasks, **options)


def deviation(model, experts=EXPERTS):
    """How far a model's outputs are from those of each task's expert."""
    with torch.no_grad():
        pairs = [(model(x), own(x)) for x, own in zip(TASKS, experts, strict=True)]
    return sum(float((y - want).square().mean() / want.var()) for y, want in pairs)


def layers_of(model):
    return [layer for block in report_of(model).blocks for layer in block.layers]


@pytest.fixture(scope="module")
def guided():
    return merged()


@pytest.fixture(scope="module")
def folded():
    return [fold(model, x) for model, x in zip(EXPERTS, TASKS, strict=True)]


def test_the_experts_guide_beyond_what_rounding_alone_can(guided):
    nearest, gptq = merged(method="rtn"), merged(method="gptq")
    assert deviation(guided) < 0.9 * deviation(gptq) and deviation(guided) < 0.9 * deviation(nearest)
    assert all(layer.best < layer.error < layer.nearest for layer in layers_of(guided))
    control = merged(method="regmean", stream="merged", lam=0.01, bias="solve")
    assert not quantized_layers(control) and isinstance(control, nn.Sequential)
    assert deviation(control) < deviation(guided)
    assert all(layer.error == pytest.approx(layer.best, rel=1e-4) for layer in layers_of(control))


@pytest.mark.parametrize(("weighting", "lam"), [("count", 0.05), ("norm", 0.0)])
def test_weights_before_rounding_are_the_least_squares_behind_the_finished_prefix(folded, weighting, lam):
    """At 16 bits rounding moves nothing: what is left are the solutions, layer after layer."""
    model = merged(bits={"*": "W16A16"}, weighting=weighting, lam=lam, bias="keep")
    layers = quantized_layers(model)
    moments = [second_moments(model, calibration_calls(x), layers) for x in TASKS]
    start = fold(hdrq.post_merge(EXPERTS, TASKS, method="regmean", lam=1e12, progress=False), TASKS[0])
    for name, layer in layers.items():
        own = [m[name] for m in moments]
        shares = [1 / (m.rows if weighting == "count" else float(m.hessian.norm())) for m in own]
        weights = [own[0].matrices(m.get_submodule(name).weight)[0] for m in (start, *folded)]
        want = anchored(weights[0], weights[1:], [m.hessian[0] for m in own], shares, lam).weight
        found = own[0].matrices(layer.latent)[0].double()
        excited = (want - found) @ torch.linalg.qr(own[0].hessian[0] + own[1].hessian[0] + own[2].hessian[0])[0]
        assert excited.abs().max() < 5e-3 * want.abs().max(), name


def test_solved_biases_are_the_best_that_the_weights_allow(guided, folded):
    """A bias that is moved in any direction is worse: the mean of the outputs' errors, over tasks, is 0."""
    calls = [calibration_calls(x) for x in TASKS]
    layer, name = guided[3], "3"
    moments = [second_moments(guided, c, [name])[name] for c in calls]
    errors = []
    for own, m in zip(folded, moments, strict=True):
        target = own.get_submodule(name)
        change = m.matrices(layer.weight.double() - target.weight.double())[0]
        errors.append((change @ m.sums[0] + m.rows * (layer.bias - target.bias).double()) / m.rows)
    size = sum(error.abs().mean() for error in errors)
    merge = average(folded).get_submodule(name).bias
    pull = 0.01 * (layer.bias - merge).double()  # of the anchor, at most of this order
    assert (sum(errors).abs().mean() - pull.abs().mean()) < 0.1 * size


def test_with_biases_solved_weights_are_rounded_for_what_a_bias_cannot_make_up(guided, folded):
    own = [second_moments(guided, calibration_calls(x), ["3"])["3"] for x in TASKS]
    merge = merged(method="regmean", lam=1e12)[3]
    layers = (merge, *(model[3] for model in folded))
    merge, *experts = (torch.cat([own[0].matrices(m.weight)[0], m.bias[:, None]], 1) for m in layers)
    found = anchored(merge, experts, [m.with_ones()[0] for m in own], [1 / m.rows for m in own], 0.01)
    h = found.hessian
    rest = h[:-1, :-1] - torch.outer(h[:-1, -1], h[-1, :-1]) / h[-1, -1]
    layer = quantized_layers(guided)["3"]
    quantizer, weight = layer.weight_quantizer, found.weight[:, :-1]
    codes, joint = (gptq(weight, each, quantizer.scale, -8, 7).codes for each in (rest, h[:-1, :-1]))
    got = own[0].matrices(quantizer.codes(layer.latent))[0]
    assert (got != codes).float().mean() < 0.01 < (got != joint).float().mean()


def test_scales_of_activations_are_searched_on_every_task():
    tasks = [TASKS[0], TASKS[0], TASKS[0] * 8]
    for quantizer in (merged(tasks=tasks, bits={"*": "W8A8"}, method=m)[0].input_quantizer for m in ("epmq", "rtn")):
        assert float(quantizer.scale) * quantizer.qmax > 0.5 * tasks[2].max()


def test_equal_experts_are_quantized_as_one_model_is():
    three, gptq = (
        merged([EXPERTS[0]] * 3, [TASKS[0]] * 3, lam=0.3, bias="solve", method=method) for method in ("epmq", "gptq")
    )
    assert same(state(three), state(gptq))


def test_a_strong_anchor_is_nearest_rounding_of_the_merge():
    assert same(state(merged(lam=1e9, bias="keep")), state(merged(method="rtn")))


def test_regmean_is_the_solution_on_the_experts_own_inputs(folded):
    found = merged(method="regmean")
    moments = [second_moments(own, calibration_calls(x), ["6"])["6"] for own, x in zip(folded, TASKS, strict=True)]
    targets = [m.matrices(own[6].weight)[0] for own, m in zip(folded, moments, strict=True)]
    want = anchored(targets[0], targets, [m.hessian[0] for m in moments], [1 / m.rows for m in moments]).weight
    torch.testing.assert_close(moments[0].matrices(found[6].weight)[0].double(), want, rtol=0, atol=1e-4)
    assert not torch.equal(found[6].weight, merged(method="regmean", stream="merged")[6].weight)


def test_blocks_learn_what_each_expert_does_on_its_own_task():
    """More than the same blocks learn from the merge, at the same rates."""
    how = {"bits": {"*": "W3A16"}, "iterations": 80, "weight_lr": 1e-2, "bias_lr": 1e-2}
    own = merged(method="hdrq", **how)
    alone = hdrq.quantize(average(EXPERTS), TASKS, "hdrq", per_channel=True, distance=0.0, progress=False, **how)
    assert deviation(own) < 0.9 * deviation(alone)
    assert deviation(own) < 0.9 * deviation(merged(method="rtn", bits={"*": "W3A16"}))


def test_a_unit_reads_and_aims_at_the_experts_rows(folded, monkeypatch):
    seen = {}

    class Watching:
        fits = ("weights", "activations")

        def __init__(self, recipe, anchor, *rest):
            seen["anchor"] = anchor

        def fit(self, unit, journal):
            seen[unit.name] = unit.full[0].tensor.clone(), unit.target.tensor.clone()
            return Fitted({}, {"loss_before": 0.0, "loss_after": 0.0})

    monkeypatch.setattr("hdrq.methods.post_merge.Reconstruction", Watching)
    merged(method="hdrq", blocks=["3", "6", "9"], distance=0.1)
    for k, (own, x) in enumerate(zip(folded, TASKS, strict=True)):
        with torch.no_grad():
            entered = own[:6](x)
            left = own[6](entered)
        for rows, want in zip(seen["6"], (entered, left), strict=True):
            torch.testing.assert_close(rows[96 * k : 96 * (k + 1)], want)
    means = sum(own[6].weight for own in folded) / 3
    assert seen["anchor"]["6"].shape == means.shape and seen["anchor"].keys() == {"0", "3", "6", "9"}
    merged(method="hdrq")
    assert seen["anchor"] == {}


def test_merges_are_chosen_and_one_expert_is_found_again():
    options = {"base": BASE, "merge": "task-arithmetic", "lam": 0.0, "merge_options": {"scale": 0.3}}
    alone = merged(EXPERTS[:1], TASKS[:1], **options, bits={"*": "W8A16"})
    assert float((alone(TASKS[0]) - EXPERTS[0](TASKS[0])).norm() / EXPERTS[0](TASKS[0]).norm()) < 0.04
    ties = [merged(base=BASE, merge="ties", merge_options={"aggregate": a}, method="rtn") for a in ("mean", "sum")]
    assert not same(state(ties[0]), state(ties[1]))


def test_unexcited_inputs_keep_the_merge_and_are_counted():
    dark = [x.clone() for x in TASKS]
    for x in dark:
        x[:, 1] = 0
    model = merged(tasks=dark, lam=0.0, method="regmean", stream="merged")
    # Nothing excites the second channel: its 9 weights stay those of the merge.
    merge = merged(tasks=dark, lam=1e12, method="regmean")
    assert layers_of(model)[0].unexcited >= 9
    torch.testing.assert_close(model[0].weight[:, 1], merge[0].weight[:, 1])
    assert not torch.allclose(model[0].weight[:, 0], merge[0].weight[:, 0], rtol=1e-3)


def test_layers_of_other_kinds_are_the_merge_rounded_to_nearest():
    x = data(48, 3, 8, 8)
    experts = [blocks_net(), blocks_net()]
    experts[1][0].weight.data *= 1.1
    with pytest.warns(UserWarning, match=r"recipe epmq could not serve 0 \(rounded to nearest"):
        found = hdrq.post_merge(experts, [x, x + 1], bits="W4A8", group_size=None, progress=False)
    nearest = hdrq.post_merge(experts, [x, x + 1], bits="W4A8", group_size=None, progress=False, method="rtn")
    assert torch.equal(found[0].weight, nearest[0].weight) and not torch.equal(found[5].weight, nearest[5].weight)


def test_the_file_has_how_it_was_made_and_loads(guided, tmp_path):
    hdrq.save(guided, tmp_path / "q.safetensors")
    loaded = hdrq.load(tmp_path / "q.safetensors", net())
    assert torch.equal(loaded(CALIBRATION), guided(CALIBRATION))
    from hdrq.quantizers.provenance import origin

    made = origin(loaded)["post_merge"]
    assert (made["method"], made["merge"], made["lam"], made["bias"]) == ("epmq", "average", 0.01, "solve")
    assert len(made["experts"]) == 3 and origin(loaded)["recipe"]["name"] == "epmq"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lam": -0.1}, "lam must be finite and in"),
        ({"method": "magic"}, "method must be one of 'epmq'"),
        ({"method": "rtn", "lam": 0.1}, 'lam must be left out with method="rtn", got 0.1'),
        ({"method": "awq", "stream": "experts"}, 'stream must be left out with method="awq"'),
        ({"method": "qdrop", "lam": 0.1}, 'lam must be left out with method="qdrop", got 0.1'),
        ({"weighting": "size"}, "weighting must be one of"),
        ({"tasks": TASKS[:2]}, "calibration must be as many data as the experts, 3, got 2"),
        ({"tasks": [*TASKS[:2], TASKS[2][:0]]}, r"calibration\[2\] must have at least one sample, got none"),
        ({"tasks": [*TASKS[:2], TASKS[2] * torch.nan]}, r"calibration\[2\] must be batches of finite tensors, got NaN"),
        ({"tasks": [*TASKS[:2], TASKS[2][..., 1:]]}, r"calibration must have samples of one shape .* calibration\[2\]"),
        ({"experts": [*EXPERTS[:2], nn.Sequential(*EXPERTS[2][:-1]).eval()]}, r"experts\[2\] must be alike .* 9.bias"),
        ({"resume": True}, "workdir must be the folder of the run to resume, got None"),
        ({"merge": "ties"}, "base must be the model that the experts were trained from"),
        ({"group_size": 128}, None),
        ({"group_size": 100}, "group_size must divide the 256 inputs of 9, got 100"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    if message is None:
        merged(**change)
        return
    with pytest.raises(ValueError, match=message):
        merged(**change)
    with pytest.raises(TypeError, match="calibration must be a list of data, one for each of the experts, got Tensor"):
        merged(tasks=CALIBRATION)


@pytest.mark.parametrize("method", ["hdrq", "epmq"])
def test_a_killed_run_goes_on_to_the_same_bits(method, tmp_path, monkeypatch):
    learned = {"iterations": 6, "checkpoint_every": 2} if method == "hdrq" else {}
    first, second, third = (*TASKS[0].chunk(2), TASKS[1])
    how = {"experts": EXPERTS[:2], "tasks": [[first], [second, third]], "method": method, **learned}
    replace, left = os.replace, iter(range(4 if learned else 2))

    def failing(source, target):
        if str(target).endswith(".safetensors") and next(left, None) is None:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing)
        with pytest.raises(KeyboardInterrupt):
            merged(**how, workdir=tmp_path)
    kept = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert kept == ["block-000.safetensors", "current.safetensors" if learned else "block-001.safetensors"]
    for change, message in (
        ({"experts": EXPERTS[1:]}, r"experts \("),
        ({"tasks": TASKS[1:]}, r"calibration \("),
        ({"tasks": [[first, second], [third]]}, r"got others: tasks \("),
        ({"merge": "task-arithmetic", "base": BASE}, r"base \(None, now \w+\); merge \("),
        ({"method": "gptq", "lam": None}, r"method \("),
        ({"lam": 0.5, "method": "epmq"}, r"lam \("),
        ({"damping": 0.5}, r"recipe.damping \("),
    ):
        given = {**how, **change, "workdir": tmp_path, "resume": True}
        given = {key: value for key, value in given.items() if given["method"] == "hdrq" or key not in learned}
        with pytest.raises(ValueError, match=f"resume must have what the run in .* {message}"):
            merged(**given)
    steps = []
    resumed = merged(**how, workdir=tmp_path, resume=True, progress=steps.append)
    assert min(step.index for step in steps) == len(kept) - bool(learned)
    assert same(state(resumed), state(merged(**how)))


def test_a_model_in_training_mode_is_refused_by_its_number():
    with pytest.raises(ValueError, match=r"experts\[1\] must be in evaluation mode"):
        merged([net(), net().train()], TASKS[:2])
