"""Measures of the loss as jobs, and what is drawn of them."""

import csv
import math

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from hdrq.checkpoint.files import csv_text
from hdrq.cli import app
from hdrq.evaluate import error_barrier, hessian_trace, noisy_error_barrier
from hdrq.methods.post_training import fold
from hdrq.reproduce import jobs, landscape
from hdrq.reproduce.figures import COLOURS, render
from hdrq.reproduce.jobs import Job, collected, run
from hdrq.reproduce.measured import (
    OUTCOME,
    correlation_among_methods,
    mean_of,
    over_networks,
    rank_correlation,
    read,
)
from hdrq.reproduce.networks import networks
from hdrq.reproduce.protocol import METHODS


@pytest.fixture
def small(small, monkeypatch):
    for name, value in {"GRID": 3, "DRAWS": 2, "POINTS": 3, "NOISE_DRAWS": 2, "PROBES": 2}.items():
        monkeypatch.setattr(landscape, name, value)
    return small


def measured(plan, folder, keep=False):
    kind = landscape.measures(keep)
    run(plan, folder, folder / "cache", choose=False, kind=kind)
    return list(csv.DictReader(collected(folder, kind).splitlines()))


def test_a_job_measures_models_and_pairs(small, tmp_path):
    """Numbers are those of the public measures on the models that were kept; a second run of the job reads these."""
    rows = measured([Job("small", 1, "RTN", "W3A3")], tmp_path, keep=True)
    found = {(row["measure"], row["domains"], row["x"]): float(row["value"]) for row in rows}
    kept = sorted((tmp_path / "models").iterdir())
    assert len(kept) == 2
    first, second = (landscape.load(path, small.network()) for path in kept)
    tests = [small.load(domain, "test") for domain in small.targets]
    loss = landscape._loss_on(tests)
    barrier, noisy = (
        error_barrier(first, second, loss, points=3),
        noisy_error_barrier(first, second, loss, points=3, draws=2),
    )
    assert found["barrier", "one+two", ""] == pytest.approx(barrier.value, rel=1e-4)
    assert found["loss between", "one+two", "0.5"] == pytest.approx(float(barrier.losses[1]), rel=1e-4)
    assert found["noisy barrier", "one+two", ""] == pytest.approx(noisy.value, rel=1e-4)
    batches = [(tests[1][0], tests[1][1])]
    trace = hessian_trace(second, landscape._batch_loss, batches, probes=2)
    assert found["trace", "two", ""] == pytest.approx(trace.total.value, rel=1e-3)
    assert {"accuracy, nearest", "accuracy, systematic", "distance", "top eigenvalue", "loss"} <= {m for m, *_ in found}
    assert not any(m in ("plane", "draw, systematic") for m, *_ in found)  # of the first network alone
    before = [path.stat().st_mtime_ns for path in kept]
    (tmp_path / "landscape" / f"{Job('small', 1, 'RTN', 'W3A3').id}.csv").unlink()
    again = measured([Job("small", 1, "RTN", "W3A3")], tmp_path, keep=True)
    assert [path.stat().st_mtime_ns for path in kept] == before
    assert [row["value"] for row in again] == [row["value"] for row in rows]


def test_the_loss_of_domains_is_the_mean_of_their_means(monkeypatch):
    """Over batches of unequal size, and over pixels that are labelled."""
    torch.manual_seed(0)
    x, y, model = torch.randn(10, 3), torch.randint(3, (10,)), nn.Linear(3, 3)
    monkeypatch.setattr(landscape, "BATCH", 4)
    want = [float(nn.functional.cross_entropy(model(x[a:b]), y[a:b])) for a, b in ((0, 9), (9, 10))]
    assert landscape._loss_on([(x[:9], y[:9]), (x[9:], y[9:])])(model) == pytest.approx(sum(want) / 2)
    maps = torch.full((1, 2, 2), 255)
    maps[0, 0, 1] = 2
    logits = torch.randn(1, 3, 2, 2)
    assert float(landscape._batch_loss(nn.Identity(), (logits, maps))) == pytest.approx(
        float(-logits[0, :, 0, 1].log_softmax(0)[2])
    )


