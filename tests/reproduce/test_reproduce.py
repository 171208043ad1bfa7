"""Evidence: jobs that go on where they stopped, rows that hold all, intervals that mean what they say."""

import csv
import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from hdrq.checkpoint.files import csv_text
from hdrq.cli import app
from hdrq.reproduce import jobs, protocol
from hdrq.reproduce.jobs import Job, collected, grid, run
from hdrq.reproduce.measures import decoded, encoded
from hdrq.reproduce.protocol import ITERATIONS, STUDIES
from hdrq.reproduce.render import render
from hdrq.reproduce.statistics import Way, estimate, holm, read


def test_jobs_write_every_row_and_go_on(small, tmp_path, monkeypatch):
    plan = [Job("small", 0, method, "W3A3", iterations=4) for method in ("RTN", "QDrop")]
    run(plan[:1], tmp_path, tmp_path / "cache", choose=False)
    (first,) = (tmp_path / "rows").glob("*.csv")
    before = first.stat().st_mtime_ns
    run(plan, tmp_path, tmp_path / "cache", choose=False)
    assert first.stat().st_mtime_ns == before  # what is there is not done again
    rows = list(csv.DictReader(collected(tmp_path).splitlines()))
    assert [(row["method"], row["domains"], row["rule"]) for row in rows if row["method"] == "QDrop"] == [
        ("QDrop", "one", ""),
        ("QDrop", "two", ""),
        *[("QDrop", "one+two", rule) for rule in protocol.RULES],
    ]
    for row in rows:
        right = {domain: decoded(text) for domain, text in json.loads(row["correct"]).items()}
        accuracies = json.loads(row["accuracies"])
        assert {domain: 100 * values.mean() for domain, values in right.items()} == pytest.approx(accuracies, abs=1e-4)
        assert float(row["harmonic_mean"]) == pytest.approx(
            len(accuracies) / sum(1 / a for a in accuracies.values()), abs=1e-3
        )
    assert min(float(row["harmonic_mean"]) for row in rows) > 50  # the networks have learned
    with pytest.raises(ValueError, match="out must be a folder of runs with"):
        run(plan, tmp_path, tmp_path / "cache", choose=True)


def test_a_study_may_merge_by_rules_of_its_own(small, tmp_path):
    job = Job("small", 0, "RTN", "W3A3", rules="tau")
    run([job], tmp_path, tmp_path / "cache", choose=False)
    rows = list(csv.DictReader(collected(tmp_path).splitlines()))
    assert [row["rule"] for row in rows if "+" in row["domains"]] == list(protocol.TAUS)
    assert job.id != Job("small", 0, "RTN", "W3A3").id == "small-RTN-W3A3-0-8b283b73ab"


