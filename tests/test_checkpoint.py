"""Quantized models on disk: the same bits back, integers in the file, whole files or none, and damage refused."""

import json
import os

import pytest
import torch
from torch import nn

import hdrq
from hdrq.model import quantized_layers

pytest.importorskip("safetensors")

from safetensors import safe_open
from safetensors.torch import load_file, save_file

torch.set_num_threads(1)

X = torch.randn((32, 3, 6, 6), generator=torch.Generator().manual_seed(0))


def net(seed=0, width=5):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.BatchNorm2d(3),
            nn.Conv2d(3, width, 3, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3),
            nn.Flatten(),
            nn.Linear(4 * width, 4),
        )
        model(X)
    return model.eval()


def quantized(seed=0, **options):
    return hdrq.quantize(net(seed), X, "rtn", **options)


@pytest.fixture
def path(tmp_path):
    """A checkpoint."""
    hdrq.save(quantized(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def rewrite(path, tensors=None, **manifest):
    """Change tensors and entries of the manifest of a checkpoint."""
    with safe_open(path, framework="pt") as file:
        old = json.loads(file.metadata()["hdrq"])
    new = {key: value for key, value in {**old, **manifest}.items() if value is not None}
    kept = {n: t for n, t in {**load_file(path), **(tensors or {})}.items() if t is not None}
    save_file(kept, path, {"hdrq": json.dumps(new)})


# --- round trip


@pytest.mark.parametrize(
    "options, dtype",
    [
        ({"bits": "W4A4"}, torch.int8),
        ({"bits": "W3A3", "per_channel": True}, torch.int8),
        ({"bits": {"*": "W12A16"}}, torch.int16),
    ],
)
def test_round_trip_keeps_every_bit(tmp_path, options, dtype):
    model, path = quantized(**options), tmp_path / "model.safetensors"
    hdrq.save(model, path)
    architecture = net(seed=9)
    before = {name: value.clone() for name, value in architecture.state_dict().items()}
    loaded = hdrq.load(path, architecture)
    assert torch.equal(loaded(X), model(X)) and not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert all(torch.equal(value, before[name]) for name, value in architecture.state_dict().items())
    assert load_file(path)["4.weight.codes"].dtype == dtype


def test_loaded_model_is_as_good_as_the_saved_one(tmp_path):
    models = [quantized(seed) for seed in range(2)]
    for k, model in enumerate(models):
        hdrq.save(model, tmp_path / f"{k}.safetensors")
    loaded = [hdrq.load(tmp_path / f"{k}.safetensors", net()) for k in range(2)]
    assert loaded[1].hdrq_origin == models[1].hdrq_origin
    merged, again = hdrq.merge(models, seed=3), hdrq.merge(loaded, seed=3)
    assert torch.equal(merged(X), again(X))
    hdrq.save(again, tmp_path / "merged.safetensors")
    restored = hdrq.load(tmp_path / "merged.safetensors", net())
    assert torch.equal(restored(X), merged(X)) and len(restored.hdrq_origin["models"]) == 2


def test_saving_what_was_loaded_gives_the_same_file(path, tmp_path):
    hdrq.save(hdrq.load(path, net()), tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_model_that_is_one_layer(tmp_path):
    layer, x = nn.Linear(6, 3).eval(), X.flatten(0, 2)
    model = hdrq.quantize(layer, x, "rtn", bits={"*": "W4A4"})
    hdrq.save(model, tmp_path / "layer.safetensors")
    assert torch.equal(hdrq.load(tmp_path / "layer.safetensors", nn.Linear(6, 3))(x), model(x))


def test_tied_parameters_and_other_parametrizations_are_kept(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 6)
            self.up = nn.utils.parametrizations.weight_norm(nn.Bilinear(6, 6, 6))
            self.gain = nn.Parameter(torch.rand(6))
            self.same_gain = self.gain

        def forward(self, x):
            return self.up(x, self.layer(x) * self.gain + self.same_gain)

    def tied(seed):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return Tied().eval()

    x = X.flatten(0, 2)
    model = hdrq.quantize(tied(0), x, "rtn")
    hdrq.save(model, tmp_path / "tied.safetensors")
    assert torch.equal(hdrq.load(tmp_path / "tied.safetensors", tied(1))(x), model(x))


def test_manifest_says_how_the_model_was_made(tmp_path):
    numpy = pytest.importorskip("numpy")
    hdrq.save(quantized(seed=1, candidates=numpy.int64(50)), tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        manifest = json.loads(file.metadata()["hdrq"])
    assert manifest["format"] == 1 and manifest["bits"] == "W4A4" and manifest["recipe"]["name"] == "rtn"
    assert manifest["folded"] == {"2": "1"} and manifest["recipe"]["candidates"] == 50
    assert manifest["weights"] == {"1": [-128, 127, None], "4": [-8, 7, None], "6": [-128, 127, None]}


# --- what is in the file


def test_file_holds_integers_and_no_pickle(path):
    tensors, data = load_file(path), path.read_bytes()
    assert {t.dtype for n, t in tensors.items() if n.endswith("codes")} == {torch.int8}
    assert not any("parametrizations" in name for name in tensors)  # no float copy of a weight
    assert b"pickle" not in data and not data.startswith((b"\x80", b"PK"))
    layer = quantized_layers(quantized())["4"]
    assert torch.equal(tensors["4.weight.codes"], layer.weight_quantizer.codes(layer.latent))


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


# --- refusals


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        hdrq.load(tmp_path / "none.safetensors", net())


@pytest.mark.parametrize(
    "content", [b"", b"not safetensors", b"\x80\x04.", b"\xff" * 64], ids=["empty", "text", "pickle", "noise"]
)
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=r"path must be a file that hdrq\.save wrote, got '.*file'"):
        hdrq.load(tmp_path / "file", net())


@pytest.mark.parametrize("share", [0.05, 0.5, 0.99])
def test_truncated_file_is_refused(path, share):
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ValueError, match=r"path must be a file that hdrq\.save wrote"):
        hdrq.load(path, net())


def test_file_without_a_manifest_is_refused(tmp_path):
    for metadata in (None, {"format": "pt"}):
        save_file({"1.weight": torch.zeros(3)}, tmp_path / "other", metadata)
        with pytest.raises(ValueError, match="path must be a checkpoint of hdrq, format 1, got no manifest"):
            hdrq.load(tmp_path / "other", net())
    save_file({"1.weight": torch.zeros(3)}, tmp_path / "other", {"hdrq": "{"})
    with pytest.raises(ValueError, match=r"manifest must be JSON, got '\{'"):
        hdrq.load(tmp_path / "other", net())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"format": 2}, "path must be a checkpoint of hdrq, format 1, got 2"),
        ({"folded": None}, "manifest must have a table of folded, got None"),
        ({"weights": [1, 2]}, r"manifest must have a table of weights, got \[1, 2\]"),
        ({"inputs": {"1": [0, "15"]}}, "qmax must be an int, got str"),
        ({"inputs": {"1": 7}}, "path must be a file that hdrq.save wrote"),
        ({"inputs": {"1": [15, 0]}}, "qmin must be less than qmax"),
        ({"folded": {"3": "1"}}, "got modules that it does not have: 3"),
        ({"weights": {"9": [-8, 7, None]}}, "got modules that it does not have: 9"),
        ({"weights": {"4": [-8, 7, 5]}}, r"axis must be in \[-4, 3\]"),
    ],
)
def test_damaged_manifest_is_refused(path, changes, message):
    rewrite(path, **changes)
    with pytest.raises(ValueError, match=message):
        hdrq.load(path, net())


