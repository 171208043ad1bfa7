"""The Python of the pages on export and on folders runs."""

import re
from pathlib import Path

import pytest

import hdrq.export

for package in ("onnx", "onnxruntime", "openvino", "torchao"):
    pytest.importorskip(package)

DOCS = Path(__file__).parents[2] / "docs"
pytestmark = [
    pytest.mark.skipif(not DOCS.is_dir(), reason="not run from a source tree"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def blocks(page):
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(block, names):
    exec(compile(block, "page", "exec"), names)
    return names


def test_export(monkeypatch, capsys):
    onnx, pt2, packed, back = blocks("export.md")
    names = run(onnx, {})
    assert "openvino: 2 products in integers, 0 of quantized weights in float" in capsys.readouterr().out

    # inductor compiles for ten seconds, which tests/export/test_pt2.py spends: here the program runs as it is.
    monkeypatch.setattr(hdrq.export, "compile_pt2", lambda program: program.module())
    monkeypatch.setattr(hdrq.export, "check", lambda *_, runtime: runtime)
    names = run(pt2, names)
    assert Path("model.pt2").is_file() and names["outputs"].shape == (5, 10)

    run(packed, names)
    assert Path("model.pt").is_file()

    for file in ("a.onnx", "b.onnx"):  # of the reader
        hdrq.export.to_onnx(names["quantized"], names["data"], file, runtime="openvino")
    run(back, {})
    assert Path("merged.onnx").is_file()


def test_folders():
    pytest.importorskip("compressed_tensors")
    pytest.importorskip("transformers")
    (block,) = blocks("folders.md")
    run(block, {})
    assert Path("folder/model.safetensors").is_file() and Path("folder/config.json").is_file()
