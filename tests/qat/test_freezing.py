"""The disorder of gradients, and what freezing by it drops: exactly that, and nothing where nothing is frozen."""

import json
import math

import pytest
import torch
from helpers import assert_same_bits, same, state
from networks import CALIBRATION, data, net
from torch import nn

from hdrq import qat
from hdrq.quantizers.layers import quantized_layers

LABELS = torch.arange(96) % 6


def prepared(**options):
    return qat.prepare(net(), CALIBRATION, **{"bits": "W3A3", **options}).train()


def closure_of(model, step=0):
    def closure():
        at = slice(8 * (step % 12), 8 * (step % 12) + 8)
        loss = nn.functional.cross_entropy(model(CALIBRATION[at]), LABELS[at])
        loss.backward()
        return loss.detach()

    return closure


def optimizer_of(model, freezer=None, kind=qat.SAGM, **options):
    return kind(torch.optim.SGD(model.parameters(), 0.05, **options), model, rho=0.5, freezer=freezer)


def fed(freezer, signs):
    """A freezer's answer to scales' gradients of these signs by step: the task's, or that of both terms."""
    for row in signs:
        g = {id(scale): torch.full_like(scale, float(row[name])) for name, scale in freezer.scales.items()}
        freezer.step(lambda p, g=g: (g[id(p)], 10 * g[id(p)]) if id(p) in g else (p * 0 + 1, p * 0 + 2))
    return freezer


def signs_of(freezer, steps, unstable=()):
    return [{n: (-1) ** k if n in unstable else 1 for n in freezer.scales} for k in range(steps)]


def test_disorder_of_constant_alternating_and_random_signs():
    x = data(400, 5).abs() + 0.1
    turns = torch.tensor([1.0, -1.0]).repeat(200)[:, None]
    assert qat.disorder(x) == 0 and qat.disorder(-x) == 0 and qat.disorder(x * turns) == 1
    assert qat.disorder(data(4000, 5)) == pytest.approx(0.5, abs=0.02)
    half = torch.tensor([1.0, 1, -1, -1, 1])
    assert qat.disorder(half) == 0.5
    assert qat.disorder(torch.stack([half, torch.ones(5)], 1)) == 0.25


def test_disorder_is_that_of_positive_multiples():
    x = data(50, 7)
    assert qat.disorder(x) == qat.disorder(x * 1e-20) == qat.disorder(x * (data(50, 7, seed=1).abs() + 1e-3))


def test_zeros_are_no_signs():
    assert qat.disorder(torch.tensor([1.0, 0, 0, 1, 0, -1])) == 0.5  # 1 → 1 → −1
    assert all(math.isnan(qat.disorder(torch.tensor(x))) for x in ([0.0, -0.0, 1, 0], [0.0, 0.0]))  # nothing to compare


@pytest.mark.parametrize("kind", [qat.SAM, qat.SAGM])
def test_never_freezing_is_the_optimizer_without_a_freezer_to_the_bit(kind):
    def run(rule=None):
        model = prepared()
        freezer = None if rule is None else qat.DisorderFreezer(model, period=2, **rule)
        optimizer = optimizer_of(model, freezer, kind, momentum=0.9)
        for step in range(6):
            optimizer.step(closure_of(model, step))
        return state(model), freezer

    plain, _ = run()
    after, freezer = run({"tau": 0.0})
    assert same(plain, after)
    assert len(freezer.history) == 3 and not any(one["frozen"] for one in freezer.history)
    assert not same(plain, run({"tau": 1.0})[0])


