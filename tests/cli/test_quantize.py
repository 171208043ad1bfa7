"""``hdrq quantize``: from images on disk to a quantized file, by options and by YAML."""

import errno
import os
import shutil
import tempfile
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cli.quantizing import OPTIONS, SETTINGS, call, manifest, model, tensors
from typer.testing import CliRunner

import hdrq
from hdrq.calibrate.images import MEAN, STD, load_data
from hdrq.cli import app
from hdrq.methods import job


def test_options_make_a_model(place):
    result = call(*SETTINGS, **OPTIONS)
    assert result.exit_code == 0, result.output
    for word in ("hdrq, W4A4, seed 0", "Accumulated error", "nearest", "loss", "output", "peak memory: host"):
        assert word in result.output
    quantized = hdrq.load(place / "q.safetensors", model())
    images = load_data(place / "images", resize=20, crop=16)
    learned_from = images[[i for i in range(20) if i % 10 != 9]]
    float_model, source = (model(seed) for seed in (0, 1))
    again = hdrq.quantize(float_model, learned_from, iterations=4, source=source)
    assert torch.equal(quantized(images), again(images))


def test_the_table_says_where_what_blocks_read_is_quantized(place):
    result = call(*SETTINGS, model="tinynet:blocks", data="images", recipe="rtn")
    assert result.exit_code == 0, result.output
    rows = {cells[0]: cells[1:] for line in result.stdout.splitlines() if (cells := line.replace("│", " ").split())}
    assert rows["2"][0] == "block" and rows["3"][0] == "layers"
    assert "input quantized at" in " ".join(result.stdout.replace("┃", " ").split())


def test_yaml_makes_the_same_model_and_options_override_it(place):
    assert call(*SETTINGS, **OPTIONS).exit_code == 0
    settings = {**OPTIONS, "out": "y.safetensors", "iterations": 9, "resize": 20, "crop": 16, "weight-lr": "5e-2"}
    (place / "run.yaml").write_text("\n".join(f"{name}: {value}" for name, value in settings.items()))
    result = call("run.yaml", iterations="4")
    assert result.exit_code == 0, result.output
    one, two = tensors("q.safetensors"), tensors("y.safetensors")
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_manifest_has_every_default(place):
    assert call(*SETTINGS, **OPTIONS).exit_code == 0
    facts = manifest("q.safetensors")
    preparation = {"resize": 20, "crop": 16, "mean": list(MEAN), "std": list(STD)}
    assert facts["run"] == {**preparation, "preset": "paper", "samples": 1024, "held_out": 0.1, "device": "cpu"}
    assert facts["architecture"] == {"factory": "tinynet:tiny", "arguments": {}}
    assert facts["recipe"]["beta_start"] == 20 and facts["recipe"]["iterations"] == 4


def test_the_same_run_gives_the_same_file_wherever_it_lies(place):
    assert call(*SETTINGS, **OPTIONS).exit_code == 0
    (place / "elsewhere").mkdir()
    shutil.copytree(place / "images", place / "elsewhere" / "images")
    others = {"data": "elsewhere/images", "out": "elsewhere/q.safetensors", "workdir": "elsewhere/work"}
    assert call("--resume", "--set", "cache=disk", *SETTINGS, **{**OPTIONS, **others}).exit_code == 0
    assert (place / "q.safetensors").read_bytes() == (place / "elsewhere" / "q.safetensors").read_bytes()
    assert b"elsewhere" not in (place / "elsewhere" / "q.safetensors").read_bytes()
    assert call("--set", "samples=8", *SETTINGS, **OPTIONS).exit_code == 0
    few, all_of_them = manifest("q.safetensors"), manifest("elsewhere/q.safetensors")
    assert few["fingerprints"]["calibration"] != all_of_them["fingerprints"]["calibration"]


def test_ablation_is_a_table(place):
    result = call("--ablate", *SETTINGS, **OPTIONS, workdir="work")
    assert result.exit_code == 0, result.output
    text = " ".join(result.output.split())
    for word in ("nearest", "as given", "no distance", "nor noise"):
        assert word in text
    assert (place / "q.safetensors").exists()
    folders = sorted(folder.name for folder in (place / "work").iterdir())
    assert folders == ["as-given", "no-distance", "nor-noise"] and (place / "work/nor-noise/losses.csv").exists()
    result = call("--ablate", *SETTINGS, **{**OPTIONS, "recipe": "qdrop"})
    assert result.exit_code == 2 and "recipe must learn weights to be ablated, with distance" in result.stderr


def test_what_is_learned_and_not_kept_is_told_before(place):
    kept = {name: value for name, value in OPTIONS.items() if name != "out"}
    with pytest.warns(UserWarning, match="out is not given, nor workdir: of the quantized model the table is all"):
        assert call(*SETTINGS, **kept).exit_code == 0
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "out is not given")
        assert call(*SETTINGS, **kept, workdir="work").exit_code == 0
        assert call(*SETTINGS, **{**kept, "recipe": "rtn", "iterations": "0"}).exit_code == 0
        assert call("--ablate", *SETTINGS, **kept).exit_code == 0


