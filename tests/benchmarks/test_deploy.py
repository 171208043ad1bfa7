"""``hdrq bench deploy``: files are checked before they are timed, and what was measured is written."""

import csv

import pytest
import torch
from torch import nn

for package in ("onnx", "onnxruntime", "onnxscript", "openvino", "torchao", "typer", "rich"):
    pytest.importorskip(package)

testing = pytest.importorskip("typer.testing")
app = pytest.importorskip("hdrq.cli").app
from hdrq.benchmarks import deploy  # noqa: E402
from hdrq.export.inductor import opened  # noqa: E402


def build():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A small model, and programs that are run, not compiled."""
    own = deploy.check

    def check(path, *args, runtime):
        return type("Checked", (), {"floats": []}) if runtime == "inductor" else own(path, *args, runtime=runtime)

    monkeypatch.setattr(deploy, "MODELS", {"small": (build, lambda n: torch.randn(n, 3, 8, 8))})
    monkeypatch.setattr(deploy, "check", check)
    monkeypatch.setattr(deploy, "compile_pt2", lambda program: opened(program).module())


def call(*arguments):
    return testing.CliRunner().invoke(app, ["bench", "deploy", "--batch", "1", "2", "--seconds", "0.01", *arguments])


def test_every_form_is_timed_and_written(tmp_path):
    result = call("--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    rows = list(csv.DictReader((tmp_path / "deploy-cpu.csv").open()))
    runtimes = ("ONNX Runtime", "OpenVINO", "inductor")
    kinds = [f"{runtime}, {kind}" for runtime in runtimes for kind in ("float", "integers")]
    forms = ["PyTorch, float", "hdrq, eager", "hdrq, deploy form", *kinds]
    assert [(row["batch"], row["form"]) for row in rows] == [(size, form) for size in "12" for form in forms]
    assert all(float(row["ms"]) > 0 for row in rows)


def test_a_file_that_computes_in_float_is_no_figure(monkeypatch):
    class Found:
        floats = ("a layer (Conv)",)

    monkeypatch.setattr(deploy, "check", lambda *args, **options: Found())
    result = call()
    assert result.exit_code == 1 and "verification failed: small in onnxruntime" in result.output


def test_a_deploy_form_with_other_answers_is_no_figure(monkeypatch):
    monkeypatch.setattr(deploy, "deploy", lambda model: build().eval())
    result = call()
    assert result.exit_code == 1 and "verification failed: small: the deploy form has other answers" in result.output
