"""Merges that are rounded for what layers read, by statistics that were kept with the integers: no data, no model."""

import json

import pytest
import torch
from helpers import same, state
from networks import CALIBRATION, data, net
from safetensors import safe_open
from torch import nn
from typer.testing import CliRunner

import hdrq
from hdrq.calibrate.data import calibration_calls
from hdrq.calibrate.moments import Moments, second_moments
from hdrq.calibrate.statistics import collect, compact, expanded
from hdrq.checkpoint.format import Reader, Writer
from hdrq.cli import app
from hdrq.methods.statistics_merge import merge_by_statistics, merge_files_by_statistics
from hdrq.quantizers.layers import quantized_layers
from hdrq.quantizers.provenance import statistics_of
from hdrq.report import report_of

TASKS = [CALIBRATION, CALIBRATION.flip(2) + 0.5]


def model(number, statistics, **options):
    """A quantized relative of one base."""
    base = net()
    with torch.no_grad():
        for name, p in base.named_parameters():
            p.add_(data(*p.shape, seed=100 * number + len(name)) * 0.4 * p.abs().mean())
    options = {"bits": {"*": "W3A16"}, "per_channel": False, **options}
    return hdrq.quantize(base, TASKS[number], "rtn", statistics=statistics, progress=False, **options)


@pytest.fixture(scope="module")
def models():
    return [model(k, True) for k in range(2)]


@pytest.fixture
def files(models, tmp_path):
    paths = [tmp_path / f"{k}.safetensors" for k in range(2)]
    for each, path in zip(models, paths, strict=True):
        hdrq.save(each, path)
    return paths


def deviation(merged, models):
    with torch.no_grad():
        return sum(float((merged(x) - own(x)).square().mean()) for x, own in zip(TASKS, models, strict=True))


@pytest.mark.parametrize("rank", [None, 32])
def test_what_layers_read_stands_in_for_data(models, rank):
    if rank is not None:
        models = [model(k, rank) for k in range(2)]
        assert {"rank": 32}.items() <= statistics_of(models[0])["9"].facts.items()
    before = [state(m) for m in models]
    plain = hdrq.merge(models, rule="half-even")
    guided = merge_by_statistics(models)
    assert deviation(guided, models) < 0.9 * deviation(plain, models)
    for block in report_of(merge_by_statistics(models, target="mean")).blocks:
        assert sum(layer.error for layer in block.layers) < 0.7 * sum(layer.nearest for layer in block.layers)
    for name, layer in quantized_layers(guided).items():
        assert torch.equal(layer.weight_quantizer.scale, quantized_layers(plain)[name].weight_quantizer.scale)
    assert all(same(state(m), s) for m, s in zip(models, before, strict=True))
    assert not statistics_of(guided) and not statistics_of(plain)  # those of its parents are not its own


def test_equal_models_give_that_model(models):
    for target in ("mean", "experts"):
        found = merge_by_statistics([models[0]] * 2, target=target, bias="keep")
        for name, layer in quantized_layers(found).items():
            assert torch.equal(layer.latent, quantized_layers(models[0])[name].latent), name


@pytest.mark.parametrize(
    "options", [{"per_channel": True}, {"group_size": 8}, {"per_channel": True, "affine_weights": True}]
)
def test_grids_of_every_kind(options, tmp_path):
    pair = [model(k, True, **options) for k in range(2)]
    merged = merge_by_statistics(pair)
    assert deviation(merged, pair) < 0.9 * deviation(hdrq.merge(pair, rule="half-even"), pair)


def test_files_are_merged_without_a_model(models, files, tmp_path):
    report = merge_files_by_statistics(files, tmp_path / "m.safetensors")
    merged = merge_by_statistics(models)
    assert same(state(hdrq.load(tmp_path / "m.safetensors", net())), state(merged))
    assert [r.error for r in report.blocks[0].layers] == [r.error for r in report_of(merged).blocks[0].layers]
    with Reader(tmp_path / "m.safetensors") as file:
        told = file.manifest["calibrated"]
        assert told["calibration"] == "statistics" and told["lam"] == 0.01 and "statistics" not in file.manifest
        assert len(file.manifest["models"][0]["sha256"]) == 64


