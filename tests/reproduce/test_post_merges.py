"""Ways to make one quantized model of experts in full precision, as jobs."""

import csv
import json

import pytest
import torch
from typer.testing import CliRunner

from hdrq.checkpoint.files import csv_text
from hdrq.cli import app
from hdrq.quantizers.layers import quantized_layers
from hdrq.reproduce import post_merges
from hdrq.reproduce.jobs import Job, networks
from hdrq.reproduce.post_merges import FLOAT, WAYS, Merging, chosen, error, made, plan, render, run_all


@pytest.fixture
def few(monkeypatch):
    """Few samples, and blocks that learn little."""
    monkeypatch.setattr(post_merges, "SAMPLES", 96)
    monkeypatch.setattr(post_merges, "HELD_OUT", 32)
    for name in ("blocks, experts' targets", "blocks, the merge's targets"):
        monkeypatch.setitem(WAYS, name, Merging({"method": "hdrq", "iterations": 4, "distance": 0.0}))
    learned = {"method": "hdrq", "iterations": 4}
    monkeypatch.setitem(WAYS, "integers, blocks", Merging(learned, choices=post_merges.LEARNED[:2], integers=True))


def test_every_way_has_a_row_and_a_place_in_the_table(small, few, tmp_path):
    jobs = plan("small", [0, 1], ["W3A3"])
    assert len(jobs) == 2 * (1 + len(WAYS))
    run_all(jobs, tmp_path, tmp_path / "cache", choose=False)
    done = sorted((tmp_path / "post-merge").iterdir())
    before = [path.stat().st_mtime_ns for path in done]
    run_all(jobs, tmp_path, tmp_path / "cache", choose=False)
    assert [path.stat().st_mtime_ns for path in done] == before  # what is there is not done again
    rows = [row for path in done for row in csv.DictReader(path.read_text().splitlines())]
    assert {row["method"] for row in rows} == {FLOAT, *WAYS} and {row["domains"] for row in rows} == {"one+two"}
    assert min(float(row["harmonic_mean"]) for row in rows) > 50  # merges of what has learned
    for row in rows:
        if row["method"] == "E-PMQ-style":
            assert float(row["best"]) < float(row["error"]) < float(row["nearest"])
        assert (row["nearest"] == "") == ("blocks" in row["method"] or row["method"] in (FLOAT, "nearest"))
    (tmp_path / "rows.csv").write_text(csv_text(rows, post_merges.MERGES.columns))
    table = render(tmp_path / "rows.csv", tmp_path).splitlines()
    assert table[2].startswith("| seeds: 0, 1 | W3A3 | W3A3, less GPTQ |")
    assert [line.split(" | ")[0].strip("| ") for line in table[4:]] == [FLOAT, *WAYS]


def test_a_choice_is_nearest_to_the_experts_on_images_kept_apart(small, few, tmp_path, monkeypatch):
    tried = []
    monkeypatch.setattr(post_merges, "made", lambda name, experts, images, bits, knobs, seed: tried.append(
        (knobs, bits, seed, [len(x) for x in images])))  # fmt: skip
    monkeypatch.setattr(post_merges, "error", lambda merged, experts, images: abs(tried[-1][0]["lam"] - 0.1))
    (tmp_path / "rates").mkdir()
    found = chosen("small", "E-PMQ-style", tmp_path, tmp_path)
    assert found == {"lam": 0.1} and len(tried) == 6
    assert {(bits, seed, *counts) for _, bits, seed, counts in tried} == {("W4A4", 1000, 64, 64)}
    assert chosen("small", "its rounding alone", tmp_path, tmp_path) == {"lam": 0.1}  # a control takes the same
    assert len(tried) == 6 and len(json.loads(next((tmp_path / "rates").iterdir()).read_text())["tried"]) == 6
    assert chosen("small", "nearest", tmp_path, tmp_path) == {}


def test_experts_known_as_integers_choose_by_their_own_outputs(small, few, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(post_merges, "choose_rate", lambda *given: 0.5)
    monkeypatch.setattr(post_merges, "made", lambda name, experts, images, bits, knobs, seed: (knobs, experts))
    monkeypatch.setattr(
        post_merges, "error", lambda merged, experts, images: seen.append((merged, experts)) or len(seen)
    )
    (tmp_path / "rates").mkdir()
    found = chosen("small", "integers, blocks", tmp_path, tmp_path)
    assert found == {"weight_lr": 0.5, **post_merges.LEARNED[0]} and len(seen) == 2
    for (knobs, experts), judges in seen:
        assert knobs["weight_lr"] == 0.5 and all(a is b for a, b in zip(experts, judges, strict=True))
        assert all(quantized_layers(expert) for expert in experts)


def test_an_expert_is_no_way_from_itself(small, tmp_path):
    expert = networks(small, 0, tmp_path)["one"]
    x = small.load("one", "train")[0][:32]
    assert error(expert, [expert, expert], [x, x]) == 0
    assert error(torch.nn.Sequential(expert, torch.nn.Flatten()), [lambda x: 2 * expert(x)], [x]) == pytest.approx(0.25)


def test_blocks_without_experts_learn_from_the_merge(small, few, tmp_path, monkeypatch):
    models = networks(small, 0, tmp_path)
    experts = [models["one"], models["two"]]
    images = [small.load(domain, "train")[0][:96] for domain in ("one", "two")]
    ways = [made(name, experts, images, "W8A8", {}, 0) for name in WAYS if name.startswith("blocks")]
    with torch.no_grad():
        outputs = [way(images[0]) for way in ways]
    assert not torch.equal(*outputs)


def test_from_the_command_line(small, few, tmp_path, monkeypatch):
    monkeypatch.setattr(post_merges, "plan", lambda *given: [Job("small", 0, "nearest", "W4A4")])
    call = ["reproduce", "post-merge", "--quick", "--task", "small", "-o", str(tmp_path / "out")]
    done = CliRunner().invoke(app, call)
    assert done.exit_code == 0 and "| nearest |" in done.output, done.output
    again = ["reproduce", "render", "--rows", str(tmp_path / "out" / "post-merge.csv"), "-o", str(tmp_path / "b")]
    assert CliRunner().invoke(app, again).exit_code == 0
    assert (tmp_path / "b" / "post-merge.md").read_text() == (tmp_path / "out" / "post-merge.md").read_text()
