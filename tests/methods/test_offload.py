"""Weights in files: the bits are those of memory, no name stays in the folder, and units alone are in memory."""

import errno
import os
import sys

import pytest
import torch
from helpers import files_that_hold, same, state
from torch import nn

import hdrq
from hdrq.methods.reconstruct.method import Reconstruction
from hdrq.prepare import offload

X = torch.randn((32, 3, 8, 8), generator=torch.Generator().manual_seed(0))
linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/maps is Linux's")


class Net(nn.Module):
    """A folded convolution, a packed attention, and a weight that two layers share."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.attention = nn.MultiheadAttention(32, 2, batch_first=True)
        self.inner, self.tied = nn.Linear(32, 32), nn.Linear(32, 32)
        self.tied.weight = self.inner.weight
        self.head = nn.Linear(32, 5)

    def forward(self, x):
        x = self.stem(x).flatten(2).mT
        x = x + self.attention(x, x, x)[0]
        return self.head(self.tied(self.inner(x).relu()).mean(1))


@pytest.fixture(autouse=True)
def every_tensor_counts(monkeypatch):
    monkeypatch.setattr(offload, "SMALLEST", 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recipe", ["rtn", "gptq", "qdrop", "hdrq"])
def test_files_hold_the_bits_that_memory_would(tmp_path, recipe, dtype):
    model, source = (Net(seed).eval().to(dtype) for seed in (0, 1))
    before = state(model)
    options = {"source": source} if recipe == "hdrq" else {}
    options |= {"iterations": 4} if recipe in ("qdrop", "hdrq") else {}
    given = {"bits": "W4A8", "progress": False, **options}
    usual = state(hdrq.quantize(model, X.to(dtype), recipe, **given))
    result = hdrq.quantize(model, X.to(dtype), recipe, offload_folder=tmp_path / "new", **given)
    assert same(state(result), usual)
    assert not list((tmp_path / "new").iterdir())
    with torch.no_grad():
        for parameter in result.parameters():
            parameter.fill_(7)
    assert same(state(model), before)


@pytest.mark.parametrize("smallest", [1, 1 << 16])
@pytest.mark.parametrize("recipe", ["rtn", "gptq"])
def test_the_result_shares_nothing_with_the_users_model(tmp_path, monkeypatch, recipe, smallest):
    """Be its tensors in files or, being small, in memory."""
    monkeypatch.setattr(offload, "SMALLEST", smallest)
    model = Net().eval()
    before = state(model)
    result = hdrq.quantize(model, X, recipe, bits="W4A8", progress=False, offload_folder=tmp_path)
    assert same(state(model), before)
    with torch.no_grad():
        for tensor in (*result.parameters(), *result.buffers()):
            tensor.zero_()
    assert same(state(model), before)


def test_a_forward_that_writes_to_weights_leaves_the_users_model():
    model = nn.Sequential(nn.Embedding(10, 16, max_norm=1.0), nn.Linear(16, 4)).eval()
    before = state(model)
    hdrq.quantize(model, torch.arange(40).view(8, 5) % 10, "rtn", progress=False)
    assert same(state(model), before)


def test_a_file_has_the_strides_of_a_clone(tmp_path):
    folder, w = offload.Offload(tmp_path), torch.randn(4, 3, 2, 2)
    for tensor in (w.to(memory_format=torch.channels_last), w[:, :1], w[0, 0, 0, 0].expand(5, 6), w.mT, w[:0]):
        assert folder.put(tensor).stride() == tensor.clone().stride() and torch.equal(folder.put(tensor), tensor)


def test_bits_for_a_budget_are_measured_from_files_too(tmp_path, monkeypatch):
    pytest.importorskip("scipy")
    put, sizes = offload.Offload.put, []
    monkeypatch.setattr(offload.Offload, "put", lambda self, weight: sizes.append(weight.numel()) or put(self, weight))
    given = {"bits": "auto:W5A8", "progress": False}
    usual = hdrq.quantize(Net().eval(), X, "rtn", **given)
    assert not sizes
    assert same(state(hdrq.quantize(Net().eval(), X, "rtn", offload_folder=tmp_path, **given)), state(usual))
    assert (
        sizes.count(Net().head.weight.numel()) == 4
    )  # twice of what is measured, and of what is quantized: in full precision, and the copy


@linux
@pytest.mark.parametrize("recipe", ["rtn", "qdrop"])
def test_weights_lie_in_files_but_while_their_unit_is_fitted(tmp_path, monkeypatch, recipe):
    inside, seen = str(tmp_path), []

    def fit(self, unit, journal):
        seen.append((unit.name, files_that_hold(unit.module), files_that_hold(unit.reference)))
        return learn(self, unit, journal)

    learn = Reconstruction.fit
    monkeypatch.setattr(Reconstruction, "fit", fit)
    options = {} if recipe == "rtn" else {"iterations": 2}
    result = hdrq.quantize(Net().eval(), X, recipe, bits="W4A8", progress=False, offload_folder=tmp_path, **options)
    weights = {name: path for name, path in files_that_hold(result).items() if not name.endswith("scale")}
    assert weights and all(inside in path for path in weights.values())
    assert bool(seen) == (recipe == "qdrop")
    for name, module, reference in seen:
        assert not any(inside in path for path in module.values())
        if name.startswith(("stem", "attention")):  # what folding, or opening an attention, has made
            assert all(inside in path for path in reference.values())


def test_what_cannot_be_is_refused_at_the_start(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for odd in ("", 5):
        with pytest.raises(ValueError, match=f"offload_folder must be a folder on a disk, got {odd!r}"):
            hdrq.quantize(Net().eval(), X, "rtn", offload_folder=odd)
    with pytest.raises(ValueError, match=r"offload_folder must be a folder, got '.*file', which is none"):
        hdrq.quantize(Net().eval(), X, "rtn", offload_folder=tmp_path / "file")
    monkeypatch.setattr("hdrq.methods.post_training.check_module", lambda *given: None)
    with pytest.raises(ValueError, match="model must be on the CPU where weights are offloaded, got meta"):
        hdrq.quantize(Net().eval().to("meta"), X, "rtn", offload_folder=tmp_path)


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="room cannot be taken ahead")
def test_a_full_disk_is_named_and_nothing_stays_on_it(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"room for [\d,]+ bytes, got [\d,]+ free; offload_folder says where weights lie"):
        hdrq.quantize(Net().eval(), X, "rtn", offload_folder=tmp_path)
    assert not list(tmp_path.iterdir())


# --- quantized models


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "quantized.safetensors"
    hdrq.save(hdrq.quantize(Net().eval(), X, "rtn", bits="W4A8", progress=False), path)
    return path


@pytest.mark.parametrize("architecture", [Net, lambda: Net(seed=1), Net().eval()])
def test_a_quantized_model_is_read_into_files(tmp_path, saved, architecture):
    before = state(architecture) if isinstance(architecture, nn.Module) else None
    usual, found = (
        hdrq.load(saved, architecture, **options) for options in ({}, {"offload_folder": tmp_path / "offload"})
    )
    assert same(state(found), state(usual)) and torch.equal(found(X), usual(X))
    assert found.inner.parametrizations.weight.original is found.tied.parametrizations.weight.original
    if sys.platform == "linux":
        held = files_that_hold(found)
        assert len(held) > 8 and all(str(tmp_path / "offload") in path for path in held.values())
    assert not list((tmp_path / "offload").iterdir())
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.fill_(7)
    assert same(state(hdrq.load(saved, Net)), state(usual))
    assert before is None or same(state(architecture), before)


def test_an_architecture_elsewhere_is_refused(tmp_path, saved):
    with pytest.raises(ValueError, match="model must be on the CPU where weights are offloaded, got meta"):
        hdrq.load(saved, Net().eval().to("meta"), offload_folder=tmp_path / "offload")
