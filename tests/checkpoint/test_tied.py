"""A weight that layers share: learned once, counted once, written once, merged once."""

import pytest
import torch
from helpers import merged_content
from torch import nn

import hdrq
from hdrq.calibrate.sequential import Fitted
from hdrq.checkpoint.format import Reader
from hdrq.checkpoint.inspection import contents
from hdrq.merging.files import merge_files
from hdrq.methods import post_training
from hdrq.methods.reconstruct.method import Reconstruction
from hdrq.quantizers.layers import quantized_layers


class Tied(nn.Module):
    """Two layers of one weight, each with a bias of its own."""

    def __init__(self, tie=True):
        super().__init__()
        self.first, self.between, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        if tie:
            self.last.weight = self.first.weight

    def forward(self, x):
        return self.last(self.between(self.first(x).relu()).relu())


def tied(seed, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Tied(**options).eval()


DATA = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def files(tmp_path):
    paths = [tmp_path / f"{seed}.safetensors" for seed in range(2)]
    for seed, path in enumerate(paths):
        hdrq.save(hdrq.quantize(tied(seed), DATA, "rtn", bits="W3A8"), path)
    return paths


def test_file_holds_the_weight_once_and_says_so(files):
    with Reader(files[0]) as file:
        assert file.manifest["tied"] == {"last": "first"} and set(file.manifest["weights"]) == {"first", "between"}
        assert {name for name in file.specs if "codes" in name} == {"first.weight.codes", "between.weight.codes"}
    assert contents(files[0]).facts["tied"] == "last to first"


def test_loaded_model_has_one_quantizer_for_it(files):
    model, loaded = hdrq.quantize(tied(0), DATA, "rtn", bits="W3A8"), hdrq.load(files[0], tied(1))
    layers = quantized_layers(loaded)
    assert layers["last"].latent is layers["first"].latent
    assert layers["last"].weight_quantizer is layers["first"].weight_quantizer
    assert torch.equal(loaded(DATA), model(DATA))


def test_merged_weight_is_drawn_once(files, tmp_path):
    merge_files(files, tmp_path / "merged", seed=3)
    merged = hdrq.merge([hdrq.load(path, tied(0)) for path in files], seed=3)
    hdrq.save(merged, tmp_path / "saved")
    assert merged_content(tmp_path / "merged") == merged_content(tmp_path / "saved")
    loaded = hdrq.load(tmp_path / "merged", tied(0))
    assert torch.equal(loaded.first.weight, loaded.last.weight) and torch.equal(loaded(DATA), merged(DATA))


def test_an_architecture_that_does_not_tie_is_refused(files):
    with pytest.raises(ValueError, match="model must tie the weight of last to that of first, as the checkpoint has"):
        hdrq.load(files[0], tied(0, tie=False))


@pytest.mark.parametrize("table", [{"last": "between.no"}, {"first": "between"}, {"last": 1}, []])
def test_a_table_that_does_not_fit_is_refused(files, table, monkeypatch, tmp_path):
    monkeypatch.setattr("hdrq.checkpoint.saving.origin", lambda model: {"folded": {}, "tied": table})
    with pytest.raises(ValueError, match="manifest must name one layer with a weight for every layer tied to it, got"):
        hdrq.save(hdrq.load(files[0], tied(0)), tmp_path / "odd")


def test_weight_counts_once_in_the_distance_and_in_the_step(monkeypatch):
    seen = []

    class Watched(Reconstruction):
        def fit(self, unit, journal):
            learner = self._learner(unit)
            seen.append((learner._distance(), list(learner.parameters.by_name)))
            learner.learn(0, lambda *_: None, lambda _: None, 0)
            learner.parameters.finish()
            return Fitted({}, {"loss_before": 0.0, "loss_after": 0.0})

    monkeypatch.setattr(post_training, "Reconstruction", Watched)
    model, source = nn.Sequential(tied(0)).eval(), nn.Sequential(tied(1)).eval()
    options = {"source": source, "distance": 1.0, "bits": {"*": "W4A8"}, "blocks": ["0"], "iterations": 1}
    hdrq.quantize(model, DATA, "hdrq", progress=False, **options)
    ((distance, names),) = seen
    once = ["0.first.weight", "0.between.weight"]
    apart = sum((model.get_parameter(name) - source.get_parameter(name)).norm() for name in once)
    assert distance == pytest.approx(float(apart.detach()), rel=1e-5)
    assert [name for name in names if name.endswith("weight")] == once
