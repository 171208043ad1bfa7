"""The same bits however the work is cut: threads, tiles of the Triton kernels, runs. Sums repeat from run to run."""

import pytest
import torch
from helpers import assert_same_bits, backend_params, device_of, sample

import hdrq

STATE = (11, 2, 2**32 - 1)


def results(backend, shape, axis=None):
    """Forward results, by name; and the sums, which may depend on how the work is cut."""
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
        bits["drop_mix"] = hdrq.ops.drop_mix(x, source, 0.5, rng)
        merged = hdrq.ops.merge(codes, [scale, 2 * scale], -8, 7, rng, draws=3, axis=axis)
        bits["merge"], bits["merged scale"], sums["similarity"] = merged.codes, merged.scale, merged.similarity
        if backend != "triton":
            sums["source_distance"] = hdrq.ops.source_distance(x, source)
    return bits, sums


def assert_same(got, want):
    for name in want:
        assert_same_bits(got[name], want[name])


@pytest.mark.parametrize("axis", [None, 1])
@pytest.mark.parametrize("backend", backend_params(only=("torch", "cpp", "triton")))
def test_runs_repeat_to_the_bit_sums_included(backend, axis):
    for got, want in zip(*(results(backend, (31, 5, 11), axis) for _ in range(2)), strict=True):
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


@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("backend", backend_params(only=("triton",)))
def test_tiles_of_a_kernel_change_no_bit_of_a_forward_pass(backend, axis, monkeypatch):
    shape = (3, 131) if axis == 0 else (131, 3)
    usual, _ = results(backend, shape, axis)
    monkeypatch.setattr("hdrq.kernels._launch.BLOCK", 256)
    bits, _ = results(backend, shape, axis)
    assert_same(bits, usual)