def test_the_share_that_is_held_out_is_the_share_that_is_asked_for(place):
    np.save(place / "x.npy", np.zeros((100, 3, 4, 4), np.float32))
    for share, held in ((0.4, 40), (0.1, 10), (0.29, 29), (1 / 3, 33), (0.0, 0)):
        *_, kept, out = job._prepare(job.Run("tinynet:tiny", "x.npy", held_out=share, recipe="rtn"))
        assert (len(kept), 0 if out is None else len(out)) == (100 - held, held)


def test_workdir_has_losses_and_resumes(place):
    options = {**OPTIONS, "workdir": "work"}
    assert call(*SETTINGS, **options).exit_code == 0
    assert {"losses.csv", "losses.png", "run.json", "block-000.safetensors"} <= {
        p.name for p in (place / "work").iterdir()
    }
    assert "workdir must hold no run" in call(*SETTINGS, **options).stderr
    before = tensors("q.safetensors")
    assert call("--resume", *SETTINGS, **options).exit_code == 0
    assert all(torch.equal(before[name], value) for name, value in tensors("q.safetensors").items())


@pytest.fixture
def full_disk(place, monkeypatch):
    """Nothing can be written below ``place / "full"``, which is known only once it is tried."""
    (place / "full").mkdir()
    opened = os.open

    def fails_there(path, *args, **options):
        if str(path).startswith(str(place / "full")):
            raise OSError(errno.ENOSPC, "No space left on device")
        return opened(path, *args, **options)

    monkeypatch.setattr(os, "open", fails_there)
    return {**OPTIONS, "out": "full/q.safetensors"}


def test_a_model_that_the_disk_has_no_room_for_is_kept_elsewhere(place, full_disk):
    assert call(*SETTINGS, **OPTIONS).exit_code == 0
    result = call(*SETTINGS, **full_disk)
    blocks, message = result.stderr.splitlines()[:-1], result.stderr.splitlines()[-1]
    assert result.exit_code == 2 and all(line.startswith("block ") for line in blocks)
    assert "full/q.safetensors must be written to a disk with room, got No space left on device" in message
    (kept,) = place.glob("q-*.safetensors")
    assert result.stderr.endswith(f"the quantized model is kept in {kept}\n")
    assert kept.read_bytes() == (place / "q.safetensors").read_bytes()


def test_a_model_is_kept_where_there_is_room_first(place, full_disk, monkeypatch):
    (place / "tmp").mkdir()
    monkeypatch.chdir(place / "full")
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(place / "tmp"))
    above = {name: f"../{OPTIONS[name]}" for name in ("weights", "source", "data")}
    result = call(*SETTINGS, **{**OPTIONS, **above})
    assert result.exit_code == 2 and f"is kept in {place / 'tmp' / 'q-'}" in result.stderr
    hdrq.load(*(place / "tmp").iterdir(), model())


def test_a_full_disk_is_refused_before_anything_is_learned(place, monkeypatch):
    least = (3 * 4 * 9 + 4 * 6 * 9 + 54 * 3) // 4 + 4 * (4 + 6 + 3)
    for free, status in ((least, 0), (least - 1, 2)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        result = call(*SETTINGS, **OPTIONS)
        assert result.exit_code == status, result.stderr
    message = (
        f"out must be on a disk with room for {least:,} bytes at least, got {least - 1:,} free for 'q.safetensors'"
    )
    assert message in result.stderr and "peak memory" not in result.stdout


def test_without_a_terminal_a_line_a_block(place):
    result = call(*SETTINGS, **OPTIONS)
    lines = [line for line in result.stderr.splitlines() if "loss" in line]
    assert [line.partition(":")[0] for line in lines] == ["block 1 of 3, 0", "block 2 of 3, 2", "block 3 of 3, 5"]
    flags = [part for name, value in OPTIONS.items() for part in (f"--{name}", value)]
    quiet = CliRunner().invoke(app, ["--quiet", "quantize", *SETTINGS, *flags])
    assert quiet.exit_code == 0 and "loss" not in quiet.stderr


def test_a_model_in_half_precision_gets_data_in_half_precision(place):
    options = {"model": "tinynet:half", "data": "images", "recipe": "rtn", "out": "q.safetensors"}
    result = call(*SETTINGS, **options)
    assert result.exit_code == 0, result.stderr
    result = CliRunner().invoke(
        app, ["evaluate", "--model", "tinynet:half", "q.safetensors", "--data", "images", "--resize=20", "--crop=16"]
    )
    assert result.exit_code == 0, result.stderr


def test_weights_may_stay_in_files(place):
    """The same file comes out, and none is left in the folder."""
    for out, more in (("usual", ()), ("offloaded", ("--offload-folder", "offload"))):
        result = call(*SETTINGS, *more, **{**OPTIONS, "out": f"{out}.safetensors"})
        assert result.exit_code == 0, result.output
    assert (place / "usual.safetensors").read_bytes() == (place / "offloaded.safetensors").read_bytes()
    assert (place / "offload").is_dir() and not list((place / "offload").iterdir())