def test_surfaces_and_draws_of_the_first_network(small, tmp_path):
    rows = measured(
        [Job("small", 0, method, bits) for method, bits in (("RTN", "W3A3"), ("full precision", "float"))], tmp_path
    )
    own = {m: [row for row in rows if row["method"] == m] for m in ("RTN", "full precision")}
    for name in ("plane", "around, weights", "around, scales"):
        assert sum(row["measure"] == name for row in own["RTN"]) == 9
    assert [row["domains"] for row in rows if row["measure"] == "place" and row["method"] == "RTN"] == [
        "source",
        "one",
        "two",
    ]
    draws = [row for row in own["RTN"] if row["measure"].startswith("draw, ")]
    assert len(draws) == 6 and all(50 < float(row["value"]) <= 100 for row in draws)
    exact = {row["measure"] for row in own["full precision"]}
    assert (
        "plane" in exact
        and "accuracy, average" in exact
        and "noisy barrier" not in exact
        and "draw, systematic" not in exact
    )
    assert measured([], tmp_path) == rows


def test_the_source_on_a_plane_is_the_source_rounded(small, tmp_path):
    models = networks(small, 0, tmp_path)
    example = small.load("source", "train")[0][:32]
    source = fold(models["source"], example)
    quantized = [
        landscape.quantized_one(small, models, d, landscape.METHODS["RTN"], "W8A8", 0, {}, 0) for d in small.targets
    ]
    like = landscape.source_like(quantized, source)
    x = small.load("source", "test")[0]
    with torch.no_grad():
        far = (quantized[0](x) - source(x)).abs().mean()
        assert (like(x) - source(x)).abs().mean() < 0.2 * far
        scales = [m.head.parametrizations.weight[0].scale for m in (like, *quantized)]
        torch.testing.assert_close(scales[0], (scales[1] + scales[2]) / 2)


# --- what is read and drawn


def table(path, runs):
    """A CSV of runs: (method, bits, network, knobs) and a number for each measure."""
    rows = []
    for (method, bits, network, knobs), numbers in runs.items():
        facts = {"task": "t", "network": network, "method": method, "bits": bits, "iterations": 400, "knobs": knobs}
        for (measure, domains, x, y), value in numbers.items():
            rows.append({**facts, "measure": measure, "domains": domains, "x": x, "y": y, "value": value})
    path.write_text(csv_text(rows, landscape.COLUMNS))
    return path


def whole(level=1.0, noisy=True):
    """All that a run has, of which one number decides the rest."""
    numbers = {(m, d, "", ""): level for m in ("loss", "top eigenvalue", "trace") for d in ("one", "two")}
    numbers |= {(m, "one+two", "", ""): level for m in ("barrier", "distance", "noisy barrier", "integers changed")}
    numbers |= {
        (f"accuracy, {r}", "one+two", "", ""): 90 - level
        for r in (("nearest", "systematic") if noisy else ("average",))
    }
    for shift, kind in ((0, "loss between"), (0.5, "noisy loss between")):
        for x, y in ((0, 1), (0.5, 1 + level), (1, 2)):
            numbers[kind, "one+two", x, ""] = y + shift
    for kind, domains in (("plane", "source+one+two"), ("around, weights", "one")):
        for x in (-1, 0, 1):
            for y in (-2, 0, 2):
                numbers[kind, domains, x, y] = 1 + level * (x * x + abs(y)) + x / 4
    numbers |= {("place", d, k, 0): 0 for k, d in enumerate(("source", "one", "two"))}
    for rule in ("noise, first", "noise, best of 30", "systematic"):
        numbers |= {(f"draw, {rule}", "one+two", seed, ""): 80 + seed for seed in range(3)}
    return {key: v for key, v in numbers.items() if noisy or not key[0].startswith(("noisy", "draw"))}


def test_numbers_of_a_run(tmp_path):
    numbers = {("top eigenvalue", "one", "", ""): 1, ("top eigenvalue", "two", "", ""): 4}
    numbers |= {(OUTCOME, "one+two", "", ""): 70, (OUTCOME, "one+two+three", "", ""): 60}
    for pair, values in {"a+b": (1, 4, 2), "a+c": (3, 9, 3)}.items():
        numbers |= {("loss between", pair, x, ""): v for x, v in zip((0, 0.5, 1), values, strict=True)}
        numbers |= {("noisy loss between", pair, x, ""): v + 0.25 + x for x, v in zip((0, 0.5, 1), values, strict=True)}
    (run,) = read(table(tmp_path / "a.csv", {("RTN", "W3A3", 0, "{}"): numbers}))
    assert (run.mean("top eigenvalue"), run.mean(OUTCOME), run.mean("rise by noise")) == (2.5, 60, 0.75)
    assert run.curve("loss between").tolist() == [[0, 0.5, 1], [-0.25, 4.25, 0.25]]
    assert (run.mean("rise midway"), run.mean("noisy rise midway")) == (4.25, 4.25)
    (bare,) = read(table(tmp_path / "b.csv", {("RTN", "W3A3", 0, "{}"): {(OUTCOME, "a+b", "", ""): 1}}))
    assert all(math.isnan(bare.mean(measure)) for measure in ("trace", "rise midway", "rise by noise"))
    assert run.curve("none").shape == (2, 0)


