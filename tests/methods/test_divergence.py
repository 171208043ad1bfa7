"""Runs that go wrong: a value that is not finite, and a unit that learning made worse."""

import pytest
import torch
from helpers import same, state
from networks import learn
from torch import nn

import hdrq
from hdrq.calibrate.report import report_of
from hdrq.methods.reconstruct.learner import Learner
from hdrq.methods.reconstruct.parameters import Parameters


class Pair(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(4, 4), nn.Linear(4, 4))


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


@pytest.mark.parametrize("options", [{}, {"preset": "official"}])
def test_loss_that_is_not_finite_names_the_block(options):
    with pytest.raises(FloatingPointError, match=r"loss of block 0 must be finite, got (inf|nan) at iteration \d+"):
        learn(iterations=60, bias_lr=1e30, **options)


def test_a_unit_that_learning_made_worse_is_rounded_to_nearest_with_a_warning(monkeypatch):
    def worse(self):
        for layer in self.unit.layers:
            layer.latent.data.add_(0.5)

    monkeypatch.setattr(Parameters, "step", worse)
    with pytest.warns(UserWarning, match=r"block 0 is rounded to nearest: learning did not lower its loss of"):
        learned = learn(bias_lr=1e-3)
    assert same(state(learned), state(learn(recipe="rtn", iterations=0)))
    assert all(block.loss_after == block.loss_before for block in report_of(learned).blocks)
