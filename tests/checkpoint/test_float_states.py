"""Models in full precision that are made without memory for their parameters, which stay in the files of the state."""

import json
import sys
import threading

import pytest
import torch
from checkpoint.example import X
from checkpoint.example import net as run_while_made
from helpers import files_that_hold, same, state
from safetensors.torch import save_file
from torch import nn

import hdrq
from hdrq.prepare import offload


def net(seed=0):
    torch.manual_seed(seed)
    layers = nn.BatchNorm2d(3), nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 5, 3)
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(20, 4)).eval()
    model[2].running_mean.uniform_()
    return model


class Tied(nn.Module):
    """A weight that two layers share, and buffers: one in the state, one that the constructor makes."""

    def __init__(self, width=4):
        super().__init__()
        self.inner, self.outer = nn.Linear(width, width), nn.Linear(width, width)
        self.outer.weight = self.inner.weight
        self.register_buffer("shift", torch.zeros(width))
        self.register_buffer("positions", torch.arange(width) + 1.0, persistent=False)

    def forward(self, x):
        return self.outer(self.inner(x) * self.positions) + self.shift


class Derived(nn.Module):
    """A tensor computed of a parameter while the model is made."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("doubled", self.weight.detach() * 2, persistent=False)


class Listed(nn.Module):
    """A parameter that the module keeps in a list too."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.kept = [self.weight]


@pytest.fixture(autouse=True)
def every_tensor_counts(monkeypatch):
    monkeypatch.setattr(offload, "SMALLEST", 1)


@pytest.mark.parametrize("kind", ["safetensors", "pth", "shards"])
def test_a_model_in_files_computes_what_one_in_memory_does(tmp_path, kind):
    given, path = net(seed=1).state_dict(), tmp_path / f"state.{kind}"
    if kind == "safetensors":
        save_file(given, path)
    elif kind == "pth":
        torch.save(given, path)
    else:
        path.mkdir()
        names = {name: f"{k % 2}.safetensors" for k, name in enumerate(given)}
        for file in set(names.values()):
            save_file({name: given[name] for name in given if names[name] == file}, path / file)
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    usual, found = net, hdrq.load_float(net, path, offload_folder=tmp_path / "offload")
    assert same(state(found), given) and not found.training
    assert torch.equal(found(X), hdrq.load_float("checkpoint.example:net", path)(X))
    assert {name: p.requires_grad for name, p in found.named_parameters()} == {
        name: p.requires_grad for name, p in usual().named_parameters()
    }
    if sys.platform == "linux":
        assert all(path.startswith(str(tmp_path / "state")) for path in files_that_hold(found).values())
    with torch.no_grad():
        found[1].weight.fill_(7)  # memory of its own, as the system copies pages that are written to
    assert same(state(hdrq.load_float(net, path)), given)


def test_a_file_that_cannot_be_mapped_is_refused_with_the_way_out(tmp_path):
    torch.save(net(seed=1).state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(
        ValueError, match=r"got .*old\.pth: it has torch's format of before 1\.6, .*or leave offload_fol"
    ):
        hdrq.load_float(net, tmp_path / "old.pth", offload_folder=tmp_path / "offload")
    assert same(state(hdrq.load_float(net, tmp_path / "old.pth")), net(seed=1).state_dict())


def test_no_parameter_has_memory_while_the_model_is_made(tmp_path):
    save_file(Tied(width=6).state_dict() | {"outer.weight": torch.ones(6, 6)}, tmp_path / "state")
    seen = []

    def make(width):
        model = Tied(width)
        seen.extend(p.is_meta for p in model.parameters())
        return model

    made = hdrq.load_float(make, tmp_path / "state", {"width": 6}, offload_folder=tmp_path)
    assert seen == [True] * 3
    assert made.outer.weight is made.inner.weight and torch.equal(made.inner.weight, torch.ones(6, 6))
    assert torch.equal(made.positions, torch.arange(6) + 1.0)
    assert not nn.Linear(2, 2).weight.is_meta  # modules made afterwards are as ever


def test_one_parameter_given_to_two_layers_stays_one_and_need_be_saved_once(tmp_path):
    def make():
        model, weight = Tied(), nn.Parameter(torch.zeros(4, 4))
        model.inner.weight = weight
        model.outer.weight = weight
        return model

    given = {**Tied().state_dict(), "inner.weight": torch.rand(4, 4)}
    del given["outer.weight"]  # as Hugging Face saves
    save_file(given, tmp_path / "state")
    for options in ({}, {"offload_folder": tmp_path / "offload"}):
        made = hdrq.load_float(make, tmp_path / "state", **options)
        assert made.outer.weight is made.inner.weight and torch.equal(made.outer.weight, given["inner.weight"])


def test_modules_of_other_threads_have_their_values(tmp_path):
    save_file(Tied().state_dict() | {"outer.weight": torch.ones(4, 4)}, tmp_path / "state")
    found = []

    def make():
        other = threading.Thread(target=lambda: found.append(nn.Linear(2, 2)))
        other.start()
        other.join()
        return Tied()

    hdrq.load_float(make, tmp_path / "state", offload_folder=tmp_path)
    assert not found[0].weight.is_meta


def test_another_dtype_is_copied_to_the_folder(tmp_path):
    halves = {name: value.half() if value.is_floating_point() else value for name, value in net(1).state_dict().items()}
    save_file(halves, tmp_path / "state")
    found = hdrq.load_float(net, tmp_path / "state", offload_folder=tmp_path / "offload")
    assert same(state(found), state(hdrq.load_float(net, tmp_path / "state")))
    assert {p.dtype for p in found.parameters()} == {torch.float32}
    assert not list((tmp_path / "offload").iterdir())


def test_what_cannot_be_made_so_is_refused(tmp_path):
    save_file({"weight": torch.ones(3)}, tmp_path / "state")
    with pytest.raises(ValueError, match=r"compute no tensor of them while it is made, got doubled; leave"):
        hdrq.load_float(Derived, tmp_path / "state", offload_folder=tmp_path)
    with pytest.raises(ValueError, match=r"must keep its parameters in modules alone, .*, got kept; leave"):
        hdrq.load_float(Listed, tmp_path / "state", offload_folder=tmp_path)
    with pytest.raises(ValueError, match=r"no values until the state gives them; leave offload_folder out"):
        hdrq.load_float(run_while_made, tmp_path / "state", offload_folder=tmp_path)
    with pytest.raises(ValueError, match=r"must have the tensors of net, got .*; 1\.weight missing"):
        hdrq.load_float(net, tmp_path / "state", offload_folder=tmp_path)
    with pytest.raises(ValueError, match="weights must be a file where offload_folder is given, got None"):
        hdrq.load_float(net, offload_folder=tmp_path)
    with pytest.raises(TypeError, match='model must be "module:factory" or a function that makes a module, got int'):
        hdrq.load_float(3, tmp_path / "state")


def test_a_model_in_files_is_quantized_to_the_same_bits(tmp_path):
    save_file(net(seed=1).state_dict(), tmp_path / "state")
    made = [hdrq.load_float(net, tmp_path / "state", **folder) for folder in ({}, {"offload_folder": tmp_path})]
    results = [
        hdrq.quantize(each, X, "rtn", progress=False, **folder)
        for each, folder in zip(made, ({}, {"offload_folder": tmp_path}), strict=True)
    ]
    assert same(*(state(result) for result in results))
