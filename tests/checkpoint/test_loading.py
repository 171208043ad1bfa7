"""Loading quantized models: the same bits back; damaged files and other architectures are refused."""

import json

import pytest
import torch
from checkpoint.example import X, net, quantized
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import hdrq
from hdrq.checkpoint.float_states import load_float
from hdrq.checkpoint.format import Reader, _hash, _text_hash
from hdrq.merging.files import merge_files
from hdrq.quantizers.layers import input_readers, quantized_layers


def rewrite(path, tensors=None, **manifest):
    """Change tensors and entries of the manifest of a checkpoint, and its hashes with them, as a hostile writer can."""
    with safe_open(path, framework="pt") as file:
        old = json.loads(file.metadata()["hdrq"])
    kept = {n: t for n, t in {**load_file(path), **(tensors or {})}.items() if t is not None}
    hashes = {"sha256": {name: _hash(value) for name, value in kept.items()}}
    new = {key: value for key, value in {**old, **hashes, **manifest}.items() if value is not None}
    text = json.dumps(new)
    save_file(kept, path, {"hdrq": text, "sha256": _text_hash(text)})


# --- round trip


def test_a_file_of_the_first_contract_loads_merges_and_is_told_apart(tmp_path):
    """Its codes are only integers: which random stream led to them changes nothing in what they mean."""
    model, old, new, merged = quantized(), tmp_path / "old", tmp_path / "new", tmp_path / "merged"
    for path in (old, new):
        hdrq.save(model, path)
    rewrite(old, format=2, contract=None)
    assert torch.equal(hdrq.load(old, net())(X), model(X))
    merge_files([old, new], merged)
    with Reader(merged) as file:
        assert [facts["contract"] for facts in (*file.manifest["models"], file.manifest)] == [1, 2, 2]
        assert file.manifest["format"] == 3
    hdrq.save(hdrq.load(old, net()), new)
    with Reader(new) as file:
        assert file.manifest["contract"] == 1


@pytest.mark.parametrize(
    "options, dtype",
    [
        ({"bits": "W4A4"}, torch.uint8),  # two to a byte
        ({"bits": "W3A3", "per_channel": True}, torch.uint8),
        ({"bits": {"*": "W5A8"}}, torch.int8),
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


def test_a_folded_transposed_convolution_without_bias(tmp_path):
    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.ConvTranspose2d(6, 3, 2, bias=False), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1)).eval()

    x = torch.randn(8, 6, 4, 4)
    model = hdrq.quantize(build(), x, "rtn")
    hdrq.save(model, tmp_path / "model")
    assert torch.equal(hdrq.load(tmp_path / "model", build())(x), model(x))


def test_a_quantizer_goes_where_its_module_goes(path):
    """A random state that is not drawn from may lie elsewhere (meta stands for a GPU here)."""
    loaded = hdrq.load(path, net()).to("meta")
    assert loaded(X.to("meta")).shape == (32, 4)


def test_architecture_by_name(path, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "somewhere.py").write_text("from checkpoint import example\n\ndef build():\n    return example.net()\n")
    model = quantized()
    assert torch.equal(hdrq.load(path, "somewhere:build")(X), model(X))
    with pytest.raises(ValueError, match=r"the checkpoint was made from, got None$"):
        hdrq.load(path, trust_architecture=True)  # the file names none
    hdrq.save(model, path, architecture="somewhere:build")
    with pytest.raises(ValueError, match="got None; the file names somewhere:build: model= it, or trust_architecture"):
        hdrq.load(path)
    loaded = hdrq.load(path, trust_architecture=True)
    assert torch.equal(loaded(X), model(X))
    hdrq.save(loaded, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == path.read_bytes()  # it is remembered
    rewrite(path, architecture={"factory": "somewhere:build", "arguments": {"width": 3}})
    with pytest.raises(ValueError, match=r"model must be made by somewhere:build of {'width': 3}, got TypeError"):
        hdrq.load(path, "somewhere:build")  # the file's arguments are the factory's
    rewrite(path, architecture={"factory": "somewhere:build", "arguments": {"width": 3, "checkpoint": "/evil"}})
    with pytest.raises(ValueError, match=r"must be numbers to be taken from a file, got others for checkpoint; give"):
        hdrq.load(path, "somewhere:build")
    with pytest.raises(ValueError, match=r"got TypeError: build\(\) got an unexpected keyword"):
        hdrq.load(path, "somewhere:build", trust_architecture=True)
    hdrq.save(model, path, architecture="somewhere:nothing")
    with pytest.raises(ValueError, match="model must name a function of somewhere, got 'nothing'"):
        hdrq.load(path, trust_architecture=True)


# --- refusals


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"path must be a file that hdrq\.save wrote, got '.*none.safetensors'"):
        hdrq.load(tmp_path / "none.safetensors", net())


