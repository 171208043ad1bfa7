"""``hdrq sensitivity``: a table, JSON, and a file of settings that ``hdrq quantize`` takes."""

import json

import numpy as np
import pytest
from networks import CALIBRATION

for package in ("typer", "rich", "safetensors", "yaml", "scipy"):
    pytest.importorskip(package)

from typer.testing import CliRunner  # noqa: E402

from hdrq.checkpoint.inspection import contents  # noqa: E402
from hdrq.cli import app  # noqa: E402


@pytest.fixture
def given(tmp_path):
    np.save(tmp_path / "x.npy", CALIBRATION.numpy())
    return ["--model", "networks:net", "--data", str(tmp_path / "x.npy"), "--recipe", "rtn"]


def test_bits_found_are_those_of_a_run(given, tmp_path):
    config, out = tmp_path / "found.yaml", tmp_path / "out.safetensors"
    runner = CliRunner()
    found = runner.invoke(app, ["sensitivity", *given, "--bits", "auto:W3.5A4", "--json", "--save-config", str(config)])
    assert found.exit_code == 0, found.output
    result = json.loads(found.stdout)
    assert result["mean"] <= 3.5
    assert [layer["layers"] for layer in result["layers"]] == [["0"], ["3"], ["6"], ["9"]]
    made = runner.invoke(app, ["quantize", str(config), "--out", str(out)])
    assert made.exit_code == 0, made.output
    assert {layer.name: f"W{layer.bits}" for layer in contents(out).layers} == {
        name: text[:2] for name, text in result["bits"].items()
    }


def test_the_table_names_layers_and_what_they_get(given):
    result = CliRunner().invoke(app, ["sensitivity", *given, "--cost", "macs", "--set", "samples=32"])
    assert result.exit_code == 0, result.output
    assert "MACs" in result.output
    assert "bits of a multiply-add in the mean" in result.output


@pytest.mark.parametrize(
    "options, message",
    [
        (["--bits", "W4A4"], "bits must ask for a budget"),
        (["--cost", "time"], "cost must be one of"),
        (["--bits", "auto:x"], 'bits must be written like "auto:4.5"'),
    ],
)
def test_bad_settings_end_with_a_line(given, options, message):
    result = CliRunner().invoke(app, ["sensitivity", *given, *options])
    assert result.exit_code == 2
    assert message in result.output
