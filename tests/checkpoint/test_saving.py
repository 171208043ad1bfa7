"""Saving quantized models: integers and how they were made in the file, whole files or none."""

import copy
import io
import json
import os
import pickle
import zipfile

import pytest
import torch
from checkpoint.example import X, net, quantized
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import hdrq
from hdrq.checkpoint.format import Writer
from hdrq.quantizers.layers import quantized_layers
from hdrq.quantizers.modules import WeightQuantizer


def test_manifest_says_how_the_model_was_made(tmp_path):
    numpy = pytest.importorskip("numpy")
    hdrq.save(quantized(seed=1, candidates=numpy.int64(50)), tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        manifest = json.loads(file.metadata()["hdrq"])
    assert (
        (manifest["format"], manifest["contract"]) == (3, 2)
        and manifest["bits"] == "W4A4"
        and manifest["recipe"]["name"] == "rtn"
    )
    assert manifest["folded"] == {"2": "1"} and manifest["recipe"]["candidates"] == 50
    assert manifest["weights"] == {
        "1": {"range": [-128, 127], "axis": None, "shape": [5, 3, 3, 3]},
        "4": {"range": [-8, 7], "axis": None, "shape": [5, 5, 3, 3]},
        "6": {"range": [-128, 127], "axis": None, "shape": [4, 20]},
    }


def test_the_codes_of_one_layer_at_a_time_are_in_memory(tmp_path, monkeypatch):
    model, events = quantized(), []
    codes, write = WeightQuantizer.codes, Writer.write

    def noted_codes(self, x):
        events.append("made")
        return codes(self, x)

    def noted_write(self, name, value):
        events.extend(["written"] if name.endswith("codes") else [])
        return write(self, name, value)

    monkeypatch.setattr(WeightQuantizer, "codes", noted_codes)
    monkeypatch.setattr(Writer, "write", noted_write)
    hdrq.save(model, tmp_path / "model")
    assert events == ["made", "written"] * 3


def test_what_a_file_cannot_hold_is_said_before_anything_is_written(tmp_path):
    model = quantized()
    model.register_buffer("phase", torch.zeros(2, dtype=torch.complex128))
    with pytest.raises(ValueError, match=r"model must have dense tensors of float64, .*, got phase \(complex128\)"):
        hdrq.save(model, tmp_path / "model")
    model.phase = torch.eye(3).to_sparse()
    with pytest.raises(ValueError, match=r"got phase \(torch.sparse_coo\)"):
        hdrq.save(model, tmp_path / "model")
    other = quantized()
    other.hdrq_origin = {**other.hdrq_origin, "day": object()}
    with pytest.raises(ValueError, match="manifest must be of what JSON has, got object"):
        hdrq.save(other, tmp_path / "model")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("value", [torch.zeros(2, dtype=torch.complex128), torch.eye(3).to_sparse()])
def test_what_a_file_cannot_hold_is_said_before_a_run_with_checkpoints(tmp_path, value):
    model, steps = net(), []
    model.register_buffer("phase", value)
    options = {"recipe": "qdrop", "iterations": 2, "progress": steps.append}
    with pytest.raises(ValueError, match=r"model must have dense tensors of .*, got phase"):
        hdrq.quantize(model, X, workdir=tmp_path, **options)
    assert not steps and not any(tmp_path.iterdir())
    hdrq.quantize(model, X, **options)  # nothing says that this one is to be saved
    assert steps


def test_file_holds_integers_and_no_pickle(path):
    tensors, data = load_file(path), path.read_bytes()
    assert [tensors[f"{n}.weight.codes"].dtype for n in (1, 4, 6)] == [torch.int8, torch.uint8, torch.int8]
    assert not any("parametrizations" in name for name in tensors)  # no float copy of a weight
    assert b"pickle" not in data and not zipfile.is_zipfile(path)
    with pytest.raises((pickle.UnpicklingError, ValueError)):
        pickle.loads(data)
    layer = quantized_layers(quantized())["4"]
    codes = layer.weight_quantizer.codes(layer.latent)
    assert torch.equal(hdrq.ops.unpack(tensors["4.weight.codes"], codes.shape), codes)


def test_failed_save_leaves_the_old_file_and_nothing_else(path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    before = path.read_bytes()
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        hdrq.save(quantized(seed=1), path)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_save_replaces_a_file_and_needs_a_folder(path):
    hdrq.save(quantized(seed=1), str(path))
    assert torch.equal(hdrq.load(str(path), net())(X), quantized(seed=1)(X)) and list(path.parent.iterdir()) == [path]
    with pytest.raises(FileNotFoundError):
        hdrq.save(quantized(), path.parent / "missing" / "model.safetensors")


@pytest.mark.parametrize("make", [net, lambda: nn.Sequential(quantized()), lambda: "model"])
def test_other_models_are_not_saved(tmp_path, make):
    with pytest.raises(ValueError, match=r"model must be quantized, by hdrq\.quantize or hdrq\.merge, got a plain"):
        hdrq.save(make(), tmp_path / "model.safetensors")
    assert not any(tmp_path.iterdir())


def test_a_model_is_not_pickled_but_its_state_is():
    """What torch refuses, it refuses by a name that works: the state gives another model its numbers and ranges."""
    model, other = quantized(seed=1), quantized(seed=2)
    with pytest.raises(RuntimeError, match=r"state_dict\(\)"):
        torch.save(model, io.BytesIO())
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    assert not torch.equal(other(X), model(X))
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(X), model(X))
    assert torch.equal(copy.deepcopy(model)(X), model(X))