def test_a_name_that_comes_twice_in_a_manifest_is_refused(path):
    """Of two values readers would take one or the other."""
    with safe_open(path, framework="pt") as file:
        text = file.metadata()["hdrq"]
    text = f'{{"seed": 5, {text[1:]}'
    assert text.count('"seed": ') == 2
    save_file(load_file(path), path, {"hdrq": text, "sha256": _text_hash(text)})
    with pytest.raises(ValueError, match="manifest must have each name once, got 'seed' more often"):
        hdrq.load(path, net())


def test_an_input_is_shared_with_any_module_of_the_manifest(path):
    """Whichever of them comes first in the model."""
    rewrite(path, shared={"0": "1"})
    hdrq.load(path, net())


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
        with pytest.raises(ValueError, match="it has no manifest"):
            hdrq.load(tmp_path / "other", net())
    save_file({"1.weight": torch.zeros(3)}, tmp_path / "other", {"hdrq": "{"})
    with pytest.raises(ValueError, match=r"manifest must be JSON, got '\{'"):
        hdrq.load(tmp_path / "other", net())


FACTS = {"range": [-8, 7], "axis": None, "shape": [5, 5, 3, 3]}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"format": 1}, "manifest must be of format 2 or 3, got 1"),
        ({"folded": None}, "manifest must have a table of folded, got None"),
        ({"weights": [1, 2]}, r"manifest must have a table of weights, got \[1, 2\]"),
        ({"inputs": {"1": [0, "15"]}}, "qmax must be an int, got str"),
        ({"inputs": {"1": 7}}, "range of 1 must be two integers, got 7"),
        ({"sha256": {}}, "manifest must hash all tensors, got others"),
        ({"attention": ["4"]}, r"manifest must have lists of operands for attention, got \['4'\]"),
        ({"attention": {"4": "q"}}, "manifest must have lists of operands for attention, got {'4': 'q'}"),
        ({"attention": {"4": ["q", "w"]}}, "manifest must have lists of operands for attention, got"),
        ({"attention": {"9": ["q"]}}, "got modules that it does not have: 9"),
        ({"shared": {"1": "5"}}, r"input quantizer for every module that shares one, got \['1'\]"),
        ({"models": 5}, "manifest must have a list for models, got 5"),
        ({"run": [1]}, r"manifest must have a dict for run, got \[1\]"),
        ({"origin": "awq"}, "manifest must have a dict for origin, got 'awq'"),
        ({"architecture": "net"}, "manifest must have factory and arguments of the architecture, got 'net'"),
        ({"inputs": {"1": [15, 0]}}, "qmin must be less than qmax"),
        ({"folded": {"3": "1"}}, "got modules that it does not have: 3"),
        ({"weights": {"9": FACTS}}, "checkpoint must hold '9.weight.codes', got none"),
        ({"weights": {"4": FACTS | {"axis": 5}}}, r"axis of 4 must be in \[-4, 3\], got 5"),
        ({"weights": {"4": FACTS | {"axis": 0}}}, r"4.weight.scale must be torch.float32 of shape \(5,\)"),
        ({"weights": {"4": FACTS | {"shape": [5, 5, 9]}}}, "codes of 4 must have the shape of the layer's weight"),
        ({"weights": {"4": FACTS | {"shape": [2**50]}}}, "shape of 4 must be in"),
        ({"weights": {"4": FACTS | {"range": [-9, 7]}}}, "4.weight.codes must be torch.int8 of shape"),
        ({"weights": {"4": [-8, 7, None]}}, "manifest must have range, axis and shape of weight '4'"),
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
        ("4.input.scale", torch.ones(2), r"4.input.scale must be torch.float32 of shape \(1,\), got"),
        ("4.weight.scale", torch.ones(5), r"4.weight.scale must be torch.float32 of shape \(1,\), got"),
        ("4.weight.scale", torch.ones(1).double(), "4.weight.scale must be torch.float32 .* got torch.float64"),
        ("4.weight.scale", None, "checkpoint must hold '4.weight.scale', got none"),
        ("1.weight.codes", torch.full((5, 3, 3, 3), 128).short(), "1.weight.codes must be torch.int8 of shape"),
        ("4.weight.codes", torch.zeros(5, 5, 3, 3), "4.weight.codes must be torch.uint8 of shape"),
        ("4.weight.codes", torch.zeros(112).byte(), r"4.weight.codes must be torch.uint8 of shape \(113,\), got"),
        ("4.bias", torch.zeros(6), r"checkpoint must fit the model, got 4.bias \(\(6,\)"),
        ("4.bias", torch.zeros(5).half(), "checkpoint must fit the model, got 4.bias"),
        ("4.bias", None, "checkpoint must fit the model, got 4.bias missing"),
        ("8.bias", torch.zeros(5), "checkpoint must fit the model, got 8.bias unexpected"),
    ],
)
def test_damaged_tensors_are_refused(path, name, tensor, message):
    rewrite(path, {name: tensor})
    with pytest.raises(ValueError, match=message) as raised:
        hdrq.load(path, net())
    assert str(path) in str(raised.value)


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: None, ValueError, "model must be the architecture that the checkpoint was made from, got None"),
        (lambda: "net", ValueError, 'model must be written like "module:factory", got .net.'),
        (lambda: 3, TypeError, "model must be a torch.nn.Module, got int"),
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


