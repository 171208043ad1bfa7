"""Settings of ``hdrq quantize``: as they are written, saved, and refused with a word why."""

import os

import numpy as np
import pytest
import torch
from cli.quantizing import OPTIONS, SETTINGS, call, model, tensors
from safetensors.torch import save_file

from hdrq.methods.job import Run, parse_setting, read_settings
from hdrq.methods.read_yaml import parse_yaml, yaml_of


def test_settings_are_numbers_where_they_look_like_it(place):
    assert [parse_setting(t) for t in ("a=1e-3", "b=4", "c=uniform", "d=true", "e=")] == [
        *(("a", 1e-3), ("b", 4), ("c", "uniform"), ("d", True), ("e", None))
    ]
    (place / "list.yaml").write_text("- 1")
    (place / "no.yaml").write_text("a: [")
    (place / "deep.yaml").write_text("a: " + "[" * 100_000)
    (place / "twice.yaml").write_text("bits: W4A4\nknobs: {}\nbits: W8A8")
    (place / "inside.yaml").write_text("knobs: {a: 1, b: 2, a: 3}")
    for name, message in (
        ("list.yaml", "must be a mapping of settings, got list"),
        ("twice.yaml", "config must be YAML, got twice.yaml: it must have each name once, got 'bits' more often"),
        ("inside.yaml", "it must have each name once, got 'a' more often"),
        ("no.yaml", "config must be YAML"),
        ("deep.yaml", "config must be YAML, got deep.yaml: it must have at most 20 levels, got more"),
    ):
        with pytest.raises(ValueError, match=message):
            read_settings(name)


def test_numbers_are_those_of_yaml_and_powers_of_ten_without_a_point(place):
    (place / "n.yaml").write_text('a: 1e-3\nb: 2.5e4\nc: "1e-3"\nd: -3E+2\ne: e5\nf: [1e1]\ng: 0x1e3')
    found = dict(a=1e-3, b=2.5e4, c="1e-3", d=-300.0, e="e5", f=[10.0], g=0x1E3)
    assert read_settings("n.yaml") == found == parse_yaml(yaml_of(found))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight-lr": 1, "weight_lr": 2}, "settings must give each name once, got more of weight_lr"),
        ({"warmup": 0.1, "knobs": {"warmup": 0.2}}, "settings and knobs must give each name once, got more of warmup"),
    ],
)
def test_a_setting_has_one_value(settings, message):
    with pytest.raises(ValueError, match=message):
        Run.of({"model": "a:b", "data": "c", **settings})


def test_a_path_is_bytes_of_utf_8_in_every_locale(monkeypatch):
    """In the locale C file names are ASCII, in which other bytes are surrogates."""
    monkeypatch.setattr("os.fsdecode", lambda raw: raw.decode("ascii", "surrogateescape"))
    run = Run.of({"model": "a:b", "data": "d", "out": "ü"})
    assert run.out is not None and run.out.encode("ascii", "surrogateescape") == "ü".encode()
    assert Run.of({"model": "a:b", "data": "d", "out": run.out}).out == run.out


def test_settings_are_saved_for_another_run(place):
    wanted = {**OPTIONS, "save-config": "all.yaml"}
    saved = call(*SETTINGS, "--set", "beta_start=19", **wanted)
    assert saved.exit_code == 0 and not (place / "q.safetensors").exists(), saved.output
    settings = read_settings(place / "all.yaml")
    assert (settings["resize"], settings["beta_start"], settings["weight_lr"]) == (20, 19.0, 0.05)
    assert call("all.yaml").exit_code == 0
    (place / "q.safetensors").rename(place / "first.safetensors")
    assert call(*SETTINGS, "--set", "beta_start=19", **OPTIONS).exit_code == 0
    one, two = tensors("first.safetensors"), tensors("q.safetensors")
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    wrong = call("--set", "beta_start=0", **wanted)
    assert wrong.exit_code == 2 and "beta_start must be finite and in" in wrong.stderr


