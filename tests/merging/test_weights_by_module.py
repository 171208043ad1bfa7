"""Weights of a merge that differ from module to module."""

import pytest
import torch
from networks import mergeable, quantized
from torch import nn

import hdrq
from hdrq.checkpoint.loading import manifest_of
from hdrq.checkpoint.saving import state_of
from hdrq.merging.files import merge_files
from hdrq.quantizers.provenance import origin

BY_MODULE = {"a": (0.75, 0.25), "head": (0.0, 1.0), "*": (0.5, 0.5)}


def tensors(model):
    return state_of(model)[1]


@pytest.mark.parametrize("rule", ["systematic", "half-even", "half-up", "requantize"])
def test_each_module_is_merged_by_its_own_weights(rule):
    models = [quantized(seed) for seed in (0, 1)]
    mixed = tensors(hdrq.merge(models, rule=rule, weights=BY_MODULE))
    seen = set()
    for name, value in mixed.items():
        part = next((part for part in ("a", "head") if name.startswith(f"{part}.")), "*")
        alone = tensors(hdrq.merge(models, rule=rule, weights=BY_MODULE[part]))
        assert torch.equal(value, alone[name]), name
        seen.add(part)
    assert seen == {"a", "head", "*"}
    other = tensors(hdrq.merge(models, rule=rule))
    assert any(not torch.equal(value, other[name]) for name, value in mixed.items() if name.startswith("a."))
    assert all(torch.equal(v, other[name]) for name, v in mixed.items() if not name.startswith(("a.", "head.")))


def test_files_give_the_same_and_say_the_weights(tmp_path):
    models = [quantized(seed) for seed in (0, 1)]
    for name, model in zip("ab", models, strict=True):
        hdrq.save(model, tmp_path / f"{name}.safetensors")
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    merge_files(paths, tmp_path / "out.safetensors", weights=BY_MODULE)
    merged = hdrq.merge(models, weights=BY_MODULE)
    got = hdrq.load(tmp_path / "out.safetensors", mergeable(0))
    assert all(torch.equal(value, tensors(got)[name]) for name, value in tensors(merged).items())
    said = [[pattern, list(own)] for pattern, own in BY_MODULE.items()]  # their order decides
    assert origin(merged)["merge"]["weights"] == said
    assert manifest_of(tmp_path / "out.safetensors")["merge"]["weights"] == said


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x))


def test_layers_that_share_a_weight_have_the_same():
    models = []
    for seed in (0, 1):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            models.append(hdrq.quantize(Shared().eval(), torch.randn(48, 6), "rtn", bits="W8A8"))
    both = {"first": (1.0, 0.0), "second": (1.0, 0.0)}
    assert torch.equal(tensors(hdrq.merge(models, weights=both))["first.bias"], tensors(models[0])["first.bias"])
    with pytest.raises(ValueError, match=r"weights must be the same for layers that share a weight, got others for "):
        hdrq.merge(models, weights={"first": (1.0, 0.0), "second": (0.0, 1.0)})


@pytest.mark.parametrize(
    "weights, error, message",
    [
        ({"a": (0.5, 0.5)}, ValueError, r'weights must be given for every tensor \(end with "\*"\), got none for '),
        ({"c": (0.5, 0.5), "*": (0.5, 0.5)}, ValueError, "weights must have patterns that match a module .* got 'c'"),
        ({"*": (0.5, 0.5), "a": (1, 0)}, ValueError, "weights must have patterns .* that none before matches, got 'a'"),
        ({1: (0.5, 0.5)}, TypeError, "weights must have patterns of names, got 1"),
        ({"*": (0.5, 0.6)}, ValueError, "weights must sum to 1, got 1.1"),
        ({"*": (1.5, -0.5)}, ValueError, r"weights\[0\] must be finite and in \[0, 1\], got 1.5"),
        ({"*": (1.0,)}, ValueError, "weights must be as many as the models, 2, got 1"),
        ({"*": 0.5}, TypeError, "weights must be numbers, one for each model, got float"),
        (0.5, TypeError, "weights must be numbers, one for each model, got float"),
    ],
)
def test_bad_weights_are_refused(weights, error, message):
    with pytest.raises(error, match=message):
        hdrq.merge([quantized(0), quantized(1)], weights=weights)
