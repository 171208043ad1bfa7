"""``hdrq bench deploy``: files are checked before they are timed, and what was measured is written."""

import csv

import pytest
import torch
from torch import nn

for package in ("onnx", "onnxruntime", "onnxscript", "openvino", "typer", "rich"):
    pytest.importorskip(package)

testing = pytest.importorskip("typer.testing")
app = pytest.importorskip("hdrq.cli").app
from hdrq.benchmarks import deploy  # noqa: E402


def build():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(deploy, "MODELS", {"small": (build, lambda n: torch.randn(n, 3, 8, 8))})


def call(*arguments):
    return testing.CliRunner().invoke(app, ["bench", "deploy", "--batch", "2", "--seconds", "0.01", *arguments])


def test_every_form_is_timed_and_written(tmp_path):
    result = call("--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    rows = list(csv.DictReader((tmp_path / "deploy-cpu.csv").open()))
    kinds = [f"{runtime}, {kind}" for runtime in ("ONNX Runtime", "OpenVINO") for kind in ("float", "integers")]
    assert [row["form"] for row in rows] == ["PyTorch, float", "hdrq, eager", *kinds]
    assert all(float(row["ms"]) > 0 for row in rows)


def test_a_file_that_computes_in_float_is_no_figure(monkeypatch):
    class Found:
        floats = ("a layer (Conv)",)

    monkeypatch.setattr(deploy, "check", lambda *args, **options: Found())
    result = call()
    assert result.exit_code == 1 and "verification failed: small in onnxruntime" in result.output
