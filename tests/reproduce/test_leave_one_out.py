"""Jobs of training with a domain left out: which there are, and that rows are kept and never run twice."""

import csv
import json

import pytest
import torch
from torch import nn

import hdrq
from hdrq.checkpoint.files import csv_text
from hdrq.reproduce import leave_one_out as jobs
from hdrq.reproduce import sharpness
from hdrq.reproduce.measures import decoded, encoded
from hdrq.reproduce.tasks.task import Task
from hdrq.reproduce.training_tables import tables

for package in ("safetensors", "mlxtend", "sklearn"):
    pytest.importorskip(package)


def load(domain, split):
    generator = torch.Generator().manual_seed(len(domain) * 10 + (split == "test") + 100 * (domain == "three"))
    labels = torch.arange(24) % 3
    return torch.randn(24, 3, 8, 8, generator=generator) + labels.view(-1, 1, 1, 1), labels


def network():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 3))


TINY = Task("tiny", "one", ("three", "seven"), load, network)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    for module in (jobs, sharpness):
        monkeypatch.setattr(module, "task_of", lambda name: TINY)


def test_jobs_are_arms_by_targets_seeds_and_bits():
    found = jobs.grid("tiny", range(2), ["W4A4", "W3A3"])
    assert len(found) == len({job.id for job in found}) == 2 * 3 * (2 + 2 * (len(jobs.ARMS) - 2))
    with pytest.raises(ValueError, match=r"arm must be one of 'float', 'float, folded', 'LSQ', .* got 'QAT'"):
        jobs.grid("tiny", [0], ["W4A4"], ["QAT"])


def test_the_target_is_its_test_images_and_the_others_train():
    found = jobs.domains_of("tiny", "three")
    assert torch.equal(found["three"][0], load("three", "test")[0])
    assert torch.equal(found["seven"][0], load("seven", "train")[0])


def test_rows_are_written_once_and_models_load(tmp_path, monkeypatch):
    plan = jobs.grid("tiny", [0], ["W4A4"], ["float", "LSQ", "fqat"])[:3]
    quick = {"epochs": 1, "batch_size": 8}
    jobs.run(plan, tmp_path, quick)
    with (tmp_path / "rows.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["selection"] for row in rows] == ["source", "last", "oracle"] * 3
    assert {row["arm"] for row in rows} == {"float", "LSQ", "fqat"} and {row["target"] for row in rows} == {"one"}
    assert all(0 <= float(row["out_of_domain"]) <= 100 for row in rows)
    assert len(list((tmp_path / "float").iterdir())) == 1  # one network for all arms
    hdrq.load(tmp_path / "models" / f"{plan[1].id}.safetensors", network().eval())
    monkeypatch.setattr(jobs, "train", None)
    jobs.run(plan, tmp_path, quick)


def test_models_and_where_they_start_are_measured(tmp_path, monkeypatch):
    plan = jobs.grid("tiny", [0], ["W4A4"], [jobs.FOLDED, "LSQ"])[:2]
    jobs.run(plan, tmp_path, {"epochs": 1, "batch_size": 8})
    sharpness.run(tmp_path)
    with (tmp_path / "sharpness.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = {(row["arm"], row["measure"]): row for row in rows}
    assert {arm for arm, _ in found} == {jobs.FOLDED, "LSQ", sharpness.START}
    assert ("LSQ", "rise, scales moved") in found and (sharpness.START, "rise, scales moved") not in found
    model = hdrq.load(tmp_path / "models" / f"{plan[1].id}.safetensors", network().eval())
    seen = [load(name, "test") for name in ("seven", "three")]  # not "one", which was left out
    with torch.no_grad():
        want = sum(float(torch.nn.functional.cross_entropy(model(x), y)) for x, y in seen) / 2
    assert float(found["LSQ", "loss"]["value"]) == pytest.approx(want, rel=1e-6)
    x, y = load("one", "test")
    right = decoded(json.loads(found["LSQ", "correct"]["value"])["one"])
    assert right.tolist() == (model(x).argmax(1) == y).tolist()
    monkeypatch.setattr(sharpness, "measured", None)
    sharpness.run(tmp_path)  # all rows are there


def row(seed, target, arm, bits, measure, value):
    return dict(zip(sharpness.COLUMNS, ("tiny", seed, target, arm, bits, measure, value), strict=False))


def test_tables_pair_seeds_and_domains(tmp_path):
    right = {"LSQ": 6, jobs.FOLDED: 8, "fqat": 7}  # of 10, in every domain; one less in the domain left out
    trace = {"LSQ": 2.0, jobs.FOLDED: 4.0, "fqat": 8.0}
    rows = []
    nothing = {name: encoded(torch.zeros(10, dtype=torch.bool).numpy()) for name in ("one", "three", "seven")}
    values_of_none = ("correct", json.dumps(nothing))
    for arm in right:
        for seed in range(2 if arm == "fqat" else 3):  # the third seed has no pair
            for target in ("one", "three"):
                counts = {name: right[arm] - (name == target) for name in ("one", "three", "seven")}
                texts = {name: encoded(torch.arange(10).lt(n).numpy()) for name, n in counts.items()}
                values = {"trace": trace[arm] * 3**seed, "correct": json.dumps(texts)}
                values |= {"rise, scales moved": 0.5 * trace[arm]} if arm != jobs.FOLDED else {}
                bits = "float" if arm == jobs.FOLDED else "W4A4"
                rows += [row(seed, target, arm, bits, *each) for each in values.items()]
                if arm == "LSQ":  # other bits, in a table of their own
                    rows += [
                        row(seed, target, arm, "W3A3", "trace", 99.0),
                        row(seed, target, arm, "W3A3", *values_of_none),
                    ]
    (tmp_path / "rows.csv").write_text(csv_text(rows, sharpness.COLUMNS))
    text = tables(tmp_path / "rows.csv")
    assert text.count("## tiny, W3A3") == text.count("## tiny, W4A4") == 1
    lines = text[text.index("## tiny, W4A4") :].splitlines()
    lines = lines[: next((k for k, line in enumerate(lines) if line == "## tiny, W3A3"), None)]
    found = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in lines if "|" in line
    }
    assert any(line.startswith("| seeds: 0, 1 |") for line in lines)
    accuracies = next(line for line in lines if line.startswith("| fqat")).split("|")
    assert [cell.split()[0] for cell in accuracies[2:6]] == ["70.0", "10.0", "60.0", "10.0"]
    assert found["fqat"] == ["2.00 [2.00, 2.00]", "4.00 [4.00, 4.00]"]  # over float, and over LSQ
    assert found["LSQ"] == ["0.50 [0.50, 0.50]", "1"]
    assert found["what 1 is"] == [f"6.93, {jobs.FOLDED}", "1, LSQ"]  # 4·√3
    (tmp_path / "none.csv").write_text(csv_text(rows[:4], sharpness.COLUMNS))
    with pytest.raises(ValueError, match="must have LSQ and float, folded of a seed, for every domain, got"):
        tables(tmp_path / "none.csv")
