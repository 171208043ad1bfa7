"""Each unit keeps the state that is the best on samples of which nothing was learned."""

import pytest
import torch
from networks import learn, net

from hdrq.calibrate.report import report_of
from hdrq.methods.reconstruct import samples
from hdrq.methods.reconstruct.learner import Learner
from hdrq.methods.reconstruct.parameters import Parameters


def test_an_eighth_at_most_is_judged_by():
    for count, judged, expected in ((1024, 32, 32), (96, 32, 12), (96, 5, 5), (7, 32, 0), (96, 0, 0)):
        learned_from, held = samples.split(count, judged)
        if expected:
            assert len(held) == expected and sorted([*learned_from.tolist(), *held.tolist()]) == list(range(count))
            assert held[0] == 0 and held.diff().unique().numel() <= 2  # evenly spaced
        else:
            assert torch.equal(learned_from, torch.arange(count)) and torch.equal(held, learned_from)
    assert len(samples.split(1024, 0)[1]) == 256


@pytest.fixture
def learners(monkeypatch):
    """The learners of the units of a run."""
    made = []
    start = Learner.__init__

    def init(self, *args):
        start(self, *args)
        made.append(self)

    monkeypatch.setattr(Learner, "__init__", init)
    return made


def test_nothing_is_learned_from_them(learners):
    learn(iterations=40)
    assert len(learners) == 4
    for each in learners:
        assert len(each.judged) == 12 and not set(each.judged.tolist()) & set(each.indices.flatten().tolist())


@pytest.mark.parametrize("recipe", ["hdrq", "qdrop"])
def test_the_best_of_the_quarters_without_noise_is_kept(recipe, learners, monkeypatch):
    """Steps that break the unit after a while are undone, back to the last good judgement."""
    steps, step = [], Parameters.step
    judgements, judge = {}, Learner.judge

    def breaking(self):
        steps.append(None)
        if len(steps) % 40 == 33:
            for each in self.by_name.values():
                each.data.mul_(4.0)
        step(self)

    def noted(self, iteration):
        objective = self.rounded_loss(self.judged) + self._distance()
        judgements.setdefault(self, {})[iteration] = objective
        judge(self, iteration)

    monkeypatch.setattr(Parameters, "step", breaking)
    monkeypatch.setattr(Learner, "judge", noted)
    model = net()
    quiet = 1.0 if recipe == "qdrop" else 0.4
    options = {"bits": "W2A4", "weight_lr": 1e-2, "warmup": 0.0, "fake_quant_fraction": quiet}
    result = learn(model, recipe=recipe, iterations=40, **options)
    for each, objectives in judgements.items():
        assert set(objectives) == {"hdrq": {0, 28, 32, 36, 40}, "qdrop": {0, 10, 20, 30, 40}}[recipe]
        assert each.best.iteration == min(objectives, key=objectives.get) < 33
    assert any(each.best.iteration > 0 for each in learners)
    assert all(block.loss_after <= block.loss_before for block in report_of(result).blocks)
