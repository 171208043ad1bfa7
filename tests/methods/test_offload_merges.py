"""Calibrated merges whose weights lie in files: the bits are those of memory."""

import sys

import pytest
import torch
from helpers import files_that_hold, same, state
from networks import SAMPLES, Mergeable, mergeable
from safetensors.torch import save_file

import hdrq
from hdrq.methods import calibrated_merge, post_merge
from hdrq.prepare import offload

TASKS = [SAMPLES, SAMPLES[:40].flip(3)]
LEARNS = {"hdrq": {"iterations": 4, "distance": 0.1}}


@pytest.fixture(autouse=True)
def every_tensor_counts(monkeypatch):
    monkeypatch.setattr(offload, "SMALLEST", 1)


def inside(folder, model):
    """Whether all parameters lie in files of a folder; only Linux tells."""
    found = [path for name, path in files_that_hold(model).items() if not name.endswith("scale")]
    return bool(found) and all(str(folder) in path for path in found)


@pytest.mark.filterwarnings("ignore:block .* is rounded to nearest")
@pytest.mark.parametrize("method", ["closed-form", "hdrq"])
def test_integers(method, tmp_path, monkeypatch):
    paths, folder, read = [tmp_path / f"{k}.safetensors" for k in (0, 1)], tmp_path / "offload", []
    for k, path in enumerate(paths):
        hdrq.save(hdrq.quantize(mergeable(k), TASKS[k], "rtn", bits="W4A8", progress=False), path)
    given = {"method": method, "progress": False, **LEARNS.get(method, {})}
    usual = calibrated_merge.merge_calibrated(paths, TASKS, architecture=mergeable(3), **given)

    def load(*arguments, **options):
        read.append(hdrq.load(*arguments, **options))
        return read[-1]

    monkeypatch.setattr(calibrated_merge, "load", load)
    in_memory, units = offload.Offload.in_memory, []
    monkeypatch.setattr(offload.Offload, "in_memory", lambda self, unit: units.append(unit) or in_memory(self, unit))
    found = calibrated_merge.merge_calibrated(paths, TASKS, architecture=Mergeable, offload_folder=folder, **given)
    assert same(state(found), state(usual)) and len(read) == (3 if method == "hdrq" else 1)
    assert len(units) == 3
    if sys.platform == "linux":
        assert all(inside(folder, model) for model in (found, *read))
    models = [hdrq.load(path, Mergeable) for path in paths]
    before = [state(model) for model in models]
    assert same(state(calibrated_merge.merge_calibrated(models, TASKS, offload_folder=folder, **given)), state(usual))
    assert all(same(state(model), was) for model, was in zip(models, before, strict=True))
    assert not list(folder.iterdir())


@pytest.mark.filterwarnings("ignore:block .* is rounded to nearest")
@pytest.mark.parametrize("method", ["epmq", "regmean", "hdrq"])
def test_experts_in_full_precision(method, tmp_path, monkeypatch):
    paths, folder, prepared = [tmp_path / f"{k}.safetensors" for k in (0, 1)], tmp_path / "offload", []
    for k, path in enumerate(paths):
        save_file(mergeable(k).state_dict(), path)
    given = {"method": method, "bits": "W4A8", "group_size": None, "progress": False, **LEARNS.get(method, {})}
    usual = hdrq.post_merge([mergeable(0), mergeable(1)], TASKS, **given)

    def prepare(*arguments, **options):
        prepared.append(prepare_float(*arguments, **options)[0])
        return prepared[-1], {}

    prepare_float = post_merge.prepare_float
    monkeypatch.setattr(post_merge, "prepare_float", prepare)
    experts = [hdrq.load_float(Mergeable, path, offload_folder=folder) for path in paths]
    found = hdrq.post_merge(experts, TASKS, offload_folder=folder, **given)
    assert same(state(found), state(usual)) and len(prepared) == 2
    if sys.platform == "linux":
        assert all(inside(folder, model) for model in (found, *prepared))
    assert all(same(state(expert), mergeable(k).state_dict()) for k, expert in enumerate(experts))
    assert not list(folder.iterdir())


@pytest.mark.parametrize("device", ["meta"])
def test_models_elsewhere_are_refused_by_name(device, tmp_path):
    with torch.device(device):
        model = Mergeable()
    with pytest.raises(ValueError, match=r"models\[1\] must be on the CPU where weights are offloaded, got meta"):
        calibrated_merge.merge_calibrated([mergeable(0), model], TASKS, offload_folder=tmp_path, progress=False)