# --- full precision


def test_a_state_in_full_precision_must_have_the_tensors_of_the_architecture(tmp_path):
    file = str(tmp_path / "state")
    save_file(net(seed=1).state_dict(), file)
    assert torch.equal(load_float("checkpoint.example:net", file)(X), net(seed=1)(X))
    wrong = f"{file} must have the tensors of checkpoint.example:net, got "
    with pytest.raises(
        ValueError, match=r"4.bias \(5,\), not \(6,\); 4.weight \(5, 5, 3, 3\), not \(6, 6, 3, 3\)"
    ) as refusal:
        load_float("checkpoint.example:net", file, {"width": 6})
    assert str(refusal.value).startswith(wrong)
    halves = {name: value.half() for name, value in net(seed=1).state_dict().items() if name != "6.bias"}
    save_file({**halves, "7.bias": torch.zeros(2)}, file)  # dtypes may differ, names may not
    with pytest.raises(ValueError) as refusal:
        load_float("checkpoint.example:net", file)
    assert str(refusal.value) == wrong + "6.bias missing; 7.bias unexpected"


def test_a_wrapper_that_passes_on_what_is_asked_of_it_is_no_layer(tmp_path):
    """peft's modules_to_save and compilers' modules give their inner module's attributes as theirs."""

    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(self._modules["inner"], name)

        def forward(self, x):
            return self.inner(x)

    model, x = nn.Sequential(Wrapper(nn.Linear(4, 4)), nn.Linear(4, 2)).eval(), torch.randn(8, 4)
    made = hdrq.quantize(model, x, "rtn")
    assert list(quantized_layers(made)) == list(input_readers(made)) == ["0.inner", "1"]
    hdrq.save(made, tmp_path / "q.safetensors")
    assert torch.equal(hdrq.load(tmp_path / "q.safetensors", model)(x), made(x))
