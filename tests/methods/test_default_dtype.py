"""torch.set_default_dtype changes nothing: no tensor of hdrq's own is made without a dtype."""

import pytest
import torch
from helpers import backend_params, same, state
from networks import learn, mergeable, net, quantized

import hdrq
from hdrq.merging.files import merge_files, readiness
from hdrq.merging.settings import RULES


@pytest.fixture(params=[torch.bfloat16, torch.float16, torch.float64], ids=str)
def default(request):
    """A context in which the default is another; models are made before."""
    return request.param


@pytest.fixture(autouse=True)
def restore():
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("recipe", ["hdrq", "brecq"])
def test_quantized_models_are_the_same(default, recipe):
    model = net()
    wanted = state(learn(model, recipe=recipe))
    torch.set_default_dtype(default)
    assert same(state(learn(model, recipe=recipe)), wanted)


def test_files_and_merges_are_the_same(default, tmp_path):
    pair, architecture = [quantized(0), quantized(1)], mergeable(0)
    files = [tmp_path / "a", tmp_path / "b"]
    for model, path in zip(pair, files, strict=True):
        hdrq.save(model, path)

    def everything(folder):
        folder.mkdir()
        hdrq.save(hdrq.load(files[0], architecture), folder / "loaded")
        for rule in RULES:
            hdrq.save(hdrq.merge(pair, rule=rule), folder / rule)
        merge_files(files, folder / "merged", draws=3)
        content = {path.name: path.read_bytes() for path in folder.iterdir()}
        return content, readiness(files, draws=3)

    wanted = everything(tmp_path / "float32")
    torch.set_default_dtype(default)
    assert everything(tmp_path / "other") == wanted


@pytest.mark.parametrize("backend", backend_params())
def test_ops_are_the_same(default, backend):
    x = torch.linspace(-2, 3, 96).view(4, 24)
    rng = hdrq.rng_state(3)
    if backend == "triton":
        pytest.skip("its tensors may be elsewhere")

    def results():
        with hdrq.use_backend(backend):
            scale = hdrq.ops.search_scale(x, -8, 7, axis=0)
            affine = hdrq.ops.search_affine(x, 0, 15)
            codes = hdrq.ops.quantize(x, scale, -8, 7, axis=0)
            merged = hdrq.ops.merge([codes, codes.flip(1)], [scale, scale * 2], -8, 7, rng, axis=0, draws=3)
            noisy = [
                hdrq.ops.noise_quantize(x, scale, -8, 7, rng, axis=0, noise=noise) for noise in ("uniform", "empirical")
            ]
            return [scale, *affine, codes, merged.codes, merged.scale, merged.similarity, *noisy]

    wanted = results()
    torch.set_default_dtype(default)
    got = results()
    for one, other in zip(got, wanted, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)
