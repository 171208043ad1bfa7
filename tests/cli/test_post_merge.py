"""``hdrq post-merge``: one line from three float checkpoints to a file, the bits of Python's."""

import pytest
import torch
from helpers import same, state
from networks import SAMPLES, mergeable

import hdrq

for package in ("typer", "rich", "safetensors", "yaml", "PIL"):
    pytest.importorskip(package)

from safetensors.torch import save_file  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from hdrq.cli import app  # noqa: E402


@pytest.fixture
def files(tmp_path):
    for k in range(3):
        save_file(mergeable(k).state_dict(), tmp_path / f"{k}.safetensors")
        save_file({"x": SAMPLES + k}, tmp_path / f"data{k}.safetensors")
    return tmp_path


def call(folder, *options):
    experts = [folder / f"{k}.safetensors" for k in range(3)]
    data = [word for k in range(3) for word in ("--data", folder / f"data{k}.safetensors")]
    line = ["post-merge", *experts, *data, "--model", "networks:factory", "-o", folder / "out.safetensors", *options]
    return CliRunner().invoke(app, list(map(str, line)))


def test_three_experts_become_one_file(files, monkeypatch):
    monkeypatch.setattr("networks.factory", lambda: mergeable(9), raising=False)
    options = (
        "--group-size",
        2,
        "--lam",
        0.1,
        "--merge",
        "ties",
        "--base",
        files / "0.safetensors",
        "--set",
        "act_order=true",
    )
    result = call(files, *options)
    assert result.exit_code == 0, result.output
    assert "epmq: the objective" in result.output and "head" in result.output
    loaded = hdrq.load(files / "out.safetensors", mergeable(5))
    experts = [mergeable(k) for k in range(3)]
    settings = {"group_size": 2, "lam": 0.1, "merge": "ties", "base": experts[0], "act_order": True, "progress": False}
    again = hdrq.post_merge(experts, [SAMPLES + k for k in range(3)], **settings)
    assert torch.equal(loaded(SAMPLES), again(SAMPLES)) and same(state(loaded), state(again))


def test_what_is_missing_is_said_and_nothing_is_written(files, monkeypatch):
    monkeypatch.setattr("networks.factory", lambda: mergeable(9), raising=False)
    result = call(files, "--method", "regmean")
    assert result.exit_code and "method must be one of 'epmq', 'gptq', 'awq', 'rtn'" in result.output.replace("\n", " ")
    result = call(files, "--data", files / "data0.safetensors")
    assert result.exit_code and "data must be as many as the experts, 3, got 4" in result.output.replace("\n", " ")
    result = call(files)
    assert result.exit_code and "group_size must divide the 6 inputs of head, got 128" in result.output.replace(
        "\n", " "
    )
    assert not (files / "out.safetensors").exists()


@pytest.mark.filterwarnings("ignore:block .* is rounded to nearest")
def test_a_work_folder_has_the_run(files, monkeypatch):
    monkeypatch.setattr("networks.factory", lambda: mergeable(9), raising=False)
    options = ("--group-size", 2, "--method", "hdrq", "--set", "iterations=3", "--workdir", files / "run")
    result = call(files, *options)
    assert result.exit_code == 0 and "Loss: hdrq" in result.output, result.output
    assert {"losses.png", "block-002.safetensors"} <= {path.name for path in (files / "run").iterdir()}
    before = (files / "out.safetensors").read_bytes()
    in_files = (*options[:-2], "--model", "networks:Mergeable", "--offload-folder", files / "offload")
    result = call(files, *in_files)
    assert result.exit_code == 0 and not list((files / "offload").iterdir()), result.output
    again = hdrq.load(files / "out.safetensors", mergeable(5))
    (files / "out.safetensors").write_bytes(before)
    assert same(state(again), state(hdrq.load(files / "out.safetensors", mergeable(5))))
    result = call(files, *options)
    assert result.exit_code and "workdir must hold no run" in " ".join(result.output.split())
    assert call(files, *options, "--resume").exit_code == 0 and (files / "out.safetensors").read_bytes() == before
