import contract
import numpy as np
import pytest
import torch
from helpers import assert_same_bits, backend_params, device_of

import hdrq

STATE = (2**61 + 3, 2**32 - 1, 2**32 - 2)  # stream + k and step + d both wrap
f32 = np.float32


def models(count, shape, qmin, qmax, axis, seed=0):
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.int8 if qmax <= 127 else torch.int16
    codes = [torch.randint(qmin, qmax + 1, shape, generator=generator).to(dtype) for _ in range(count)]
    size = 1 if axis is None else shape[axis]
    return codes, [torch.rand(size, generator=generator) * 0.1 + 0.2 for _ in range(count)]


def run(backend, codes, deltas, qmin, qmax, **options):
    device = device_of(backend)
    with hdrq.use_backend(backend):
        result = hdrq.ops.merge(
            [c.to(device) for c in codes],
            [d.to(device) for d in deltas],
            qmin,
            qmax,
            hdrq.rng_state(*STATE, device=device),
            **options,
        )
    return hdrq.ops.MergedTensor(*(t.cpu() for t in result))


@pytest.mark.parametrize("backend", backend_params())
@pytest.mark.parametrize(("count", "weights"), [(2, None), (3, None), (3, (0.5, 0.3, 0.2))])
@pytest.mark.parametrize(("qmin", "qmax"), [(-4, 3), (0, 255)])
@pytest.mark.parametrize("axis", [None, 0])
def test_codes_have_the_bits_of_the_contract(backend, count, weights, qmin, qmax, axis):
    codes, deltas = models(count, (5, 7), qmin, qmax, axis)
    result = run(backend, codes, deltas, qmin, qmax, weights=weights, draws=3, axis=axis)
    lam = [f32(1 / count)] * count if weights is None else [f32(w) for w in weights]
    seed, stream, step = STATE
    drawn = (step + int(result.draw)) % 2**32
    for e in range(35):
        own = [d[0 if axis is None else e // 7].numpy() for d in deltas]
        noises = [contract.uniform((seed, (stream + k) % 2**32, drawn), e) for k in range(count)]
        integers = [int(c.flatten()[e]) for c in codes]
        assert int(result.codes.flatten()[e]) == contract.merged_code(integers, own, lam, noises, qmin, qmax)


@pytest.mark.parametrize("backend", backend_params(only=("torch", "cpp", "triton")))
@pytest.mark.parametrize("noise", ["all", "odd", "none"])
@pytest.mark.parametrize(("shape", "axis"), [((1,), None), ((2100,), None), ((6, 3, 3, 3), 0), ((4, 9), -1)])
def test_backends_agree_with_the_reference(backend, noise, shape, axis):
    codes, deltas = models(2, shape, -8, 7, axis)
    got, want = (run(b, codes, deltas, -8, 7, draws=4, noise=noise, axis=axis) for b in (backend, "reference"))
    assert_same_bits(got.codes, want.codes)
    assert_same_bits(got.scale, want.scale)
    assert_same_bits(got.draw, want.draw)
    torch.testing.assert_close(got.similarity, want.similarity, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", backend_params())
def test_the_draw_kept_is_the_best_aligned(backend):
    codes, deltas = models(2, (40, 5), -4, 3, None)
    result = run(backend, codes, deltas, -4, 3, draws=6)
    values = [c.double() * d.double() for c, d in zip(codes, deltas, strict=True)]
    step = result.codes.double() * result.scale.double()
    middle = sum(values) / 2
    cosines = [torch.cosine_similarity((step - v).flatten(), (middle - v).flatten(), dim=0) for v in values]
    torch.testing.assert_close(result.similarity[result.draw], torch.stack(cosines), rtol=1e-5, atol=1e-5)
    assert int(result.draw) == int(result.similarity.amin(dim=1).argmax())


def test_equal_scales_make_an_odd_sum_a_fair_coin_and_leave_an_even_one():
    codes = [torch.full((20_000,), 1, dtype=torch.int8), torch.full((20_000,), 2, dtype=torch.int8)]
    codes[1][:10_000] = 3
    merged = hdrq.ops.merge(codes, [torch.tensor([0.1])] * 2, -4, 3, hdrq.rng_state(0)).codes
    assert (merged[:10_000] == 2).all()
    coin = (merged[10_000:] == 2).double().mean()
    assert ((merged[10_000:] == 1) | (merged[10_000:] == 2)).all()
    assert abs(coin - 0.5) < 5 * 0.5 / 100


def test_models_that_agree_merge_to_themselves():
    codes, _ = models(1, (50,), -8, 7, None)
    result = hdrq.ops.merge(codes * 2, [torch.tensor([0.25])] * 2, -8, 7, hdrq.rng_state(0), noise="none")
    assert torch.equal(result.codes, codes[0])
    assert result.similarity.tolist() == [[1.0, 1.0]]


INT8 = torch.zeros(4, dtype=torch.int8)
BAD = [
    (ValueError, r"the number of tensors must be in \[2, 64\], got 1", {"codes": [INT8], "scales": [torch.ones(1)]}),
    (ValueError, "scales must be as many as codes, 2, got 1", {"scales": [torch.ones(1)]}),
    (ValueError, "weights must sum to 1, got 0.9", {"weights": (0.5, 0.4)}),
    (ValueError, r"weights\[1\] must be .*, got -0.5", {"weights": (1.0, -0.5)}),
    (ValueError, r"draws must be in \[1, \d+\], got 0", {"draws": 0}),
    (ValueError, "noise must be one of", {"noise": "some"}),
    (ValueError, r"codes\[1\] must have the shape", {"codes": [INT8, torch.zeros(5, dtype=torch.int8)]}),
    (
        ValueError,
        r"codes\[1\] must be in \[-4, 3\], got \[0, 9\]",
        {"codes": [INT8, torch.tensor([0, 0, 0, 9]).char()]},
    ),
    (TypeError, r"codes\[0\] must be a tensor of int8 or int16", {"codes": [INT8.float(), INT8]}),
    (ValueError, r"scales\[0\] must be positive", {"scales": [torch.zeros(1), torch.ones(1)]}),
    (ValueError, "noise must be .* for two tensors of equal weight", {"noise": "odd", "weights": (0.4, 0.6)}),
]


@pytest.mark.parametrize(("error", "message", "change"), BAD)
def test_bad_input(error, message, change):
    arguments = {"codes": [INT8, INT8], "scales": [torch.ones(1)] * 2, "qmin": -4, "qmax": 3} | change
    with pytest.raises(error, match=message):
        hdrq.ops.merge(**arguments, rng=hdrq.rng_state(0))
