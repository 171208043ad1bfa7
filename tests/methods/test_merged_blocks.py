"""Merges of integers whose blocks learn towards the quantized models that they are merged of."""

import copy
import os

import pytest
import torch
from helpers import same, state
from networks import CALIBRATION, SAMPLES, TASKS, data, deviation, mergeable, net, relative
from torch import nn

import hdrq
from hdrq.calibrate.sequential import Fitted
from hdrq.checkpoint.history import history
from hdrq.methods import calibrated_merge
from hdrq.methods.calibrated_merge import merge_calibrated
from hdrq.quantizers.layers import quantized_layers
from hdrq.quantizers.provenance import origin
from hdrq.report import report_of

LEARNS = {"method": "hdrq", "iterations": 20, "weight_lr": 3e-2, "distance": 0.0, "progress": False}


@pytest.fixture(scope="module")
def models():
    return [relative(k, "W3A8") for k in range(2)]


@pytest.fixture(scope="module")
def learned(models):
    before = [state(m) for m in models]
    found = merge_calibrated(models, TASKS, **LEARNS)
    assert all(same(state(m), s) for m, s in zip(models, before, strict=True))
    return found


def integers(model):
    return {name: layer.weight_quantizer.codes(layer.latent) for name, layer in quantized_layers(model).items()}


def test_blocks_come_nearer_to_what_each_model_does_on_its_own_task(models, learned):
    assert deviation(learned, models) < 0.85 * deviation(hdrq.merge(models, rule="half-even"), models)
    found = report_of(learned).blocks
    assert [b.name for b in found] == ["0", "3", "6", "9"] and all(b.loss_after < b.loss_before for b in found)
    for layer in quantized_layers(learned).values():
        assert torch.equal(layer.weight_quantizer(layer.latent), layer.latent)


def test_the_seed_decides_the_bits(models, learned):
    assert same(state(merge_calibrated(models, TASKS, **LEARNS)), state(learned))
    assert not same(state(merge_calibrated(models, TASKS, seed=1, **LEARNS)), state(learned))


@pytest.mark.parametrize("method", ["hdrq", "qdrop"])
def test_without_iterations_it_is_the_merge(models, method):
    """Ties too, which a mean that is rounded to float32 before may break."""
    other = copy.deepcopy(models[0])
    with torch.no_grad():
        for layer in quantized_layers(other).values():
            layer.latent.add_(layer.weight_quantizer.broadcast(layer.weight_quantizer.scale, layer.latent))
            layer.settle()
    found = merge_calibrated([models[0], other], TASKS, method=method, iterations=0, progress=False)
    assert same(state(found), state(hdrq.merge([models[0], other], rule="half-even")))


@pytest.mark.filterwarnings("ignore:block .* is rounded to nearest")
def test_equal_models_keep_their_integers(models):
    found = merge_calibrated([models[0]] * 2, [TASKS[0]] * 2, **LEARNS)
    assert same(state(found), state(models[0]))
    assert all(block.loss_before == block.loss_after == 0 for block in report_of(found).blocks)


def test_a_unit_reads_what_the_merge_gives_it_and_aims_at_the_models_rows(monkeypatch):
    seen = {}

    class Watching:
        fits = ("weights", "activations")

        def __init__(self, recipe, anchor, seed):
            seen["anchor"] = anchor

        def fit(self, unit, journal):
            seen[unit.name] = [rows.tensor.clone() for rows in (unit.quantized[0], unit.full[0], unit.target)]
            return Fitted({}, {"loss_before": 0.0, "loss_after": 0.0})

    monkeypatch.setattr(calibrated_merge, "Reconstruction", Watching)
    tasks = [SAMPLES, SAMPLES[:40].flip(3)]
    own = [hdrq.quantize(mergeable(k), tasks[k], "rtn", bits="W4A4", progress=False) for k in (0, 1)]
    merged = merge_calibrated(own, tasks, method="hdrq", iterations=5, progress=False)
    for name, before in (("a", lambda m, x: m.norm(x)), ("b", lambda m, x: m.a(m.norm(x)).relu())):
        with torch.no_grad():
            entered = [before(m, x) for m, x in zip(own, tasks, strict=True)]
            behind = [before(merged, x) for x in tasks]
            left = [getattr(m, name)(x) for m, x in zip(own, entered, strict=True)]
        for rows, want in zip(seen[name], (behind, entered, left), strict=True):
            torch.testing.assert_close(rows, torch.cat(want), msg=lambda text, name=name: f"{name}: {text}")
    for name, weight in seen["anchor"].items():
        torch.testing.assert_close(weight, sum(quantized_layers(m)[name].latent for m in own) / 2)


