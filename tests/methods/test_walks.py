"""Two walks over the blocks: weights with activations in full precision, then the scales of activations alone."""

from contextlib import suppress

import torch
from helpers import same, state
from networks import HELD_OUT, learn

import hdrq
from hdrq.calibrate.report import report_of
from hdrq.methods.reconstruct.learner import Learner
from hdrq.quantizers.layers import input_quantizers, quantized_layers
from hdrq.recipes import recipe

BRECQ = {"recipe": "brecq", "preset": "official", "weight_lr": 1e-2, "iterations": 40, "bits": "W2A3"}


def test_weights_are_learned_with_activations_in_float_then_activations_alone(monkeypatch):
    seen = []
    step = Learner.step

    def watched(self, batch):
        modes = {
            q.mode for q in self.unit.module.modules() if isinstance(q, hdrq.quantizers.modules.ActivationQuantizer)
        }
        seen.append((self.recipe.learns, sorted(name.rpartition(".")[2] for name in self.parameters.by_name), modes))
        if self.recipe.learns == "activations" and len(batch) == 3:  # the first unit reads the same in both models
            assert torch.equal(self._mixed(*batch[:2], self.mixes[0]), batch[1])
        return step(self, batch)

    monkeypatch.setattr(Learner, "step", watched)
    learn(**BRECQ)
    first, second = seen[:160], seen[160:]
    assert all(each == ("rounding", ["alpha"], {"float"}) for each in first)
    assert len(second) == 40 and all(each == ("activations", ["scale"], {"round"}) for each in second)


def test_the_report_names_both_and_the_errors_fall():
    steps = []
    result = learn(**BRECQ, held_out=HELD_OUT, progress=steps.append)
    report = report_of(result)
    names = ["0", "3", "6", "9"]
    assert [b.name for b in report.blocks] == [f"{n}: weights" for n in names] + [f"{n}: activations" for n in names]
    assert [name for name, _, _ in report.losses] == [b.name for b in report.blocks]
    assert [(s.index, s.blocks, s.block) for s in steps] == [(k, 8, b.name) for k, b in enumerate(report.blocks)]
    assert report.errors["output"] < report.nearest["output"]


def test_the_second_walk_leaves_weights_alone():
    both = learn(**BRECQ)
    one = learn(**BRECQ, activation_walk=1 / 40, activation_lr=0.0)
    pairs = zip(quantized_layers(both).values(), quantized_layers(one).values(), strict=True)
    assert all(torch.equal(a.latent, b.latent) for a, b in pairs)
    scales = zip(input_quantizers(both).values(), input_quantizers(one).values(), strict=True)
    assert not all(torch.equal(a.scale, b.scale) for a, b in scales)


def test_a_run_stopped_in_the_second_walk_goes_on(tmp_path):
    class Stop(Exception):
        pass

    def stop(step):
        if step.index == 5:
            raise Stop

    options = {**BRECQ, "workdir": tmp_path / "run"}
    with suppress(Stop):
        learn(**options, progress=stop)
    resumed = learn(**options, resume=True)
    assert same(state(resumed), state(learn(**BRECQ)))
    rows = (tmp_path / "run" / "losses.csv").read_text().splitlines()
    assert len(rows) == 1 + 8 and rows[-1].startswith("9: activations,10,")


def test_activations_alone_may_be_learned():
    result = learn(
        recipe="brecq", learns="activations", iterations=40, activation_lr=1e-3, bits="W8A3", held_out=HELD_OUT
    )
    nearest = learn(recipe="rtn", iterations=0, bits="W8A3")
    for name, layer in quantized_layers(result).items():
        assert torch.equal(layer.latent, quantized_layers(nearest)[name].latent)
    report = report_of(result)
    assert report.errors["output"] < report.nearest["output"]


def test_walks_of_a_recipe():
    assert recipe("hdrq").walks() == (recipe("hdrq"),)
    first, second = recipe("brecq", "official").walks()
    assert (first.learns, first.iterations) == ("rounding", 20_000)
    assert (second.learns, second.iterations, second.activation_lr, second.input_keep) == (
        "activations",
        5_000,
        4e-4,
        0,
    )
