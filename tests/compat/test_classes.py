"""Modules that write a quantizer out, watched by ``patch``."""

import copy

import pytest
import torch
from helpers import assert_same_bits, sample
from standin import modules
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
