"""``hdrq export``: a file that a runtime computes in integers, and what it refuses."""

import numpy as np
import pytest
import torch
from torch import nn

import hdrq
import hdrq.export

for package in ("onnx", "onnxruntime", "onnxscript", "typer", "rich"):
    pytest.importorskip(package)
testing = pytest.importorskip("typer.testing")
app = pytest.importorskip("hdrq.cli").app


def call(*arguments):
    return testing.CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture
def files(tmp_path, monkeypatch):
    (tmp_path / "nets.py").write_text(
        "from torch import nn\n"
        "def build():\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()\n"
    )
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()
    x = torch.randn(8, 3, 8, 8)
    np.save(tmp_path / "x.npy", x.numpy())
    hdrq.save(hdrq.quantize(model, x, "rtn", bits="W4A4", progress=False), tmp_path / "q.safetensors")
    return "export", "q.safetensors", "--model", "nets:build", "--data", "x.npy", "-o", "model.onnx"


@pytest.mark.parametrize("runtime", ["openvino", "onnxruntime"])
def test_a_checked_file(files, runtime, tmp_path):
    pytest.importorskip(runtime)
    result = call(*files, "--runtime", runtime, "--check")
    assert result.exit_code == 0, result.output
    assert f"model.onnx: for {runtime}, 2 of 2 products in integers" in result.stdout
    assert f"{runtime}: 2 products in integers, 0 of quantized weights in float" in result.stdout
    assert (tmp_path / "model.onnx").exists()


@pytest.mark.parametrize("options", [("-o", "model.pt2"), ("--to", "pt2")])
def test_a_program_of_torch_export(files, options, tmp_path, monkeypatch):
    """By its name or by the option; whether it is checked in inductor, not what a compilation finds."""
    asked = []

    def check(path, model, data, *, runtime):
        asked.append((str(path), runtime))
        return type("Checked", (), {"floats": ["a layer"], "__str__": lambda self: "1 of quantized weights in float"})()

    monkeypatch.setattr(hdrq.export, "check", check)
    result = call(*files, *options, "--check")
    assert result.exit_code == 1, result.output
    out = "model.pt2" if options[0] == "-o" else "model.onnx"
    assert f"{out}: for inductor, 2 of 2 products in integers" in result.stdout
    assert asked == [(out, "inductor")]
    x = torch.from_numpy(np.load(tmp_path / "x.npy"))
    program = torch.export.load(tmp_path / out).module()
    with torch.no_grad():
        want = hdrq.load("q.safetensors", "nets:build")(x)
        torch.testing.assert_close(program(x), want, atol=1e-6, rtol=0)


def test_bad_input(files, tmp_path):
    result = call(*files, "--to", "tflite")
    assert (
        result.exit_code == 2 and "to must be one of 'onnx', 'pt2', 'compressed-tensors', got 'tflite'" in result.output
    )
    for options in (("--to", "pt2", "--runtime", "openvino"), ("--runtime", "inductor")):
        result = call(*files, *options)
        assert result.exit_code == 2 and 'runtime must be "inductor" for pt2, and only there, got' in result.output
    result = call(*files, "--runtime", "tensorrt")
    assert result.exit_code == 2 and "ranges must lie in [-128, 127] for tensorrt" in result.output
    assert not (tmp_path / "model.onnx").exists()


def test_a_missing_package_names_its_extra(files, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    result = call(*files)
    assert result.exit_code == 2
    assert 'onnxscript must be installed, got none: pip install "hdrq[export]"' in result.output
