"""The same bits however the work is cut: threads, tiles of the Triton kernels, runs. Sums repeat from run to run."""

import importlib
import pkgutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import DEVICE, assert_same_bits, backend_params, device_of, sample
from torch import nn

import hdrq
from hdrq.backends.dispatch import implementation

STATE = (11, 2, 2**32 - 1)
REPEATING = ("torch", "cpp", "triton")[: 2 + (DEVICE == "cuda")]  # an interpreter runs programs one after the other
USUAL = {"_launch.SHORTEST": 16, "noise.TILES": 3}  # rows that have tiles of their own are short here
SMALLER = {"noise.TILES": 2, "merging.PROGRAMS": 2, "merging.TOGETHER": 1, "ranges.CANDIDATES": 1}


def results(backend, shape, axis=None):
    """What every op returns, by name: element by element or counted; and sums, which may depend on how work is cut."""
    device = device_of(backend)
    x, source, grad = (sample(shape, seed=seed, special=False).to(device) for seed in range(3))
    scale = torch.full((1 if axis is None else shape[axis],), 0.25, device=device)
    codes = [(x * 4).round().clamp(-8, 7).to(torch.int8), (source * 4).round().clamp(-8, 7).to(torch.int8)]
    x.requires_grad_(), scale.requires_grad_()
    rng = hdrq.rng_state(*STATE, device=device)
    bits, sums = {}, {}
    with hdrq.use_backend(backend):
        for noise in ("uniform", "empirical"):
            bits[noise] = hdrq.ops.noise_quantize(x, scale, -8, 7, rng, axis=axis, noise=noise)
            bits[f"{noise} backward"], sums[noise] = torch.autograd.grad(bits[noise], (x, scale), grad)
        bits["fake_quantize"] = hdrq.ops.fake_quantize(x, scale, -8, 7, axis=axis)
        bits["fake_quantize backward"], sums["fake_quantize"] = torch.autograd.grad(
            bits["fake_quantize"], (x, scale), grad
        )
        bits["quantize"] = hdrq.ops.quantize(x, scale, -8, 7, axis=axis)
        bits["dequantize"] = hdrq.ops.dequantize(bits["quantize"], scale, axis=axis)
        bits["drop_mix"] = hdrq.ops.drop_mix(x, source, 0.5, rng)
        (bits["drop_mix backward"],) = torch.autograd.grad(bits["drop_mix"], x, grad)
        for mode in ("exact", "fast"):
            merged = hdrq.ops.merge(codes, [scale, 2 * scale], -8, 7, rng, draws=2, axis=axis, mode=mode)
            bits[f"{mode} merge"], bits["merged scale"] = merged.codes, merged.scale
            sums[f"{mode} similarity"] = merged.similarity
        bits["systematic merge"] = hdrq.ops.merge(codes, [scale, 2 * scale], -8, 7, rng, axis=axis).codes
        sums["source_distance"] = hdrq.ops.source_distance(x, source)
        (sums["source_distance backward"],) = torch.autograd.grad(sums["source_distance"], x)
        alpha = source.clone().requires_grad_()
        bits["adaround"], sums["penalty"] = hdrq.ops.adaround_regularized(x, scale, alpha, -8, 7, 2.5, axis=axis)
        (bits["adaround backward"],) = torch.autograd.grad(bits["adaround"], alpha, grad)
        (bits["weights"],), sums["distances"] = hdrq.ops.quantize_weights(
            [x], [scale], [(-8, 7)], sources=[source], rngs=[rng], axis=axis
        )
        bits["weights backward"], sums["weights"] = torch.autograd.grad(bits["weights"], (x, scale), grad)
        rows, ones = torch.stack([x.detach().flatten(), source.flatten()]), torch.ones(2, device=device)
        steps, bound = torch.tensor([[0.1, 0.3]] * 2, device=device), torch.ones(2, 2, device=device)
        errors = implementation("ranges", "range_errors", x)
        sums["range_errors"] = errors(rows, None, steps, -8 * bound, 7 * bound, ones, 2.4)
        bits["range_table"] = implementation("ranges", "range_table", x)(rows, -2 * ones, 2**22 * ones, 512)
    return bits, sums


def assert_same(got, want):
    for name in want:
        assert_same_bits(got[name], want[name])


@pytest.mark.parametrize("axis", [None, 1])
@pytest.mark.parametrize("backend", backend_params(only=REPEATING))
def test_runs_repeat_to_the_bit_sums_included(backend, axis):
    for got, want in zip(*(results(backend, (31, 2, 5), axis) for _ in range(2)), strict=True):
        assert_same(got, want)


@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize("backend", backend_params(only=("cpp",)))
def test_threads_change_no_bit_of_forward_or_sums(backend, axis):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = results(backend, (7, 60_001), axis)  # enough for three threads
        for threads in (2, 3):
            torch.set_num_threads(threads)
            for got, want in zip(results(backend, (7, 60_001), axis), alone, strict=True):
                assert_same(got, want)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("shape", "axis", "block"), [((2, 35), None, 32), ((2, 35), 0, 16), ((35, 2), 1, 32)])
@pytest.mark.parametrize("backend", backend_params(only=("triton",)))
def test_tiles_of_a_kernel_change_no_bit_of_a_forward_pass(backend, shape, axis, block, monkeypatch):
    """Every kernel runs on its usual tiles and on smaller ones, and a program loops over fewer of them."""
    blocks = {}
    for family in _families():
        if hasattr(family, "launch"):
            monkeypatch.setattr(family, "launch", _recorded(family.launch, blocks))
    for name, size in USUAL.items():
        monkeypatch.setattr(f"hdrq.kernels.{name}", size)
    usual, usual_sums = results(backend, shape, axis)
    for name, size in {"_launch.BLOCK": block, **SMALLER}.items():
        monkeypatch.setattr(f"hdrq.kernels.{name}", size)
    bits, sums = results(backend, shape, axis)
    assert_same(bits, usual)
    for name, total in sums.items():
        torch.testing.assert_close(total, usual_sums[name], rtol=1e-5, atol=1e-5)
    kernels = {value.__name__ for m in _families() for name, value in vars(m).items() if name.endswith("_kernel")}
    of_one_size = {"merge_systematic_kernel", "guides_kernel"}  # a tile is a group, which decides bits; a table's part
    assert {name for name, sizes in blocks.items() if len(sizes) == 2} == kernels - of_one_size


def _families():
    import hdrq.kernels

    names = [module.name for module in pkgutil.iter_modules(hdrq.kernels.__path__)]
    return [importlib.import_module(f"hdrq.kernels.{name}") for name in names if not name.startswith("_")]


def _recorded(launch, blocks):
    def recording(kernel, *args, block, **constants):
        blocks.setdefault(kernel.__name__, set()).add(block)
        launch(kernel, *args, block=block, **constants)

    return recording


def test_two_threads_may_learn_at_once():
    """Each as if it were alone: what a step keeps is its model's, not the process's."""
    x, options = torch.randn(16, 6), {"distance": 0, "iterations": 30, "progress": False}
    models = [nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)).eval() for _ in range(2)]
    with ThreadPoolExecutor(2) as workers:
        together = list(workers.map(lambda model: hdrq.quantize(model, x, "hdrq", **options), models))
    for model, other in zip(models, together, strict=True):
        assert torch.equal(hdrq.quantize(model, x, "hdrq", **options)(x), other(x))