def test_files_give_the_same_bits_and_the_closed_form_loads_one_of_them(models, learned, tmp_path, monkeypatch):
    paths = [tmp_path / f"{k}.safetensors" for k in range(2)]
    for each, path in zip(models, paths, strict=True):
        hdrq.save(each, path)
    loaded = []
    monkeypatch.setattr(calibrated_merge, "load", lambda *a, **k: loaded.append(a[0]) or hdrq.load(*a, **k))
    assert same(state(merge_calibrated(paths, TASKS, architecture=net(), **LEARNS)), state(learned))
    assert len(loaded) == 3
    closed = merge_calibrated(paths, TASKS, architecture=net(), progress=False)
    assert same(state(closed), state(merge_calibrated(models, TASKS, progress=False))) and len(loaded) == 4
    assert [len(facts["sha256"]) for facts in origin(closed)["models"]] == [64, 64]


def test_the_result_says_how_it_was_made_and_is_merged_again(learned, models, tmp_path):
    hdrq.save(learned, tmp_path / "m.safetensors")
    loaded = hdrq.load(tmp_path / "m.safetensors", net())
    assert torch.equal(loaded(CALIBRATION), learned(CALIBRATION))
    made = origin(loaded)["calibrated"]
    assert (made["method"], made["seed"], made["recipe"]["iterations"]) == ("hdrq", 0, 20)
    told = list(history(origin(loaded)).lines())
    assert told[0].startswith("merged: weights [0.5, 0.5], calibration ") and len(told) == 3
    assert told[0].endswith("method hdrq, seed 0")
    again = hdrq.merge([loaded, models[0]], seed=0)
    assert list(history(origin(again)).lines())[1].startswith("  merged: weights [0.5, 0.5], calibration ")


def stopped(monkeypatch, **options):
    """A run that ends as it is to write its third checkpoint, inside the second block."""
    replace, left = os.replace, iter(range(2))

    def failing(source, target):
        if str(target).endswith(("current.safetensors", "block-001.safetensors")) and next(left, None) is None:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing)
        with pytest.raises(KeyboardInterrupt):
            merge_calibrated(**options)


@pytest.mark.parametrize("method", ["closed-form", "qdrop"])
def test_a_run_is_resumed_with_each_sample_in_its_task_alone(models, tmp_path, method):
    options = {"method": method, "workdir": tmp_path, "progress": False}
    options |= {"iterations": 1} if method == "qdrop" else {}
    first, second = TASKS
    merge_calibrated(models, [[first[:8], first[8:]], [second]], **options)
    with pytest.raises(ValueError, match=r"resume must have what the run in .* tasks \("):
        merge_calibrated(models, [[first[:8]], [first[8:], second]], resume=True, **options)


def test_a_killed_run_goes_on_to_the_same_bits(models, learned, tmp_path, monkeypatch):
    options = {"models": models, "calibration": TASKS, "workdir": tmp_path, "checkpoint_every": 15, **LEARNS}
    stopped(monkeypatch, **options)
    assert (tmp_path / "block-000.safetensors").exists() and not (tmp_path / "block-001.safetensors").exists()
    with pytest.raises(FileExistsError, match="workdir must hold no run"):
        merge_calibrated(**options)
    for change, message in (
        ({"models": models[::-1]}, r"models \(\["),
        ({"calibration": TASKS[::-1]}, r"calibration \("),
        ({"weights": (0.6, 0.4)}, r"weights \("),
        ({"distance": 0.1}, r"recipe.distance \(0.0, now 0.1\)"),
        ({"method": "closed-form"}, r"method \(hdrq, now closed-form\)"),
    ):
        given = {**options, **change, "resume": True}
        if change.get("method"):
            for name in ("iterations", "weight_lr", "distance"):
                del given[name]
        with pytest.raises(ValueError, match=f"resume must have what the run in .* {message}"):
            merge_calibrated(**given)
    steps = []
    resumed = merge_calibrated(**{**options, "resume": True, "progress": steps.append})
    assert steps[0].index == 1 and same(state(resumed), state(learned))


def test_a_closed_form_goes_on_too(models, tmp_path):
    whole = merge_calibrated(models, TASKS, workdir=tmp_path, progress=False)
    (tmp_path / "block-002.safetensors").unlink()
    steps = []
    resumed = merge_calibrated(models, TASKS, workdir=tmp_path, resume=True, progress=steps.append)
    assert {step.index for step in steps} == {2} and same(state(resumed), state(whole))


def test_weights_with_zero_points_learn_their_rounding(models):
    own = [hdrq.quantize(net(), x, "rtn", bits="W4A4", affine_weights=True, progress=False) for x in TASKS]
    with pytest.raises(ValueError, match='method must be "qdrop", "brecq" or "closed-form" for weights with zero poi'):
        merge_calibrated(own, TASKS, **LEARNS)
    found = merge_calibrated(own, TASKS, method="qdrop", iterations=5, activation_walk=0.5, progress=False)
    assert [block.name for block in report_of(found).blocks][:2] == ["0: weights", "3: weights"]
    assert all(layer.weight_quantizer.zero_point is not None for layer in quantized_layers(found).values())


