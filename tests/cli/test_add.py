"""``hdrq merge --add``: what Python does, from options."""

import json

import pytest
import torch
from networks import SAMPLES, data, mergeable, quantized
from safetensors.torch import save_file

import hdrq
from hdrq.merging import add_file
from hdrq.merging.changes import Change

for package in ("typer", "rich", "safetensors", "matplotlib"):
    pytest.importorskip(package)

from typer.testing import CliRunner  # noqa: E402

from hdrq.cli import app  # noqa: E402


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a model, an adapter without a config, and two states."""
    monkeypatch.chdir(tmp_path)
    model = quantized(0, bits="W8A8")
    hdrq.save(model, "q")
    factors = {"head.lora_A.weight": data(2, 6) * 0.01, "head.lora_B.weight": data(4, 2, seed=1)}
    save_file(factors, "lora.safetensors")
    for seed in (1, 2):
        state = mergeable(seed).state_dict()
        save_file(
            {name: value * 0.1 if value.is_floating_point() else value for name, value in state.items()}, f"{seed}"
        )
    torch.manual_seed(0)
    save_file({"x": SAMPLES}, "data.safetensors")
    return tmp_path


def call(*arguments):
    return CliRunner().invoke(app, ["merge", *map(str, arguments)])


def test_options_are_those_of_python(here):
    given = ["--add", "lora.safetensors", "--alpha", 2, "--scale", 0.5, "--minus", "-"]
    given += ["--add", "1", "--minus", "2", "--scale", -0.1, "--rule", "noise", "--seed", 3, "-o", "out"]
    result = call("q", *given, "--json", "--report", "report")
    assert result.exit_code == 0
    changes = [Change("lora.safetensors", scale=0.5, alpha=2), Change("1", minus="2", scale=-0.1)]
    want = add_file("q", changes, "want", rule="noise", seed=3)
    assert json.loads(result.stdout) == json.loads((here / "report" / "added.json").read_text())
    assert json.loads(result.stdout) == json.loads(json.dumps(want.as_dict()))
    assert (here / "out").read_bytes() == (here / "want").read_bytes()
    table = call("q", "--add", "lora.safetensors", "--alpha", 2, "--dry-run")
    assert table.exit_code == 0 and "head.weight" in table.stdout and "systematic" in table.stdout
    assert "kept" in table.stdout and not (here / "out2").exists()
    inspected = CliRunner().invoke(app, ["inspect", "out"])
    assert "2 changes added: rule noise, seed 3" in inspected.stdout


def test_data_and_architecture_serve_calibrated_rounding(here):
    given = ["--add", "lora.safetensors", "--alpha", 2, "--model", "shapes:net", "--data", "data.safetensors"]
    (here / "shapes.py").write_text("from networks import mergeable\ndef net():\n    return mergeable(0)\n")
    result = call("q", *given, "--rule", "calibrated", "--samples", 16, "-o", "out")
    assert result.exit_code == 0 and "calibrated" in result.stdout and "on inputs" in result.stdout
    add_file(
        "q",
        Change("lora.safetensors", alpha=2),
        "want",
        rule="calibrated",
        model=mergeable(0),
        calibration=SAMPLES[::3],
    )
    assert (here / "out").read_bytes() == (here / "want").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["q", "q", "--add", "lora.safetensors"], "files must be one model with --add, got 2; merge them"),
        (["q", "--add", "lora.safetensors"], "alpha must be given for lora.safetensors, which has no"),
        (["q", "--add", "1"], "minus must be given for 1, which is no adapter of peft's"),
        (["q", "--add", "1", "--minus", "2", "--minus", "2"], "minus must be given once for each of 1 changes"),
        (["q", "--add", "1", "--minus", "none"], "none"),
        (["q", "--add", "1", "--minus", "2", "--tau", "0.1"], "tau must be left out with --add, got 0.1"),
        (["q", "--add", "1", "--minus", "2", "--device", "cuda"], "device must be left out with --add, got cuda"),
        (["q", "--add", "1", "--minus", "2", "--rule", "half-up"], "rule must be one of 'systematic', 'nearest'"),
        (["q", "--add", "1", "--minus", "2", "--rule", "calibrated"], 'calibration must be given for rule "cali'),
        (["q", "--add", "1", "--minus", "2", "--data", "data.safetensors"], "model must be given with calibration"),
        (["q", "q", "--scale", "2"], "scale must be left out without --add, got [2.0]"),
        (["q", "q", "--minus", "1"], "minus must be left out without --add, got ['1']"),
        (["1", "--add", "1", "--minus", "2"], "path must be a file that hdrq.save wrote, got '1': it has no manifest"),
        (["q", "--add", "1", "--minus", "2", "--dry-run"], "out must be given, or --dry-run, and not both"),
    ],
)  # fmt: skip
def test_bad_input_leaves_no_file(arguments, message, here):
    before = sorted(here.iterdir())
    result = call(*arguments, "-o", "out")
    assert result.exit_code == 2 and message in result.stderr and result.stderr.count("\n") == 1
    assert sorted(here.iterdir()) == before
