"""Every block of Python in docs/qat.md runs."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs/qat.md"


@pytest.mark.skipif(not PAGE.exists(), reason="not run from a source tree")
def test_the_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    names: dict = {}
    for block in blocks:
        exec(block, names)
    assert "left out: sketch" in capsys.readouterr().out and (tmp_path / "sketch.safetensors").exists()
    assert len(blocks) == 2 and not any(p.requires_grad for p in names["quantized"].parameters())