@pytest.mark.parametrize("kind", [qat.SAM, qat.SAGM])
@pytest.mark.parametrize("term", ["task", "smooth"])
def test_freezing_a_scale_changes_its_update_alone_by_the_dropped_term(kind, term):
    def step(frozen):
        model = prepared(per_channel=True)
        freezer = qat.DisorderFreezer(model, freeze=term)
        freezer.frozen = frozen
        gradients = []

        def second():
            loss = closure_of(model)()
            gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
            return loss

        optimizer_of(model, freezer, kind).step(second)
        return model, gradients

    plain, (first, second) = step([])
    frozen, _ = step(["3.weight"])
    name = "3.parametrizations.weight.0.scale"
    terms = {
        (qat.SAM, "task"): first[name],
        (qat.SAM, "smooth"): second[name] - first[name],
        (qat.SAGM, "task"): 0.5 * first[name],
        (qat.SAGM, "smooth"): 0.5 * second[name],
    }
    changed = {n for n, p in frozen.named_parameters() if not torch.equal(p, plain.get_parameter(n))}
    assert changed == {name}
    dropped = plain.get_parameter(name).grad - frozen.get_parameter(name).grad
    torch.testing.assert_close(dropped, terms[kind, term], rtol=1e-4, atol=1e-7)
    other = {"task": "smooth", "smooth": "task"}[term]
    assert_same_bits(frozen.get_parameter(name).grad, terms[kind, other])


def test_what_is_left_may_count_in_full():
    model = prepared()
    freezer = qat.DisorderFreezer(model, compensate=True)
    freezer.frozen = ["3.weight"]
    scale = freezer.scales["3.weight"]
    freezer.step(lambda p: (torch.ones_like(p), 3 * torch.ones_like(p)))
    assert scale.grad.tolist() == [6.0]


@pytest.mark.parametrize(
    ("preset", "frozen", "left"),
    [("gaqat_a", "stable", 10.0), ("gaqat_b", "stable", 1.0), ("fqat", "unstable", None), ("forever", "stable", 10.0)],
)
def test_presets(preset, frozen, left):
    model = prepared()
    freezer = qat.DisorderFreezer(model, preset, period=4)
    unstable = {"3.weight", "3.input"}
    fed(freezer, signs_of(freezer, 4, unstable))
    want = unstable if frozen == "unstable" else set(freezer.scales) - unstable
    want = {name.rpartition(".")[0] for name in want} if preset == "fqat" else want
    assert set(freezer.frozen) == want == set(freezer.history[0]["frozen"])
    for p in model.parameters():
        p.grad = torch.full_like(p, 7.0)
    fed(freezer, signs_of(freezer, 1))
    untouched = {n for n, p in model.named_parameters() if p.grad is not None and (p.grad == 7).all()}
    if preset == "fqat":
        layer = quantized_layers(model)["3"]
        gone = {n for n, p in model.named_parameters() if p.grad is None}
        assert layer.latent.grad is None and gone == {n for n, _ in model.named_parameters() if n.startswith("3.")}
        assert untouched == {n for n, _ in model.named_parameters()} - gone
    else:
        for name, scale in freezer.scales.items():
            assert scale.grad.tolist() == [left if name in want else 7.0]
        assert {n for n, _ in model.named_parameters() if not n.endswith("scale")} <= untouched


def test_terms_take_turns():
    freezer = qat.DisorderFreezer(prepared(), "alternate", period=2)
    seen = []
    for _ in range(6):
        fed(freezer, signs_of(freezer, 1))
        seen.append({float(scale.grad) for scale in freezer.scales.values()})
    assert seen == [{1.0}, {1.0}, {10.0}, {10.0}, {1.0}, {1.0}] and freezer.history == []


def test_a_frozen_layer_is_still_watched_and_thaws_unless_forever():
    for preset, after in (("gaqat_a", []), ("forever", ["3.weight"])):
        freezer = qat.DisorderFreezer(prepared(), preset, period=4)
        others = set(freezer.scales) - {"3.weight"}
        fed(freezer, signs_of(freezer, 4, others))
        assert freezer.frozen == ["3.weight"]
        fed(freezer, signs_of(freezer, 4, freezer.scales))
        assert freezer.frozen == after and [one["step"] for one in freezer.history] == [4, 8]