def test_shards_part_the_jobs(small, tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(jobs, "carry_out", lambda job, *rest: done.append(job))
    plan = [Job("small", seed, "RTN", "W3A3") for seed in range(5)]
    for k in range(2):
        run(plan, tmp_path / str(k), tmp_path / "cache", shard=(k, 2), choose=False)
    assert sorted(job.network for job in done[:3]) == [0, 2, 4] and sorted(job.network for job in done[3:]) == [1, 3]


def test_a_study_is_every_combination():
    full = grid("digits", [0, 1], replace(STUDIES["table"], bits=("float",)))
    assert [(job.network, job.method) for job in full] == [(0, "full precision"), (1, "full precision")]
    table = grid("digits", [0, 1], STUDIES["table"])
    assert len(table) == len({job.id for job in table}) == 2 * (1 + 5 * 3)  # full precision has one width
    distances = grid("digits", [0], STUDIES["distance"])
    assert [job.knobs["distance"] for job in distances] == [0.0, 0.01, 0.1, 0.5]
    assert [(job.method, job.rules) for job in grid("digits", [0], STUDIES["tau"])] == [
        ("QDrop", "tau"),
        ("HDRQ, paper", "tau"),
    ]


@pytest.mark.parametrize(("best", "tried"), [(1.0, 3), (9.0, 5), (1 / 9, 5), (1e9, jobs.MOST_RATES)])
def test_a_rate_is_chosen_inside_what_was_tried(best, tried, small, tmp_path, monkeypatch):
    """The error is least at ``best`` times the recipe's own rate; the search goes on while the least is at an end."""
    rates = []

    def quantized(task, models, domain, method, bits, iterations, knobs, seed, held_out):
        assert (bits, iterations, seed, held_out) == ("W3A3", 400, 1000, True)
        rates.append(knobs["weight_lr"])
        return nn.Identity()

    class Report:
        @property
        def errors(self):
            return {"output": abs(np.log(rates[-1] / (1e-3 * best)))}

    monkeypatch.setattr(jobs, "quantized_one", quantized)
    monkeypatch.setattr(jobs, "report_of", lambda model: Report())
    monkeypatch.setattr(jobs, "networks", lambda *given: {})
    (tmp_path / "rates").mkdir()
    chosen = jobs.choose_rate("small", "QDrop", ITERATIONS, tmp_path, tmp_path)
    assert len(set(rates)) == tried
    if best < 1e9:
        assert chosen == pytest.approx(1e-3 * best)
    assert jobs.choose_rate("small", "QDrop", ITERATIONS, tmp_path, tmp_path) == chosen  # it is kept
    assert len(set(rates)) == tried


def test_rates_of_more_iterations_begin_below_those_of_few(small, tmp_path, monkeypatch):
    tried = []

    def quantized(task, models, domain, method, bits, iterations, knobs, seed, held_out):
        assert iterations == 2000
        tried.append(knobs["weight_lr"])
        return nn.Identity()

    class Report:
        errors = property(lambda self: {"output": abs(np.log(tried[-1] / 0.009))})

    monkeypatch.setattr(jobs, "quantized_one", quantized)
    monkeypatch.setattr(jobs, "report_of", lambda model: Report())
    monkeypatch.setattr(jobs, "networks", lambda *given: {})
    (tmp_path / "rates").mkdir()
    jobs.write_atomically(jobs._rate_path(tmp_path, "small", "QDrop", ITERATIONS), json.dumps({"chosen": 0.027}))
    assert jobs.choose_rate("small", "QDrop", 2000, tmp_path, tmp_path) == pytest.approx(0.009)
    assert sorted({round(rate, 4) for rate in tried}) == [0.003, 0.009, 0.027]


def test_networks_are_kept_and_are_one_seeds(small, tmp_path):
    first, again = (jobs.networks(small, 0, tmp_path) for _ in range(2))
    other = jobs.networks(small, 1, tmp_path)
    for domain in ("source", "one", "two"):
        for a, b in zip(first[domain].parameters(), again[domain].parameters(), strict=True):
            assert torch.equal(a, b)
    assert not torch.equal(first["one"].head.weight, other["one"].head.weight)
    (path, _) = sorted(tmp_path.iterdir())
    path.write_bytes(path.read_bytes()[:100])  # a crash: trained anew
    assert jobs.networks(small, 0, tmp_path)["one"].head.weight.shape == (3, 16)


def results(seeds, shares, images=4000, spread=0.0, seed=0):
    """Rows of models that are right with probabilities ``shares`` plus a seed's own deviation."""
    rng = np.random.default_rng(seed)
    return {k: {"x": rng.random(images) < shares + spread * rng.standard_normal()} for k in range(seeds)}


def test_intervals_are_those_of_the_normal_law():
    """Of one seed the spread is that of images: 1.96·sqrt(p(1 − p)/n); of many, that of seeds beside it."""
    one = estimate([results(1, 0.8)])
    half = 100 * 1.96 * (0.8 * 0.2 / 4000) ** 0.5
    assert one.high - one.low == pytest.approx(2 * half, rel=0.1)
    many = estimate([results(40, 0.8, spread=0.05)])
    assert many.high - many.low > 1.96 * 2 * 100 * 0.05 / 40**0.5 * 0.8
    assert many.low < 80 < many.high


def test_differences_are_paired():
    """The same images: a model that is right on one per cent more of them differs by a point, surely."""
    rng = np.random.default_rng(0)
    base = {k: {"x": rng.random(4000) < 0.8} for k in range(3)}
    better = {k: {"x": right["x"] | (rng.random(4000) < 0.05)} for k, right in base.items()}
    found = estimate([better], [base])
    assert found.mean == pytest.approx(1.0, abs=0.2) and found.low > 0.6 and found.p <= 2 / 2000
    none = estimate([base], [base])
    assert (none.mean, none.low, none.high) == (0, 0, 0) and none.p == 1
    with pytest.raises(ValueError, match="seeds must be the same"):
        estimate([base], [{0: base[0]}])


def test_domains_that_a_model_never_knows():
    assert estimate([{0: {"x": np.zeros(10, bool), "y": np.ones(10, bool)}}]).mean == 0


def test_holm():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == [] and holm([0.9, 0.8]) == [1.0, 1.0]


def test_from_the_command_line_to_tables(small, tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "ITERATIONS", 4)
    short = [
        Job("small", 0, m, "float" if m == "full precision" else "W3A3") for m in ("full precision", "RTN", "QDrop")
    ]
    monkeypatch.setattr(jobs, "grid", lambda *given, **options: short)
    monkeypatch.setattr(jobs, "quantized_one", _fast(jobs.quantized_one))
    call = CliRunner().invoke
    result = call(app, ["reproduce", "--quick", "--task", "small", "-o", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "| QDrop |" in result.output and "| full precision |" in result.output
    assert {p.name for p in (tmp_path / "out").iterdir()} >= {
        "rows.csv",
        "tables.md",
        "small-bits.png",
        "small-bits.svg",
    }
    again = call(app, ["reproduce", "render", "--rows", str(tmp_path / "out" / "rows.csv"), "-o", str(tmp_path / "b")])
    assert (tmp_path / "b" / "tables.md").read_text() == (tmp_path / "out" / "tables.md").read_text()
    assert again.exit_code == 0
    found = read(tmp_path / "out" / "rows.csv")
    way = Way("small", "RTN", "W3A3", "400", "{}", "systematic", "one+two")
    assert f"{estimate([found[way]])}" in render(tmp_path / "out" / "rows.csv", tmp_path / "c")


def test_a_task_is_set_against_another(tmp_path):
    """Shares are exact: rounded to nearest, models of the one are right on 80%, of the other on 60%, learned on 70%."""

    def written(task, shares, domains="a+b"):
        rows = []
        for (method, share), seed in itertools.product(shares.items(), range(2)):
            for names, rule in [("a", ""), ("b", ""), *((domains, rule) for rule in protocol.RULES)]:
                right = encoded(np.arange(1000) % 100 < share)
                known = {"method": method, "bits": "W3A3", "iterations": 400, "knobs": "{}", "rule": rule}
                correct = json.dumps(dict.fromkeys(names.split("+"), right))
                rows.append({"task": task, "network": seed, **known, "domains": names, "correct": correct})
        (tmp_path / f"{task}.csv").write_text(csv_text(rows, list(rows[0])))
        return str(tmp_path / f"{task}.csv")

    flat, plain = written("flat", {"RTN": 80}), written("plain", {"RTN": 60, "QDrop": 70})
    call = ["reproduce", "render", "-o", str(tmp_path / "out"), "--against", plain]
    done = CliRunner().invoke(app, [*call, "--rows", flat])
    assert done.exit_code == 0, done.output
    lines = (tmp_path / "out" / "between.md").read_text().splitlines()
    assert lines[0] == "## flat, less plain"
    assert lines[4].startswith("| 2 seeds, W3A3 | single | all targets, nearest | ")
    gains = {line.split(" | ")[0]: line.split(" | ")[1:] for line in lines[6:]}
    assert gains.keys() == {"| RTN", "| RTN, less QDrop there"}
    assert all(cell.startswith("80.0: 20.0 [") for cell in gains["| RTN"])
    assert all(cell.startswith("80.0: 10.0 [") for cell in gains["| RTN, less QDrop there"])
    for rows in ([], ["--rows", flat, "--rows", plain]):
        assert "against must go with render and one --rows" in CliRunner().invoke(app, [*call, *rows]).output
    (tmp_path / "both.csv").write_text(Path(flat).read_text() + "".join(Path(plain).read_text().splitlines(True)[1:]))
    both = CliRunner().invoke(app, [*call, "--rows", str(tmp_path / "both.csv")])
    assert "rows must be of one task to be compared, got flat, plain" in both.output


def test_a_study_is_set_beside_the_table(tmp_path):
    """Shares are exact: λ = 0 is right on 60% of the images, λ = 0.05, the table's, on 50%."""

    def row(network, knobs, domains, rule, share):
        right = encoded(np.arange(1000) % 100 < share)
        known = {"method": "HDRQ, paper", "bits": "W3A3", "iterations": 400, "knobs": knobs, "rule": rule}
        right = json.dumps(dict.fromkeys(domains.split("+"), right))
        return {"task": "x", "network": network, **known, "domains": domains, "correct": right}

    merges = [
        ("a", ""),
        ("b", ""),
        ("c", ""),
        *((d, r) for d in ("a+b", "a+c", "b+c", "a+b+c") for r in protocol.RULES),
    ]
    rows = [
        row(network, knobs, domains, rule, share)
        for knobs, share in (("{}", 50), ('{"distance": 0.0}', 60))
        for network in (0, 1, *((2,) if share == 50 else ()))
        for domains, rule in merges
    ]
    (tmp_path / "rows.csv").write_text(csv_text(rows, jobs.COLUMNS))
    text = render(tmp_path / "rows.csv", tmp_path)
    table = text[text.index("**The pull towards the source") :].splitlines()
    assert table[2].startswith("| seeds: 0, 1 | single | pairs, nearest |")  # the third has no row without distance
    assert table[4].startswith("| HDRQ, paper | 50.0 | 50.0 |") and table[4].endswith("|  |  |")
    assert table[5].startswith("| HDRQ, paper, distance=0.0 | 60.0 |") and " | 10.0 [" in table[5]
    assert "Which noise" not in text  # no rows of that study


def _fast(quantized_one):
    def quick(task, models, domain, method, bits, iterations, knobs, seed, held_out=False):
        return quantized_one(task, models, domain, method, bits, 4, knobs, seed, held_out)

    return quick


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rendr"], "what must be one of 'run', 'landscape', 'post-merge', 'render', got 'rendr'"),
        (["--task", "cats"], "task must be one of 'digits'"),
        (["--shard", "2/2"], "shard must be i/n with i < n"),
        (["--seeds", "0"], "seeds must be in [1, 1000], got 0"),
        (["render"], "rows must be a CSV of hdrq reproduce, got none in"),
    ],
)
def test_bad_input(arguments, message, tmp_path):
    result = CliRunner().invoke(app, ["reproduce", *arguments, "-o", str(tmp_path / "out")])
    assert message in result.stderr and not (tmp_path / "out" / "rows").exists()


def test_rows_of_other_networks_are_no_pairs(small, tmp_path):
    """The same seed trains others on another processor."""
    run([Job("small", 0, "RTN", "W3A3")], tmp_path, tmp_path / "cache", choose=False)
    text = collected(tmp_path)
    (path,) = (tmp_path / "cache").iterdir()
    assert {row["networks"] for row in csv.DictReader(text.splitlines())} == {
        jobs.hash_of(jobs.networks(small, 0, path.parent))
    }
    (tmp_path / "rows.csv").write_text(text)
    read(tmp_path / "rows.csv")
    header, first, *rest = text.splitlines()
    own = next(csv.DictReader([header, first]))["networks"]
    (tmp_path / "rows.csv").write_text("\n".join([header, first, *(row.replace(own, "other") for row in rest)]))
    with pytest.raises(ValueError, match=r"line 3 of .* other networks of seed 0 than rows before it"):
        read(tmp_path / "rows.csv")


def test_a_table_of_something_else_is_refused(tmp_path):
    (tmp_path / "rows.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"line 2 of .* must be a row of hdrq reproduce"):
        read(tmp_path / "rows.csv")