def test_rank_correlations_over_all_runs_and_among_methods(tmp_path):
    """Accuracy falls with bits and with the network, as eigenvalues rise; among methods of one group it is reversed."""
    runs = {}
    for network in range(3):
        for level, bits in enumerate(("W4A4", "W2A4")):
            for k, method in enumerate(("BRECQ", "QDrop", "HDRQ, paper")):
                numbers = {("top eigenvalue", "one", "", ""): 100 * level + 10 * network + k}
                numbers[OUTCOME, "one+two", "", ""] = 90 - 20 * level - 5 * network + k
                runs[method, bits, network, "{}"] = numbers
    found = read(table(tmp_path / "a.csv", runs))
    every = over_networks(found, rank_correlation("top eigenvalue"))
    assert every.value < -0.9 and every.low <= every.value <= every.high < -0.5
    among = over_networks(found, correlation_among_methods("top eigenvalue"))
    assert among.value == among.low == among.high == pytest.approx(1)
    assert math.isnan(rank_correlation("trace")(found)) and math.isnan(correlation_among_methods("trace")(found))
    one = over_networks([run for run in found if run.network == 0], mean_of(OUTCOME))
    assert one.value == pytest.approx(81) and math.isnan(one.low) and one.text() == "81"
    three = over_networks(found, mean_of(OUTCOME))
    assert three.value == pytest.approx(76) and (three.low, three.high) == (71, 81) and three.text() == "76 [71, 81]"


def test_figures_and_tables_come_from_the_rows_alone(tmp_path):
    runs = {
        (m, "W3A3", k, "{}"): whole(1 + k + j) for j, m in enumerate(("RTN", "QDrop", "HDRQ, paper")) for k in (0, 1)
    }
    runs |= {("HDRQ, paper", "W3A3", k, f'{{"distance": {v}}}'): whole(v) for v in (0.0, 0.5) for k in (0, 1)}
    runs["full precision", "float", 0, "{}"] = whole(0.5, noisy=False)
    text = render(table(tmp_path / "rows.csv", runs), tmp_path / "out")
    assert (tmp_path / "out" / "landscape.md").read_text() == text
    assert "| W3A3 | QDrop | 2 | 2.5 [2, 3] |" in text and "| float | full precision | 1 | 0.5 |" in text
    assert "|  | 89.5 |\n| W3A3 | RTN" in text  # in full precision the merge of all is the average
    names = ["surfaces-W3A3", "draws-W3A3", "barrier", "curvature", "distance"]
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "landscape.md",
        *(f"t-{n}.{s}" for n in names for s in ("png", "svg")),
    }
    svg = (tmp_path / "out" / "t-barrier.svg").read_text()
    assert all(COLOURS[list(METHODS).index(m)] in svg.lower() for m in ("RTN", "QDrop", "HDRQ, paper"))


def test_from_the_command_line(small, tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "grid", lambda *given, **options: [Job("small", 1, "RTN", "W3A3")])
    call, out = CliRunner().invoke, tmp_path / "out"
    result = call(app, ["reproduce", "landscape", "--quick", "--task", "small", "--keep", "-o", str(out)])
    assert result.exit_code == 0, result.output
    assert "| W3A3 | RTN | 1 |" in result.output and (out / "landscape.csv").is_file() and (out / "models").is_dir()
    assert not (out / "rows.csv").exists()
    again = call(app, ["reproduce", "render", "--rows", str(out / "landscape.csv"), "-o", str(tmp_path / "b")])
    assert again.exit_code == 0
    assert (tmp_path / "b" / "landscape.md").read_text() == (out / "landscape.md").read_text()
    result = call(app, ["reproduce", "--keep", "-o", str(tmp_path / "c")])
    assert "keep must go with landscape, got run" in result.stderr


def test_another_table_is_refused(tmp_path):
    (tmp_path / "rows.csv").write_text("task,network\ndigits,0\n")
    with pytest.raises(ValueError, match=r"line 2 of .* must be a row of hdrq reproduce landscape, got 'method'"):
        read(tmp_path / "rows.csv")
