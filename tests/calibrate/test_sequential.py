"""The walk knows no method: any object that fits one unit will do, and every unit is fitted once, in order."""

import copy

import pytest
import torch
from helpers import same, state
from networks import CALIBRATION, learn, net
from torch import nn

import hdrq
from hdrq.calibrate.cache import Cache
from hdrq.calibrate.data import calibration_calls, first_samples, run_all
from hdrq.calibrate.ranges import attach_quantizers
from hdrq.calibrate.sequential import PARTS, Fitted, walk
from hdrq.calibrate.settings import RunSettings
from hdrq.calibrate.trace import trace
from hdrq.methods.nearest import Nearest
from hdrq.methods.post_training import fold
from hdrq.prepare.units import find_blocks
from hdrq.quantizers.layers import quantized_layers
from hdrq.recipes import recipe


class Recorder:
    """A method that rounds, and keeps the units that it was given."""

    fits = PARTS

    def __init__(self):
        self.units = []

    def fit(self, unit, journal):
        self.units.append(unit)
        journal.note(unit, 1, 1, 0.0)
        return Nearest().fit(unit, journal)

    def restore(self, unit, tensors):
        raise AssertionError("nothing was kept")


def walked(method, model=None, data=CALIBRATION):
    """A model that a method has walked over, its full-precision form, and what the walk returned."""
    calls = calibration_calls(data)
    full = fold(model or net(), data)
    quantized = copy.deepcopy(full)
    example, plan = run_all(first_samples(calls, 1)), recipe("rtn")
    units = find_blocks(full, example)
    attach_quantizers(quantized, first_samples(calls, plan.range_samples), "W3A3", plan, units)
    return quantized, full, walk(full, quantized, units, calls, method, Cache(torch.device("cpu")))


def test_round_to_nearest_by_the_walk_is_the_recipe():
    quantized, _, (reports, losses) = walked(Nearest())
    assert same(state(quantized), state(learn(recipe="rtn", iterations=0))) and not losses
    assert [report.name for report in reports] == ["0", "3", "6", "9"]


def test_a_unit_has_what_it_reads_behind_the_prefix_and_what_it_returned_in_full_precision():
    method = Recorder()
    quantized, full, (_, losses) = walked(method)
    assert [unit.name for unit in method.units] == [name for name, *_ in losses] == ["0", "3", "6", "9"]
    with torch.no_grad():
        for unit in method.units[:2]:
            place = int(unit.name)
            assert torch.equal(unit.full[0].tensor, full[:place](CALIBRATION))
            assert torch.equal(unit.target.tensor, full[: place + 1](CALIBRATION))
            assert torch.equal(unit.quantized[0].tensor, quantized[:place](CALIBRATION))
            assert unit.reference is full[place] and unit.module is quantized[place]
    assert not torch.equal(method.units[1].quantized[0].tensor, method.units[1].full[0].tensor)


def test_a_shared_layer_is_fitted_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.second = nn.Linear(4, 4)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(self.first(x))

    method = Recorder()
    model = Twice().eval()
    calls = calibration_calls(torch.randn(8, 4))
    quantized = copy.deepcopy(model).requires_grad_(False)
    attach_quantizers(quantized, calls, {"*": "W4A4"}, recipe("rtn"), ["first", "second"])
    walk(model, quantized, ["first", "second"], calls, method, Cache(torch.device("cpu")))
    assert [[layer.name for layer in unit.layers] for unit in method.units] == [["first"], []]


def test_what_a_method_returns_is_what_a_resumed_walk_restores(tmp_path):
    class Half:
        """Scales the latents by one half: no rounding rule does that by itself."""

        fits = PARTS

        def fit(self, unit, journal):
            for layer in unit.layers:
                layer.latent.mul_(0.5)
            return Fitted(
                {layer.name: layer.latent.clone() for layer in unit.layers}, {"loss_before": 1.0, "loss_after": 0.0}
            )

        def restore(self, unit, tensors):
            for layer in unit.layers:
                layer.latent.copy_(tensors[layer.name])

    from hdrq.checkpoint.workdir import Workdir

    pytest.importorskip("safetensors")
    calls = calibration_calls(CALIBRATION)
    full, plan = fold(net(), CALIBRATION), recipe("rtn")
    results = []
    for method, resume in ((Half(), False), (Half(), True)):
        quantized = copy.deepcopy(full)
        attach_quantizers(quantized, calls, "W3A3", plan, ["0", "3"])
        walk(
            full,
            quantized,
            ["0", "3"],
            calls,
            method,
            Cache(torch.device("cpu")),
            RunSettings(workdir=Workdir(tmp_path, {"run": 1}, resume)),
        )
        results.append(state(quantized))
    assert same(*results)
    halves = {name: layer.latent for name, layer in quantized_layers(quantized).items()}
    assert torch.equal(halves["0"], full[0].weight * 0.5) and torch.equal(halves["6"], full[6].weight)


def test_trace_and_the_public_function_agree_on_units():
    full = fold(net(), CALIBRATION)
    names = find_blocks(full, run_all(calibration_calls(CALIBRATION[:1])))
    assert [node.name for node in trace(full, names, calibration_calls(CALIBRATION)[0])] == names
    report = hdrq.report.report_of(learn())
    assert [block.name for block in report.blocks] == names
