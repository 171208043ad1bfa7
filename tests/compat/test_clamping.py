"""Clamps whose bounds pass gradients, whatever torch does by itself."""

import pytest
import torch
from torch import nn

import hdrq.compat
from hdrq.compat import clamping, patching

X = [-2.0, 0.0, 0.5, 1.0, 3.0, float("nan")]
CASES = {
    "clamp": (lambda x: x.clamp(0, 1), [0, 1, 1, 1, 0]),
    "named": (lambda x: torch.clamp(input=x, max=1.0, min=0.0), [0, 1, 1, 1, 0]),
    "clip": (lambda x: torch.clip(x, 0, 1), [0, 1, 1, 1, 0]),
    "one end": (lambda x: x.clamp(max=1), [1, 1, 1, 1, 0]),
    "clamp_min": (lambda x: torch.clamp_min(x, 0), [0, 1, 1, 1, 1]),
    "clamp_max": (lambda x: x.clamp_max(torch.tensor(1.0)), [1, 1, 1, 1, 0]),
    "in place": (lambda x: (2 * x).clamp_(0, 2), [0, 2, 2, 2, 0]),
    "tensors": (lambda x: torch.clamp(x, torch.zeros(6), torch.ones(6)), [0, 1, 1, 1, 0]),
}


@pytest.fixture(params=[clamping._ClosedClamp, hdrq.compat.closed_clamp])
def closed(request):
    with request.param():
        yield


@pytest.mark.parametrize("name", CASES)
def test_bounds_pass_gradients(name, closed):
    function, want = CASES[name]
    x = torch.tensor(X, requires_grad=True)
    y = function(x)
    with torch.no_grad():
        assert torch.equal(y.nan_to_num(9), function(x.detach().clone()).nan_to_num(9))
    assert torch.autograd.grad(y.sum(), x)[0][:5].tolist() == want


def test_bounds_that_learn_have_what_lies_beyond(closed):
    x, low, high = (torch.tensor(t, requires_grad=True) for t in (X[:5], 0.0, 1.0))
    found = torch.autograd.grad((x.clamp(low, high) * torch.arange(1.0, 6)).sum(), (x, low, high))
    assert [g.tolist() for g in found] == [[0, 2, 3, 4, 0], 1, 5]


def test_relu_and_what_needs_no_gradient_are_as_ever(closed):
    x = torch.zeros(1, requires_grad=True)
    assert not torch.autograd.grad(nn.functional.relu(x), x)[0]
    assert torch.clamp(torch.tensor([5]), 0, 3, out=torch.empty(1, dtype=torch.int64)) == 3


def test_the_report_says_where_torch_does_otherwise(monkeypatch):
    assert clamping.stops_at_bounds() == (torch.__version__ >= "2.14")
    for stops in (True, False):
        monkeypatch.setattr(patching, "stops_at_bounds", lambda stops=stops: stops)
        assert ("closed_clamp()" in patching.Patch("package").report()) == stops