def test_statistics_are_no_part_of_the_model(models, files, tmp_path):
    """They are loaded and saved again, and nothing else meets them: merging is as without."""
    again = hdrq.load(files[0], net())
    assert {n: dict(f) for n, (f, _) in statistics_of(again).items()} == {
        n: dict(f) for n, (f, _) in statistics_of(models[0]).items()
    }
    hdrq.save(again, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == files[0].read_bytes()
    bare = [tmp_path / f"bare{k}.safetensors" for k in range(2)]
    for k, path in enumerate(bare):
        hdrq.save(model(k, False), path)
    for pair, out in ((files, "a"), (bare, "b"), ((files[0], bare[1]), "c")):
        hdrq.merging.merge_files(pair, tmp_path / f"{out}.safetensors")
    opened = [safe_open(tmp_path / f"{out}.safetensors", framework="pt") for out in "abc"]
    for name in list(opened[0].keys()):
        assert all(torch.equal(opened[0].get_tensor(name), other.get_tensor(name)) for other in opened[1:])
    with pytest.raises(ValueError, match=r"models must have statistics .* got none in .*bare1.safetensors; quantize"):
        merge_files_by_statistics([files[0], bare[1]], tmp_path / "d.safetensors")
    assert not (tmp_path / "d.safetensors").exists()


def test_a_layer_without_statistics_is_rounded_to_nearest(models):
    known = statistics_of(models[0])
    models[0].__dict__["hdrq_statistics"] = {name: value for name, value in known.items() if name != "3"}
    try:
        with pytest.warns(UserWarning, match="could not serve 3 .rounded to nearest: it has no statistics"):
            found = merge_by_statistics(models)
    finally:
        models[0].__dict__["hdrq_statistics"] = known
    plain = hdrq.merge(models, rule="half-even")
    assert torch.equal(quantized_layers(found)["3"].latent, quantized_layers(plain)["3"].latent)
    assert not torch.equal(quantized_layers(found)["6"].latent, quantized_layers(plain)["6"].latent)


def moments(inputs, rows, groups=2):
    x = torch.randn(groups, rows, inputs, dtype=torch.float64, generator=torch.Generator().manual_seed(inputs))
    x = x * 0.8 ** torch.arange(inputs)
    return Moments(x.mT @ x, False, rows, x.sum(1))


def test_whole_moments_and_back():
    given = moments(9, 40)
    found = expanded(compact(given, None))
    assert torch.allclose(found.hessian, given.hessian, rtol=1e-6, atol=1e-6) and found.rows == 40
    assert torch.equal(found.sums, given.sums.float().double())


def test_a_sketch_is_exact_where_its_rank_is_enough():
    """Six rows have rank five about their mean; with less, the diagonal stays, and a sketch is the best of its rank."""
    given = moments(24, 6)
    assert torch.allclose(expanded(compact(given, 5)).hessian, given.hessian, atol=1e-5)
    assert "scatter" in compact(given, 12).tensors  # which is smaller than a sketch of that rank
    many = moments(24, 400)
    found = compact(many, 6)
    sketch = expanded(found).hessian
    assert torch.allclose(sketch.diagonal(dim1=1, dim2=2), many.hessian.diagonal(dim1=1, dim2=2), rtol=1e-6)
    factor = found.tensors["factor"].double()
    scatter = many.hessian - many.sums[..., None] * many.sums[:, None] / many.rows
    best = torch.linalg.eigvalsh(scatter)[:, -6:].sum(1)
    assert torch.allclose(factor.square().sum((1, 2)), best, rtol=1e-3)
    assert torch.equal(compact(many, 6).tensors["factor"], found.tensors["factor"])


def test_layers_that_share_a_weight_have_one_sum():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x) * 2)

    x = data(32, 6)
    quantized = hdrq.quantize(Tied().eval(), x, "rtn", bits={"*": "W8A16"}, statistics=True, progress=False)
    calls = calibration_calls(x)
    own = second_moments(quantized, calls, ["a", "b"])
    (found,) = collect(quantized, calls, None).values()
    assert torch.allclose(expanded(found).hessian, own["a"].hessian + own["b"].hessian, rtol=1e-5)
    assert expanded(found).rows == 64 and torch.allclose(expanded(found).sums, own["a"].sums + own["b"].sums, rtol=1e-4)


def test_statistics_that_do_not_fit_are_refused(files, tmp_path):
    with Reader(files[0]) as file:
        manifest = {k: v for k, v in file.manifest.items() if k != "sha256"}
        specs = {**file.specs, **file.statistics_specs}
        for change, message in (
            ({"9": {**manifest["statistics"]["9"], "inputs": 255}}, "statistics of 9 must fit its weight"),
            ({"9": {**manifest["statistics"]["9"], "groups": 0}}, "groups of the statistics of 9 must be in"),
            ({"9": {"rows": 1}}, "statistics of 9 must have groups, inputs, rows, transposed"),
            ({"1": manifest["statistics"]["9"]}, "statistics of layers with a weight"),
            ([], "statistics of layers with a weight"),
        ):
            with pytest.raises(ValueError, match=message):
                Writer(tmp_path / "x.safetensors", specs, {**manifest, "statistics": change})


@pytest.mark.parametrize("statistics", [0, -1, 1.5, "all"])
def test_a_rank_is_a_count(statistics):
    with pytest.raises((ValueError, TypeError), match="statistics must be"):
        model(0, statistics)


def test_from_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "relatives.py").write_text("from networks import net\n")
    import numpy as np

    np.save("x.npy", CALIBRATION[:32].numpy())
    call = CliRunner().invoke
    run = ["quantize", "--model", "relatives:net", "--data", "x.npy", "--recipe", "rtn", "--bits", "W4A8"]
    for k, rank in enumerate(("all", "5")):
        done = call(app, [*run, "--statistics", rank, "--seed", str(k), "--out", f"{k}.safetensors"])
        assert done.exit_code == 0, done.output
    done = call(app, ["merge", "0.safetensors", "1.safetensors", "--rule", "calibrated", "-o", "m.safetensors"])
    assert done.exit_code == 0 and "by statistics" in done.output, done.output
    hdrq.load("m.safetensors", net())
    told = json.loads(call(app, ["inspect", "1.safetensors", "--json"]).output)
    assert told["facts"]["statistics"].startswith("of 4 layers, ")
    for extra, message in (
        (["--tau", "0.2"], "tau must be left out in a calibrated merge"),
        (["--model", "relatives:net"], "model must be left out in a calibrated merge"),
        (["--lam", "-1"], "lam must be finite and in"),
    ):
        done = call(app, ["merge", "0.safetensors", "1.safetensors", "--rule", "calibrated", "-o", "n", *extra])
        assert done.exit_code == 2 and message in done.stderr, done.output
    done = call(app, [*run, "--statistics", "most", "--out", "n.safetensors"])
    assert done.exit_code == 2 and "statistics must be all, or the rank of a sketch" in done.stderr
