"""The command line, and the demo behind it: what is printed, what is written, what is refused."""

import csv
import json

import pytest
import torch

import hdrq
from hdrq.evaluate.metrics import Row, accuracy
from hdrq.report.tables import write_rows

for package in ("typer", "rich", "safetensors", "matplotlib", "sklearn", "mlxtend", "PIL"):
    pytest.importorskip(package)

testing = pytest.importorskip("typer.testing")
app = pytest.importorskip("hdrq.cli").app
data, run, nets = (pytest.importorskip(f"hdrq.demo.{name}") for name in ("data", "run", "model"))

ROWS = [
    "full precision",
    "round to nearest, naive merge",
    "HDRQ, naive merge",
    "HDRQ, noise-sampled merge",
    "HDRQ, systematic merge",
]


def few(domain, split):
    """A hundred images of a domain."""
    return tuple(part[:100] for part in data.load(domain, split))


@pytest.fixture(scope="module")
def small():
    """The demo on few images and with two iterations a block."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "ITERATIONS", 2)
        patch.setattr(run, "CALIBRATION", 16)
        patch.setattr(run, "load", few)
        yield


@pytest.fixture(scope="module")
def made(small, tmp_path_factory):
    """What ``hdrq demo`` printed, and the folder that it wrote."""
    folder = tmp_path_factory.mktemp("demo") / "made" / "here"
    result = call("demo", "--bits", "W3A3", "--seed", "5", "--out", str(folder))
    assert result.exit_code == 0, result.output
    return result.output, folder


def call(*arguments):
    return testing.CliRunner().invoke(app, list(arguments))


# --- info


def test_info_says_what_is_here():
    result = call("info")
    assert result.exit_code == 0
    for line in (f"hdrq  {hdrq.__version__}", f"torch  {torch.__version__.partition('+')[0]}", "runs on cpu", "gpu"):
        assert line in result.output
    for name, missing in hdrq.available_backends().items():
        assert f"backend {name}  {missing or 'available'}" in result.output


def test_info_says_why_a_backend_is_missing(monkeypatch):
    reason = 'triton is not installed; pip install "hdrq[triton]"'  # not markup
    monkeypatch.setattr("hdrq.backends.info.available_backends", lambda: {"torch": None, "triton": reason})
    result = call("info")
    assert "backend torch  available" in result.output and f"backend triton  {reason}" in result.output


# --- bad input


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--bits", "4"], 'bits must be written like "W4A4", got'),
        (["--bits", "W1A4"], "weight bits must be in [2, 16], got 1"),
        (["--bits", "W4A17"], "activation bits must be in [2, 16], got 17"),
        (["--seed", "-1"], "seed must be in"),
        (["--seed", "one"], "Invalid value for '--seed'"),
        (["--colour"], "No such option"),
    ],
)
def test_bad_options_end_with_two_and_a_message(arguments, message):
    result = call("demo", *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())


def test_out_that_cannot_be_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        assert call("demo", "--out", str(out)).exit_code == 2


# --- the demo


def test_demo_prints_its_table(made):
    output, _ = made
    for word in ("full precision", *data.TARGETS, "W3A3, seed 5", "merged.safetensors"):
        assert word in " ".join(output.split())


def test_demo_writes_table_figure_and_model(made):
    _, folder = made
    assert {p.name for p in folder.iterdir()} == {
        *(f"{name}.{kind}" for name in ("table", "pairs") for kind in ("csv", "json")),
        "figure.png",
        "merged.safetensors",
    }
    assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((folder / "table.json").read_text())
    assert (record["bits"], record["seed"], record["hdrq"]) == ("W3A3", 5, hdrq.__version__)
    assert [row["method"] for row in record["rows"]] == ROWS
    with open(folder / "table.csv", newline="") as file:
        lines = list(csv.reader(file))
    assert lines[0] == ["method", *data.TARGETS, "harmonic_mean"] and [line[0] for line in lines[1:]] == ROWS
    assert float(lines[1][-1]) == pytest.approx(record["rows"][0]["harmonic_mean"], abs=0.005)


def test_merged_model_loads_again_and_gives_the_tables_accuracies(made):
    _, folder = made
    merged = hdrq.load(folder / "merged.safetensors", nets.resnet())
    want = json.loads((folder / "table.json").read_text())["rows"][-1]["accuracies"]
    assert want == {domain: accuracy(merged, *few(domain, "test")) for domain in data.TARGETS}


def test_demo_repeats_to_the_digit_and_tells_its_progress(small, made):
    steps = []
    result = run.run("W3A3", 5, lambda domain, step: steps.append((domain, step.index, step.iteration)))
    assert steps == [(domain, block, 2) for domain in data.TARGETS for block in range(8)]
    rows = json.loads((made[1] / "table.json").read_text())["rows"]
    assert [row.accuracies for row in result.rows] == [row["accuracies"] for row in rows]


def test_shipped_models_merge_well_in_full_precision(made):
    full = json.loads((made[1] / "table.json").read_text())["rows"][0]
    assert full["harmonic_mean"] > 60  # 73 in a prototype, on all images
    for domain in data.TARGETS:
        assert accuracy(nets.load_model(domain), *few(domain, "test")) > full["accuracies"][domain] - 5


# --- reports


def test_rows_are_written_as_numbers(tmp_path):
    rows = [Row("a", {"x": 40.0, "y": 60.0}), Row('b, "quoted"', {"x": 0.0, "y": 10.0})]
    write_rows(rows, tmp_path, {"bits": "W4A4"})
    with open(tmp_path / "table.csv", newline="") as file:
        assert list(csv.reader(file)) == [
            ["method", "x", "y", "harmonic_mean"],
            ["a", "40.00", "60.00", "48.00"],
            ['b, "quoted"', "0.00", "10.00", "0.00"],
        ]
    record = json.loads((tmp_path / "table.json").read_text())
    assert record["bits"] == "W4A4" and record["rows"][0]["harmonic_mean"] == pytest.approx(48)