def test_a_window_slides():
    freezer = qat.DisorderFreezer(prepared(), period=4, every=1, tau=0.3)
    signs = [1, 1, 1, 1, -1, 1, 1, 1, 1, 1]
    fed(freezer, [dict.fromkeys(freezer.scales, sign) for sign in signs])
    found = [one["disorder"]["3.weight"] for one in freezer.history]
    assert found == [qat.disorder(torch.tensor(signs[k : k + 4]).float()) for k in range(7)]
    assert [bool(one["frozen"]) for one in freezer.history] == [value < 0.3 for value in found]


def test_gradients_of_a_layer_are_watched_together_and_zeros_decide_nothing():
    freezer = qat.DisorderFreezer(prepared(), granularity="layer", period=4)
    fed(freezer, signs_of(freezer, 4, {"3.weight"}))
    assert freezer.history[0]["disorder"]["3"] == 0.5  # 1 of its weight, 0 of its input
    freezer = fed(qat.DisorderFreezer(prepared(), period=4), [dict.fromkeys(freezer.scales, 0)] * 4)
    assert freezer.frozen == [] and set(freezer.history[0]["disorder"].values()) == {None}


def test_a_state_goes_on_with_the_same_decisions():
    def run(stop=None):
        model = prepared(per_channel=True)
        freezer = qat.DisorderFreezer(model, period=3, every=2, tau=0.4)
        optimizer = optimizer_of(model, freezer)
        for step in range(9):
            if step == stop:
                kept = freezer.state_dict()
                signs = kept.pop("signs")
                kept = {**json.loads(json.dumps(kept)), "signs": signs}
                optimizer.freezer = freezer = qat.DisorderFreezer(model, period=3, every=2, tau=0.4)
                freezer.load_state_dict(kept)
            optimizer.step(closure_of(model, step))
        return state(model), freezer.history

    whole, history = run()
    for stop in (1, 4, 6):
        parts, again = run(stop)
        assert same(whole, parts) and history == again
    assert any(0 < len(one["frozen"]) < 8 for one in history)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"period": 1}, r"period must be in \[2, 1048576\], got 1"),
        ({"tau": 1.5}, r"tau must be finite and in \[0, 1\], got 1.5"),
        ({"preset": "gaqat"}, "preset must be one of 'gaqat_a', .* got 'gaqat'"),
        ({"threshold": 1}, "rule must be one of 'period', .* got 'threshold'"),
        ({"target": "layer"}, 'granularity must be "layer" with target="layer", got \'quantizer\''),
        ({"every": 300}, r"every must be in \[1, 200\], got 300"),
    ],
)
def test_refused_rules(options, message):
    with pytest.raises(ValueError, match=message):
        qat.DisorderFreezer(prepared(), **options)


def test_refused_models_optimizers_and_states():
    with pytest.raises(ValueError, match=r"model must be prepared by hdrq.qat.prepare, got a Sequential whose scales"):
        qat.DisorderFreezer(net())
    model = prepared()
    with pytest.raises(ValueError, match=r"optimizer must have the scales that freezer watches, got none of 0.weight"):
        optimizer_of(prepared(), qat.DisorderFreezer(model))
    with pytest.raises(ValueError, match=r"compensate must be False but with SAGM"):
        optimizer_of(model, qat.DisorderFreezer(model, compensate=True), qat.SAM)
    freezer = fed(qat.DisorderFreezer(model, period=4), signs_of(qat.DisorderFreezer(model), 2))
    with pytest.raises(ValueError, match=r"state must be of a freezer of this model and rule, with \(5, 8\) signs"):
        qat.DisorderFreezer(model, period=5).load_state_dict(freezer.state_dict())
    with pytest.raises(ValueError, match=r"gradients must be a sequence of two or more, got \(1,\)"):
        qat.disorder(torch.ones(1))
