"""Least squares with targets and an anchor: the identities that its equations have."""

import pytest
import torch
from networks import data

import hdrq
from hdrq.calibrate.gptq import gptq
from hdrq.calibrate.least_squares import anchored, energy

INPUTS = [data(90, 16, seed=k) @ data(16, 16, seed=9) for k in range(3)]
H = [x.double().T @ x.double() for x in INPUTS]
EXPERTS = [data(6, 16, seed=20 + k) for k in range(3)]
MERGED = sum(EXPERTS) / 3
SHARES = [1 / 90, 2 / 90, 0.5 / 90]


def objective(weight, lam):
    """J, written out."""
    total = sum(a * h for a, h in zip(SHARES, H, strict=True))
    parts = zip(SHARES, INPUTS, EXPERTS, strict=True)
    error = sum(a * float(((weight.double() - w.double()) @ x.T.double()).square().sum()) for a, x, w in parts)
    return error + lam * float(total.diagonal().mean()) * float((weight.double() - MERGED.double()).square().sum())


def solved(lam, merged=MERGED, experts=EXPERTS):
    return anchored(merged, experts, H, SHARES, lam)


def test_one_expert_without_an_anchor_is_that_expert():
    found = anchored(MERGED, EXPERTS[:1], H[:1], [1.0], 0.0)
    torch.testing.assert_close(found.weight, EXPERTS[0].double(), rtol=0, atol=1e-9)
    assert abs(found.error) < 1e-9 * found.merged_error and found.unexcited == 0


@pytest.mark.parametrize("lam", [0.0, 1e-3, 1.0, 1e6])
def test_equal_experts_give_the_merged_weight_to_the_bit(lam):
    found = solved(lam, experts=[MERGED] * 3)
    assert torch.equal(found.weight, MERGED.double()) and found.error == found.merged_error == 0


@pytest.mark.parametrize("lam", [0.0, 1e-2, 3.0])
def test_the_objective_is_least_at_the_solution_and_a_square_around_it(lam):
    found, moved = solved(lam), MERGED + data(6, 16, seed=50)
    best = objective(found.weight, lam)
    assert found.error == pytest.approx(best, rel=1e-9)
    assert found.merged_error == pytest.approx(objective(MERGED, lam), rel=1e-9)
    for weight in (MERGED, moved, EXPERTS[0]):
        gain = objective(weight, lam) - best
        assert gain > 0
        assert energy(weight.double() - found.weight, found.hessian) == pytest.approx(gain, rel=1e-8)


def test_a_strong_anchor_is_the_merged_weight_rounded_to_nearest():
    found, scale = solved(1e9), MERGED.abs().amax(1) / 7
    torch.testing.assert_close(found.weight, MERGED.double(), rtol=0, atol=1e-7)
    codes = gptq(found.weight, found.hessian, scale, -8, 7).codes
    assert torch.equal(codes, hdrq.ops.quantize(MERGED, scale, -8, 7, axis=0))


def test_what_no_input_excites_stays_merged_and_is_counted():
    mixing = torch.eye(16)
    mixing[:, 3], mixing[:, 5] = 0, mixing[:, 4]  # an input that is always 0, and two that are always equal
    hessians = [((x @ mixing).T @ (x @ mixing)).double() for x in INPUTS]
    found = anchored(MERGED, EXPERTS, hessians, SHARES, 0.0)
    assert found.unexcited == 2 and torch.equal(found.weight[:, 3], MERGED[:, 3].double())
    change = found.weight - MERGED.double()
    torch.testing.assert_close(change[:, 4], change[:, 5])
    assert anchored(MERGED, EXPERTS, hessians, SHARES, 1e-3).unexcited == 0
    nothing = anchored(MERGED, EXPERTS, [torch.zeros(16, 16)] * 3, SHARES, 0.0)
    assert torch.equal(nothing.weight, MERGED.double()) and nothing.unexcited == 16


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="lam must be finite and in"):
        solved(-1.0)
    with pytest.raises(ValueError, match=r"hessians\[1\] must be finite, got 256 of 256"):
        anchored(MERGED, EXPERTS, [H[0], H[1] * torch.nan, H[2]], SHARES)
    with pytest.raises(ValueError, match=r"must have the shapes \(6, 16\) and \(16, 16\), got \(6, 15\)"):
        anchored(MERGED, [EXPERTS[0][:, 1:]], H[:1], [1.0])
