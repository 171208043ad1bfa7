"""How the Triton kernels find an element's channel and a word's bin: rows of every kind, histograms of every kind."""

import numpy as np
import pytest
import torch
from helpers import assert_same_bits, assert_sums_close, backend_params, device_of, sample, scales

import hdrq
from hdrq.backends.dispatch import implementation

TRITON = backend_params(only=("triton",))
ROWS = [  # whole groups of 16 bytes, of half types alone, and of none; longer than a tile and shorter
    ((2, 3, 1032), 1),
    ((5, 128), 0),
    ((3, 5, 36), 1),
    ((3, 2, 1029), 1),
    ((4, 147), 0),
    ((70, 9), 1),
    ((40, 3, 1), 1),  # and of one element
]


def run(backend, op, x, s, *, axis, **options):
    device = device_of(backend)
    x, s = (t.clone().to(device).requires_grad_() for t in (x, s))
    arguments = (hdrq.rng_state(3, 5, 7, device=device),) if op == "noise_quantize" else ()
    with hdrq.use_backend(backend):
        y = getattr(hdrq.ops, op)(x, s, -8, 7, *arguments, axis=axis, **options)
        y.backward(torch.ones_like(y))
    return y.detach().cpu(), x.grad.cpu(), s.grad.cpu()


@pytest.mark.parametrize("op", ["noise_quantize", "fake_quantize"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("shape", "axis"), ROWS)
@pytest.mark.parametrize("backend", TRITON)
def test_rows_of_every_kind_have_their_own_scale(backend, shape, axis, dtype, op):
    x, s = sample(shape, dtype, special=False), scales(shape[axis])
    got, want = (run(b, op, x, s, axis=axis) for b in (backend, "reference"))
    assert_same_bits(got[0], want[0])
    assert_same_bits(got[1], want[1])
    assert_sums_close(got[2], want[2], torch.full(shape, 2.0), axis)


@pytest.mark.parametrize("counts", ["one bin", "two far bins", "few", "even", "hidden", "many"])
@pytest.mark.parametrize("backend", TRITON)
def test_bins_of_every_width_are_found(backend, counts):
    draw = np.random.default_rng(0)
    bins = np.zeros(256, np.int64)
    if counts == "one bin":
        bins[128] = 77
    elif counts == "two far bins":
        bins[[3, 250]] = 1, 2**20
    elif counts == "few":
        bins[draw.integers(0, 256, 40)] += 1
    elif counts == "even":
        bins += 2**10
    elif counts == "hidden":
        bins += draw.integers(0, 3, 256)
        bins[100] = 10**7
    else:
        bins += draw.integers(0, 2**23, 256)
    cumulative = torch.from_numpy(np.concatenate([[0], bins.cumsum()]))
    x, s = torch.zeros(5000), torch.tensor([1.0])
    rng = hdrq.rng_state(1, 2, 3)
    with hdrq.use_backend("reference"):
        want = implementation("noise", "noise_quantize", x)(x, s, -8, 7, rng, cumulative, None, 2**16)
    device = device_of(backend)
    with hdrq.use_backend(backend):
        operands = [t.to(device) for t in (x, s)]
        own = implementation("noise", "noise_quantize", operands[0])
        got = own(*operands, -8, 7, rng.to(device), cumulative.to(device), None, 2**16)
    assert_same_bits(got, want)


def test_a_product_divides():
    triton_launch = pytest.importorskip("hdrq.kernels._launch")
    draw = np.random.default_rng(0)
    for d in [1, 2, 3, 5, 7, 641, 2**16 - 1, 2**16, 2**30 + 1, 2**31 - 1, *draw.integers(1, 2**31, 200).tolist()]:
        over = triton_launch.reciprocal(d)
        factor, shift = over & 0xFFFFFFFF, (over >> 32) - 1
        assert 2**31 <= factor < 2**32
        top = (2**31 - 1) // d * d
        for n in (0, 1, d - 1, d, top - 1, top, 2**31 - 1, *draw.integers(0, 2**31, 20).tolist()):
            if 0 <= n < 2**31:
                assert (2 * n * factor >> 32) >> shift == n // d