@pytest.mark.parametrize(
    "options, message",
    [
        ({"model": None}, "model must be given, got none"),
        ({"data": None}, "data must be given, got none"),
        ({"model": "tinynet"}, "model must be written like \"module:factory\", got 'tinynet'"),
        ({"model": "nowhere:tiny"}, "model must be in a module that can be imported, got 'nowhere:tiny'"),
        ({"model": "tinynet:big"}, "model must name a function of tinynet, got 'big'"),
        ({"model": "tinynet:number"}, "model must be a factory of a torch.nn.Module, got one of int"),
        ({"data": "nowhere"}, "data must be a folder or a file, got nowhere"),
        ({"weights": "tinynet.py"}, "weights must be a safetensors file, a state dict or an index, got tinynet.py"),
        (
            {"weights": "other.safetensors"},
            "other.safetensors must have the tensors of tinynet:tiny, got 0.bias (5,), not (4,); 0.weight",
        ),
        ({"source": None}, "source must be the model before its adaptation"),
        ({"bits": "W1A4"}, "weight bits must be in [2, 16], got 1"),
        ({"recipe": "best"}, "recipe must be one of"),
        ({"out": "nowhere/q.safetensors"}, "out must be in a folder that exists, got 'nowhere/q.safetensors'"),
        ({"set": "tale=0.2"}, "setting must be one of"),
        ({"set": "tail"}, "set must be name=value, got 'tail'"),
        (
            {"model": "tinynet:missing"},
            "model must be made by tinynet:missing of {}, got ModuleNotFoundError: No module",
        ),
        ({"model": "tinynet:strict"}, "got AssertionError: twelve or more"),
        ({"model": "brokennet:tiny"}, "imported, got 'brokennet:tiny': SyntaxError: invalid syntax"),
        ({"model": "leavingnet:tiny"}, "imported, got 'leavingnet:tiny': SystemExit: 3"),
        ({"set": "model_args=5"}, "model_args must be a mapping from names, got 5"),
        ({"set": "model_args={depth: 3}"}, "got TypeError: tiny() got an unexpected keyword argument 'depth'"),
        ({"set": "mean=5"}, "mean and std must be 3 numbers each, std positive, got 5 and"),
        ({"set": "mean=[a, 1, 1]"}, "mean and std must be 3 numbers each, std positive, got ['a', 1, 1] and"),
        ({"set": "std=[.nan, 1, 1]"}, "mean and std must be 3 numbers each, std positive"),
        ({"set": "out=5", "out": None}, "out must be a string, got int"),
        ({"set": "seed=1", "seed": 2}, "seed must be left out where --set gives it, got 2"),
        ({"set": "resume=maybe"}, "resume must be true or false, got 'maybe'"),
        ({"set": "samples=0"}, "samples must be in [1, "),
        ({"set": "cache=moon", "recipe": "rtn", "iterations": None}, "cache must be one of 'auto', "),
        ({"set": "mean=5", "data": "wide.npy"}, "mean and std must be 3 numbers each, std positive, got 5 and"),
        ({"source": "none", "recipe": "rtn", "iterations": None}, "source must be a state that exists, got 'none'"),
        ({"device": "meta"}, "device must be one that holds values, got 'meta'"),
        ({"weights": "q4.safetensors"}, "must have the tensors of tinynet:tiny, got codes: that model is quantized"),
        (
            {"data": "wide.npy"},
            "model must run on calibration, got RuntimeError from model((18, 16, 16, 3) float32): G",
        ),
        ({"weights": "code.pth"}, "got code.pth: it is damaged, or holds more than tensors, which is not read because"),
        ({"weights": "short.pth"}, "weights must be a safetensors file, a state dict or an index, got short.pth"),
        ({"workdir": "w.safetensors"}, "workdir must be a folder, or a new one in a folder, got 'w.safetensors'"),
        ({"data": "pipe"}, "data must be a folder or a file, got pipe, a device, a pipe or a socket"),
        ({"data": "text.npy"}, "data must be an array, got text.npy, which cannot be read"),
        ({"weights": "nested.pth"}, "got nested.pth: it must be a state dict of tensors, and holds epoch, model"),
        ({"set": "held_out=0.9"}, "held_out must be finite and in [0, 0.5], got 0.9"),
    ],
)
def test_bad_input_is_refused(place, options, message):
    save_file(model(width=5).state_dict(), place / "other.safetensors")
    (place / "brokennet.py").write_text("def tiny(:")
    (place / "leavingnet.py").write_text("raise SystemExit(3)")
    np.save(place / "wide.npy", np.zeros((20, 16, 16, 3), np.float32))
    torch.save(Code(), place / "code.pth")
    (place / "short.pth").write_bytes(b"tiny")
    np.save(place / "text.npy", np.array(["text"]))
    os.mkfifo(place / "pipe")
    save_file({"0.weight.codes": torch.zeros(1)}, place / "q4.safetensors")
    torch.save({"epoch": 3, "model": model().state_dict()}, place / "nested.pth")
    result = call(*SETTINGS, **{name: value for name, value in {**OPTIONS, **options}.items() if value is not None})
    assert result.exit_code == 2 and message in result.stderr and result.stderr.count("\n") == 1
    assert not (place / "q.safetensors").exists() and not (place / "ran").exists()


class Code:
    """A pickle that writes a file when it is read."""

    def __reduce__(self):
        return open, ("ran", "w")
