"""``hdrq bench compat``: it verifies before it times, says what it measured, and refuses what it cannot."""

import csv
import json

import pytest
import torch

for package in ("typer", "rich"):
    pytest.importorskip(package)

testing = pytest.importorskip("typer.testing")
app = pytest.importorskip("hdrq.cli").app
from hdrq.benchmarks import compat, released  # noqa: E402

SMALL = {"residual": (lambda: released.Bottleneck(16), lambda n: torch.randn(n, 64, 6, 6).relu())}
QUICK = ("bench", "compat", "--iterations", "2", "--batch", "2", "--device", "cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(compat, "BLOCKS", SMALL)


def call(*arguments):
    return testing.CliRunner().invoke(app, list(arguments))


def test_both_phases_are_timed_and_written(tmp_path):
    result = call(*QUICK, "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    for phase in compat.PHASES:
        assert f"residual, {phase}, batch 2" in result.stdout
    assert "Where we lose: " in result.stdout
    rows = list(csv.DictReader((tmp_path / "compat-cpu.csv").open()))
    assert [(r["block"], r["phase"], r["batch"]) for r in rows] == [("residual", p, "2") for p in compat.PHASES]
    for row in rows:
        for step in ("patched", "fused"):
            ratio = float(row["released_p50"]) / float(row[f"{step}_p50"])
            assert float(row[f"{step}_step_ratio"]) == pytest.approx(ratio)
    assert len(json.loads((tmp_path / "compat-cpu.json").read_text())["figures"]) == 2


def test_a_quantizer_that_is_left_is_no_figure(monkeypatch):
    def fake_quantize(x, scale, quant_min, quant_max):
        return torch.clamp((x / scale).floor(), quant_min, quant_max) * scale

    fake_quantize.__module__ = released.__name__
    monkeypatch.setattr(released, "fake_quantize", fake_quantize)
    result = call(*QUICK)
    assert result.exit_code == 1
    assert "residual, fake-quantization, batch 2: verification failed: " in result.stdout
    assert "computes otherwise than any quantizer that we know" in result.stdout


def test_other_gradients_are_no_figure(monkeypatch):
    calls = []

    def loss(self, batch, original=released.Released.loss):
        calls.append(self)
        return original(self, batch) * (1.01 if len(calls) == 2 else 1)

    monkeypatch.setattr(released.Released, "loss", loss)
    with pytest.raises(compat.Mismatch, match="a gradient of the patched step is"):
        compat.steps("residual", "fake-quantization", 2, "cpu")


def test_bad_arguments():
    result = call("bench", "compat", "--batch", "0")
    assert result.exit_code == 2 and "argument --batch: must be at least 1, got [0]" in result.output