@pytest.mark.parametrize(
    "name, tensor, message",
    [
        ("4.weight.scale", torch.tensor([torch.nan]), "4.weight.scale must be positive and finite, got nan"),
        ("4.weight.scale", torch.tensor([-0.1]), "4.weight.scale must be positive and finite, got -0.1"),
        ("4.input.scale", torch.tensor([torch.nan]), "4.input.scale must be positive and finite, got nan"),
        ("4.input.scale", torch.tensor([0.0]), "4.input.scale must be positive and finite, got 0"),
        ("4.input.scale", torch.ones(2), "4.input.scale must have 1 element, got 2"),
        ("4.weight.scale", torch.ones(5), "4.weight.scale must have 1 element, got 5"),
        ("4.weight.scale", torch.ones(1).double(), "4.weight.scale must be a tensor of float32, got float64"),
        ("4.weight.scale", None, "checkpoint must hold '4.weight.scale', got none"),
        (
            "4.weight.codes",
            torch.full((5, 5, 3, 3), 8, dtype=torch.int8),
            r"codes of 4 must be in \[-8, 7\], got \[8, 8\]",
        ),
        ("4.weight.codes", torch.zeros(5, 5, 3, 3), "codes of 4 must be a tensor of int8 or int16, got float32"),
        (
            "4.weight.codes",
            torch.zeros(5, 5, 3, dtype=torch.int8),
            "codes of 4 must have the shape of the layer's weight",
        ),
        ("4.bias", torch.zeros(6), r"checkpoint must fit the model, got 4.bias \(\(6,\)"),
        ("4.bias", torch.zeros(5).half(), "checkpoint must fit the model, got 4.bias"),
        ("4.bias", None, "checkpoint must fit the model, got 4.bias missing"),
        ("8.bias", torch.zeros(5), "checkpoint must fit the model, got 8.bias unexpected"),
    ],
)
def test_damaged_tensors_are_refused(path, name, tensor, message):
    rewrite(path, {name: tensor})
    with pytest.raises(ValueError, match=message):
        hdrq.load(path, net())


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: None, ValueError, "model must be the architecture that the checkpoint was made from, got None"),
        (lambda: "net", TypeError, "model must be a torch.nn.Module, got str"),
        (quantized, ValueError, "model must have plain weights, got a parametrized one"),
        (lambda: net(width=6), ValueError, "codes of 1 must have the shape of the layer's weight"),
        (lambda: net()[:5], ValueError, "checkpoint must fit the model, got modules that it does not have: 6"),
        (lambda: nn.Linear(2, 2), ValueError, "checkpoint must fit the model, got modules that it does not have"),
        (
            lambda: nn.Sequential(*net(), nn.Linear(4, 4)),
            ValueError,
            "checkpoint must fit the model, got 7.bias missing; 7.weight missing",
        ),
    ],
)
def test_other_architectures_are_refused(path, make, error, message):
    with pytest.raises(error, match=message):
        hdrq.load(path, make())