class Tied(nn.Module):
    """An embedding whose weight is the head's too."""

    def __init__(self, seed):
        super().__init__()
        self.table, self.inner, self.head = nn.Embedding(12, 8), nn.Linear(8, 8), nn.Linear(8, 12)
        with torch.no_grad():
            for name, p in self.named_parameters():
                p.copy_(data(*p.shape, seed=len(name)) + 0.2 * data(*p.shape, seed=seed))
        self.head.weight = self.table.weight

    def forward(self, x):
        return self.head(self.inner(self.table(x)).relu())


@pytest.mark.filterwarnings("ignore:recipe .* could not serve", "ignore:block .* is rounded to nearest")
@pytest.mark.parametrize("options", [{}, {**LEARNS, "iterations": 4}])
def test_layers_may_share_a_weight_and_have_no_bias(options, tmp_path):
    tasks = [torch.arange(96).view(24, 4) % 12, torch.arange(96).view(24, 4) % 7]
    own = [hdrq.quantize(Tied(k).eval(), x, "rtn", bits={"*": "W4A8"}, progress=False) for k, x in enumerate(tasks)]
    found = merge_calibrated(own, tasks, **options)
    layers = quantized_layers(found)
    assert layers["head"].latent is layers["table"].latent and len(layers) == 3
    hdrq.save(found, tmp_path / "m.safetensors")
    assert torch.equal(hdrq.load(tmp_path / "m.safetensors", Tied(0).eval())(tasks[0]), found(tasks[0]))


class Ratio(nn.Module):
    """Where its first layer reads nothing but zeros, once they are rounded, it divides them by zero."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 2)

    def forward(self, x):
        h = self.a(x)
        return self.b(h / h.abs().amax(1, keepdim=True))


@pytest.mark.filterwarnings("ignore:models are merged that are not ready")
def test_a_model_that_returns_no_number_once_it_is_quantized_is_refused():
    x = data(32, 4)
    own = [hdrq.quantize(Ratio().eval(), x, "rtn", bits={"*": "W4A4"}, progress=False) for _ in range(2)]
    small = torch.cat([x[:5], x[5:6] * 1e-3])
    with pytest.raises(ValueError, match=r"model must return finite values on calibration\[1\], got NaN .* 0 to 5"):
        merge_calibrated(own, [x, small], **LEARNS)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"method": "epmq"}, ValueError, "method must be one of 'closed-form', 'hdrq', 'qdrop', 'brecq', got 'epmq'"),
        ({"lam": 0.1}, ValueError, 'lam must be left out with method="hdrq", got 0.1'),
        ({"group_size": 8}, ValueError, 'group_size must be left out with method="hdrq", which has the quantizers of'),
        ({"iterations": -1}, ValueError, r"iterations must be in \[0, "),
        ({"calibration": [TASKS[0], TASKS[1][:0]]}, ValueError, r"calibration\[1\] must have at least one sample"),
        ({"calibration": [TASKS[0], TASKS[1][:, :, 1:]]}, ValueError, "calibration must have samples of one shape"),
        ({"calibration": TASKS[:1]}, ValueError, "calibration must be as many data as the models, 2, got 1"),
        ({"resume": True}, ValueError, "workdir must be the folder of the run to resume, got None"),
        ({"architecture": net()}, ValueError, "architecture must be left out with models that are modules"),
        ({"models": [None, "a.safetensors"]}, TypeError, "models must be modules, or files all of them, got both"),
        ({"models": ["a.safetensors"] * 2}, FileNotFoundError, "a.safetensors"),
    ],
)
def test_what_makes_no_sense_is_refused(models, change, error, message):
    with pytest.raises(error, match=message):
        merge_calibrated(**{"models": models, "calibration": TASKS, **LEARNS, **change})


def test_options_of_blocks_are_none_of_the_closed_form(models):
    with pytest.raises(ValueError, match='iterations must be left out with method="closed-form", got 3'):
        merge_calibrated(models, TASKS, iterations=3)
    for options in ({}, LEARNS):
        with pytest.raises(ValueError, match=r"an option must be one of 'act_order', .*'weighting', got 'itertions'"):
            merge_calibrated(models, TASKS, **{**options, "itertions": 3})
    with pytest.raises(ValueError, match=r"models must be alike to be merged, got .*weight range"):
        merge_calibrated([models[0], relative(1, "W4A8")], TASKS, **LEARNS)
    trained = [models[0], hdrq.quantize(net(), TASKS[1], "rtn", progress=False).train()]
    with pytest.raises(ValueError, match=r"models\[1\] must be in evaluation mode, got training mode"):
        merge_calibrated(trained, TASKS, bits="W3A8", **LEARNS)
