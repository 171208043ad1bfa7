"""The bench of a reconstruction's step runs the learner as it is, on a block of any size."""

import csv
import json
import sys

import torch

from hdrq.benchmarks import reconstruct_step, released


def test_three_steps_take_turns_and_are_written_down(monkeypatch, tmp_path):
    small = {
        "residual": (lambda: released.Bottleneck(4), lambda n: torch.randn(n, 16, 6, 6).relu()),
        "transformer": (lambda: released.Transformer(16, 2), lambda n: torch.randn(n, 5, 16)),
    }
    monkeypatch.setattr(reconstruct_step, "BLOCKS", small)
    out = tmp_path / "step"
    options = ["--iterations", "3", "--batch", "2", "--device", "cpu", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["reconstruct_step", *options])
    reconstruct_step.main()
    rows = list(csv.DictReader(out.with_suffix(".csv").open()))
    names = ("hdrq", "official, eager", "full precision")
    assert [(row["block"], row["step"]) for row in rows] == [(block, name) for block in small for name in names]
    assert all(float(row["p20"]) > 0 for row in rows)
    assert len(json.loads(out.with_suffix(".json").read_text())["figures"]) == 6


def test_the_step_that_is_timed_has_noise_and_learns(monkeypatch):
    small = {"residual": (lambda: released.Bottleneck(4), lambda n: torch.randn(n, 16, 6, 6).relu())}
    monkeypatch.setattr(reconstruct_step, "BLOCKS", small)
    learners, init = [], reconstruct_step.Learner.__init__

    def noted(self, *args, **options):
        init(self, *args, **options)
        learners.append(self)

    monkeypatch.setattr(reconstruct_step.Learner, "__init__", noted)
    run = reconstruct_step.steps("residual", 2, "cpu")["hdrq"]
    (learner,) = learners
    assert {quantizer.mode for quantizer in learner.quantizers} == {"noise"}
    before = [layer.latent.detach().clone() for layer in learner.weights]
    run()
    assert all(not torch.equal(old, layer.latent) for old, layer in zip(before, learner.weights, strict=True))
