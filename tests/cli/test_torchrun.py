"""``torchrun -m hdrq quantize``: two processes, one file and one voice."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist

for package in ("typer", "rich", "safetensors", "yaml"):
    pytest.importorskip(package)
if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("torch has no gloo", allow_module_level=True)

from hdrq.checkpoint.loading import manifest_of  # noqa: E402

MODULE = """
import os, warnings, torch
from torch import nn

def tiny(fails=None):
    if os.environ["RANK"] == str(fails):
        raise ArithmeticError("no such luck")
    warnings.warn("on both ranks")
    if os.environ["RANK"] == "1":
        warnings.warn("on one rank")
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(54, 3))
"""


def torchrun(folder, *options):
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "hdrq", "quantize"]
    command += ["--model", "twins:tiny", "--data", "images.npy", "--recipe", "qdrop", "--iterations", "4"]
    path = os.pathsep.join([str(Path(__file__).parents[2]), str(folder)])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, *command, *options], cwd=folder, env=environment, capture_output=True, text=True, timeout=240
    )


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "twins.py").write_text(MODULE)
    np.save(tmp_path / "images.npy", np.random.default_rng(0).normal(size=(40, 3, 8, 8)).astype(np.float32))
    return tmp_path


def test_one_file_is_written_and_one_table_printed(folder):
    done = torchrun(folder, "--out", "out.safetensors", "--workdir", "run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Accumulated error") == 1
    assert done.stderr.count("warning: on both ranks") == 1
    assert done.stderr.count("warning: on rank 1: on one rank") == 1
    assert done.stderr.count("block 1 of 2") == 1
    assert manifest_of(folder / "out.safetensors")["processes"] == 2
    assert {path.name for path in (folder / "run").iterdir()} >= {"run.json", "block-001.safetensors", "losses.csv"}


def test_a_rank_that_fails_ends_the_command(folder):
    done = torchrun(folder, "--out", "out.safetensors", "--set", "model_args={fails: 1}")
    assert done.returncode != 0 and not (folder / "out.safetensors").exists()
    lines = [line for line in done.stderr.splitlines() if line.startswith("hdrq: ") and "warning" not in line]
    # torchrun may end the other rank before it has said whose fault it was.
    assert lines and all(line.count("no such luck") == 1 for line in lines)
    assert sum("rank 1 has failed, which ends all 2" in line for line in lines) <= 1
