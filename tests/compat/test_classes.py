"""Modules that write a quantizer out, watched by ``patch``."""

import copy

import pytest
import torch
from helpers import assert_same_bits, sample
from standin import modules, states
from torch import nn

from hdrq.compat import patch

X = sample((6, 40), special=False)


def gradients(module, x):
    """The values of a call, and the gradients of x and of the parameters."""
    x = x.clone().requires_grad_()
    y = module(x)
    leaves = [x, *module.parameters()]
    found = torch.autograd.grad(y, leaves, sample(y.shape, seed=1, special=False), allow_unused=True)
    return y.detach(), found


def initialised(**options):
    quantizer = modules.UniformAffineQuantizer(4, **options)
    quantizer(X)
    return quantizer


def rounded(soft):
    quantizer = modules.AdaRoundQuantizer(initialised(channel_wise=True), X)
    quantizer.soft_targets = soft
    return quantizer


def observed():
    quantizer = modules.ObservingQuantizer()
    quantizer.observer_enabled.zero_()
    return quantizer


def stepped(signed):
    quantizer = modules.ActLSQ(signed=signed)
    quantizer(X)
    return quantizer


CASES = {
    "BRECQ's, one scale": (initialised, "rounding='quotient', gradient='round-first'"),
    "BRECQ's, learned": (lambda: initialised(leaf_param=True), "rounding='quotient', gradient='round-first'"),
    "BRECQ's, channels": (lambda: initialised(channel_wise=True), "rounding='quotient', gradient='round-first'"),
    "AdaRound, soft": (lambda: rounded(True), "AdaRound"),
    "AdaRound, hard": (lambda: rounded(False), "AdaRound, hard"),
    "LSQ's, signed": (lambda: stepped(True), "rounding='quotient', gradient='clamp-first'"),
    "LSQ's, unsigned": (lambda: stepped(False), "rounding='quotient', gradient='clamp-first'"),
    "an observer that is off": (observed, "rounding='quotient', gradient='round-first'"),
    "MQBench's": (modules.LearnedFakeQuantizer, "rounding='reciprocal', gradient='round-first'"),
    "MQBench's, channels": (
        lambda: modules.LearnedFakeQuantizer(6, symmetric=True),
        "rounding='reciprocal', gradient='round-first'",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_results_stay(name):
    build, form = CASES[name]
    want, expected = gradients(build(), X)
    module = build()
    with patch("standin") as patched:
        got, found = gradients(module, X)
        (record,) = (c for c in patched.classes if isinstance(module, c.original) and c.forms)
        assert dict(record.forms) == {form: 1} and not record.passed_on
    if "soft" in name:
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    else:
        assert_same_bits(got + 0.0, want + 0.0)
    for ours, theirs in zip(found, expected, strict=True):
        if ours is None:
            assert theirs is None or not theirs.any()
        else:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_what_changes_with_a_call_is_left_to_the_original():
    """Searching a scale, observing; a pass is run once, and a copy is tried."""
    for build in (modules.ObservingQuantizer, modules.ActLSQ, lambda: modules.UniformAffineQuantizer(4)):
        theirs, ours = build(), build()
        with patch("standin") as patched:
            (record,) = (c for c in patched.classes if c.original is type(ours))
            got = [ours(X), ours(2 * X)]
        want = [theirs(X), theirs(2 * X)]
        for a, b in zip(got, want, strict=True):
            assert_same_bits(a.detach() + 0.0, b.detach() + 0.0)
        assert any("changes a tensor" in why or "its forward pass sets" in why for why in record.passed_on)
        assert record.forms.total() == (0 if build is modules.ObservingQuantizer else 1)


def later(**attributes):
    """A change of what an object holds, between two calls."""

    def change(module, monkeypatch):
        for name, value in attributes.items():
            held = getattr(module, name)
            if isinstance(held, torch.Tensor):
                setattr(module, name, value) if held.shape != value.shape else held.copy_(value)
            else:
                setattr(module, name, value)

    return change


CHANGES = {
    "DroppingQuantizer": later(drop_prob=0.5),
    "ClampedZeroQuantizer": later(zero_point=torch.tensor(12.0)),
    "Quantizer": later(zero_point=torch.tensor(0.3)),
    "ReciprocalQuantizer": later(scale=torch.tensor(0.3)),
    "ChannelQuantizer": later(scale=torch.linspace(0.05, 0.5, 6), zero_point=torch.zeros(())),
    "SwitchedQuantizer": lambda module, monkeypatch: monkeypatch.setattr(states.SwitchedQuantizer, "enabled", False),
    "GlobalQuantizer": lambda module, monkeypatch: monkeypatch.setattr(states, "ENABLED", False),
    "OptionsQuantizer": lambda module, monkeypatch: module.options.update(off=True),
    "MaskQuantizer": later(mask=torch.zeros(6, 40)),
    "FloatSwitchQuantizer": later(signed=torch.zeros(1)),
    "RaisedQuantizer": later(scale=torch.tensor(0.01)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_verdict_holds_under_its_conditions_alone(name, monkeypatch):
    """What a pass reads is another one later: the results are the original's before and after."""
    results = []
    for replaced in (False, True):
        with monkeypatch.context() as inside:
            torch.manual_seed(0)
            module = getattr(states, name)(1.0) if name == "ReciprocalQuantizer" else getattr(states, name)()
            patched = patch("standin") if replaced else None
            first = module(X)
            CHANGES[name](module, inside)
            results.append((first, module(X), torch.rand(1)))
            if patched is not None:
                patched.undo()
    for got, want in zip(results[1], results[0], strict=True):
        assert_same_bits(got + 0.0, want + 0.0)
    assert not torch.equal(results[0][0], results[0][1])


def test_a_quotient_and_a_reciprocal_are_told_apart_whatever_the_scale():
    with patch("standin") as patched:
        for scale in torch.linspace(0.1, 0.9, 12):
            states.ReciprocalQuantizer(scale)(X)
        (record,) = (c for c in patched.classes if c.forms)
    assert {form.partition(",")[0] for form in record.forms} == {"rounding='reciprocal'"}


@pytest.mark.parametrize("scale", [0.3, -0.3, 1e-9, -1e-9])
@pytest.mark.parametrize("options", [{}, {"flip": False}, {"channels": 6}, {"channels": 6, "symmetric": True}])
def test_what_a_pass_makes_of_its_grid_in_place_is_made_of_it(options, scale):
    results = []
    for replaced in (False, True):
        module = modules.LearnedFakeQuantizer(**options)
        patched = patch("standin") if replaced else None
        module(X)
        module.scale.data[-1], module.zero_point.data[0] = scale, 40.0
        results.append((*gradients(module, X), module.state_dict()))
    patched.undo()
    (record,) = (c for c in patched.classes if c.forms)
    assert record.forms.total() == 2 and not record.passed_on
    (want, expected, theirs), (got, found, ours) = results
    assert_same_bits(got + 0.0, want + 0.0)
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_other_changes_in_place_are_the_originals():
    module = modules.QuantizerThatDoublesItsScale()
    with patch("standin") as patched:
        for _ in range(2):
            module(X)
            module.scale.data.fill_(1e-4)
        (record,) = (c for c in patched.classes if c.original is type(module))
    assert set(record.passed_on) == {"its forward pass changes a tensor of its own"} and not record.forms


def test_gradients_may_be_switched_off():
    module = states.GradModeQuantizer()
    with patch("standin"):
        for enabled in (True, False, True):
            with torch.set_grad_enabled(enabled):
                assert torch.equal(module(X), X) is not enabled


def test_a_trial_leaves_no_trace():
    """Nothing is drawn, no child is called, no gradient is left."""
    import random

    want = states.DrawingQuantizer()
    ours, held = copy.deepcopy(want), states.HoldingQuantizer()
    torch.manual_seed(0)
    random.seed(0)
    expected = want(X), torch.rand(3), random.random()
    torch.manual_seed(0)
    random.seed(0)
    with patch("standin") as patched:
        found = ours(X), torch.rand(3), random.random()
        held(X)
        reasons = {c.original.__name__: set(c.passed_on) for c in patched.classes}
    assert all(torch.equal(a, b) for a, b in zip(found[:2], expected[:2], strict=True)) and found[2] == expected[2]
    assert held.seen == 1
    assert reasons["DrawingQuantizer"] == {"its forward pass draws random numbers"}
    assert reasons["HoldingQuantizer"] == {"its forward pass reads a Identity, which may change unseen: observer"}


def test_a_factor_of_the_first_batch_is_none_of_ours():
    results = []
    for replaced in (False, True):
        module = states.SampleFactorQuantizer()
        patched = patch("standin") if replaced else None
        module(X[:1])
        module(X).sum().backward()
        results.append(module.scale.grad)
        if patched is not None:
            patched.undo()
    torch.testing.assert_close(*results)


def test_objects_share_a_verdict():
    tried = []
    with patch("standin") as patched:
        (record,) = (c for c in patched.classes if c.original is states.Quantizer)
        for _ in range(3):
            tried.append(states.Quantizer()(X))
        assert dict(record.forms) == {"rounding='quotient', gradient='round-first'": 3} and not record.passed_on
    assert all(torch.equal(tried[0], other) for other in tried)


@pytest.mark.parametrize("x", [torch.randn(1, 1), torch.randn(0, 4), torch.zeros(2, 3, dtype=torch.int64)])
def test_small_empty_and_integer_inputs(x):
    for kind in (modules.QuantizerOfFloors, *([modules.ActLSQ] if x.numel() else [])):
        theirs, ours = (kind(4) for _ in range(2))
        theirs(X), ours(X)
        with patch("standin"):
            assert torch.equal(ours(x), theirs(x))
            assert torch.equal(ours(x=x), theirs(x=x))
            assert torch.equal(ours(X), theirs(X))


def test_modes_that_record_or_transform_get_the_original():
    module = states.Quantizer()
    with patch("standin") as patched:
        with torch.inference_mode():
            module(X)
        torch.func.vmap(module)(X)
        torch.func.jvp(module, (X,), (X,))
        torch.func.grad(lambda x: module(x).sum())(X)
        assert all(not c.forms and not c.passed_on for c in patched.classes)


def test_a_fork_is_left():
    module = modules.QuantizerOfFloors(4)
    want = copy.deepcopy(module)(X)
    with patch("standin") as patched:
        module(X)
        assert_same_bits(module(X), want)
        (record,) = (c for c in patched.classes if c.original is modules.QuantizerOfFloors)
    assert record.passed_on["it computes otherwise than any quantizer that we know"] == 1 and not record.forms


def test_a_layer_that_holds_quantizers_is_none():
    layer = modules.QuantLayer(nn.Linear(40, 5))
    want = layer(X)
    with patch("standin") as patched:
        assert_same_bits(layer(X), want)
        report = patched.report()
    assert (
        "watched standin.modules.UniformAffineQuantizer: each object is compared at its first call; "
        "2 calls rounding='quotient', gradient='round-first'" in report
    )
    assert "watched standin.modules.QuantLayer: each object is compared at its first call\n" in report + "\n"


def test_undone_and_out_of_order():
    original = modules.UniformAffineQuantizer.forward
    patched = patch("standin")
    ours = modules.UniformAffineQuantizer.forward
    assert ours is not original
    modules.UniformAffineQuantizer.forward = original
    with pytest.raises(RuntimeError, match=r"UniformAffineQuantizer\.forward must be as the patch left it"):
        patched.undo()
    modules.UniformAffineQuantizer.forward = ours
    patched.undo()
    assert modules.UniformAffineQuantizer.forward is original


def test_a_block_learns_the_same_rounding():
    def reconstruct():
        torch.manual_seed(0)
        layer = nn.Linear(40, 8)
        target = layer(X).detach()
        quantizer = modules.UniformAffineQuantizer(3, channel_wise=True)
        quantizer(layer.weight.detach())
        rounding = modules.AdaRoundQuantizer(quantizer, layer.weight.detach())
        optimizer = torch.optim.Adam(rounding.parameters(), 1e-2)
        for _ in range(50):
            optimizer.zero_grad()
            loss = (nn.functional.linear(X, rounding(layer.weight), layer.bias) - target).square().mean()
            loss.backward()
            optimizer.step()
        rounding.soft_targets = False
        return loss.item(), rounding(layer.weight).detach()

    loss, weight = reconstruct()
    with patch("standin") as patched:
        ours, learned = reconstruct()
        (record,) = (c for c in patched.classes if c.original is modules.AdaRoundQuantizer)
    assert dict(record.forms) == {"AdaRound": 50, "AdaRound, hard": 1}
    assert ours == pytest.approx(loss, rel=1e-3)
    assert_same_bits(learned + 0.0, weight + 0.0)
