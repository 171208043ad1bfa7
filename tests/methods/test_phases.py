"""What quantizers do at each iteration, and what is told of it: progress and the report."""

import pytest
import torch
from networks import HELD_OUT, learn, net
from torch import nn

from hdrq.calibrate.report import report_of
from hdrq.quantizers.modules import ActivationQuantizer, WeightQuantizer


def modes_seen(**options):
    """Mode, noise, keep, and stream and step of the quantizers of a one-layer model, at each training step."""
    seen = {WeightQuantizer: [], ActivationQuantizer: []}
    forward = {kind: kind.forward for kind in seen}

    def watch(kind):
        def wrapped(self, x):
            if torch.is_grad_enabled():  # a training step
                seen[kind].append((self.mode, self.noise, getattr(self, "keep", None), tuple(self.rng.tolist()[1:])))
            return forward[kind](self, x)

        return wrapped

    with pytest.MonkeyPatch.context() as patch:
        for kind in seen:
            patch.setattr(kind, "forward", watch(kind))
        learn(nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), **options)
    return seen[WeightQuantizer], seen[ActivationQuantizer]


def test_noise_first_then_the_real_quantizer():
    weights, inputs = modes_seen(iterations=20, fake_quant_fraction=0.25)
    assert [mode for mode, *_ in weights] == ["noise"] * 15 + ["round"] * 5
    assert [mode for mode, *_ in inputs] == ["round"] * 20
    assert {noise for _, noise, *_ in weights} == {"uniform"} and {keep for *_, keep, _ in inputs} == {0.5}
    assert [step for *_, (_, step) in weights] == list(range(20))  # noise drawn anew at each step
    assert {stream for *_, (stream, _) in weights}.isdisjoint({stream for *_, (stream, _) in inputs})


def test_official_preset_has_noise_on_activations_too():
    weights, inputs = modes_seen(iterations=20, preset="official", quantize_input=True)
    assert [mode for mode, *_ in weights] == [mode for mode, *_ in inputs] == ["noise"] * 16 + ["round"] * 4
    assert {noise for _, noise, *_ in (*weights, *inputs)} == {"empirical"}


def test_progress_is_told_of_every_block():
    steps = []
    learn(iterations=60, progress=steps.append)
    assert [(s.block, s.index, s.iteration) for s in steps] == [
        (name, index, i) for index, name in enumerate(("0", "3", "6", "9")) for i in (50, 60)
    ]
    assert all(s.blocks == 4 and s.iterations == 60 and s.loss > 0 for s in steps)


def test_report_says_how_it_went():
    model = net()
    result = learn(model, iterations=60, bits="W2A4", held_out=HELD_OUT)
    report = report_of(result)
    assert [b.name for b in report.blocks] == ["0", "3", "6", "9"]
    assert all(b.loss_after < b.loss_before and b.seconds > 0 for b in report.blocks)
    assert [(name, i) for name, i, _ in report.losses] == [(n, i) for n in ("0", "3", "6", "9") for i in (50, 60)]
    assert list(report.errors) == list(report.nearest) == ["0", "3", "6", "9", "output"]
    want = model(HELD_OUT).detach().double()
    output = float((result(HELD_OUT) - want).square().sum() / want.square().sum())
    assert report.errors["output"] == pytest.approx(output, rel=1e-4) and output < report.nearest["output"]
    nearest = learn(model, recipe="rtn", iterations=0, bits="W2A4", held_out=HELD_OUT)
    assert report_of(nearest).errors == report.nearest and report.peak_memory["host"] > 2**20
    with pytest.raises(ValueError, match=r"model must be the result of hdrq.quantize, got one without a report"):
        report_of(model)
