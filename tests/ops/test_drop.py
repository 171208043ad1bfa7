import pytest
import torch
from helpers import FLOATS, assert_same_bits, backend_params, device_of, sample, scales
from oracle import contract

import hdrq

STATE = (2**62 + 1, 2**32 - 1, 4)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(0,), (1,), (1030,), (3, 5, 7)])
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("backend", backend_params(only=("reference", "torch", "cpp", "triton")))
def test_value_and_gradient_go_where_the_contract_says(backend, p, shape, dtype):
    device = device_of(backend)
    a, b = (sample(shape, dtype, seed=seed).to(device).requires_grad_() for seed in (0, 1))
    with hdrq.use_backend(backend):
        y = hdrq.ops.drop_mix(a, b, p, hdrq.rng_state(*STATE, device=device))
        y.backward(torch.ones_like(y))
    keep = torch.tensor([contract.keeps(STATE, e, p) for e in range(y.numel())]).reshape(shape).bool()
    assert_same_bits(y, torch.where(keep, a.cpu(), b.cpu()))
    assert_same_bits(a.grad, keep.to(dtype))
    assert_same_bits(b.grad, (~keep).to(dtype))


def test_the_share_kept_is_p():
    y = hdrq.ops.drop_mix(torch.ones(100_000), torch.zeros(100_000), 0.3, hdrq.rng_state(0))
    assert abs(y.mean() - 0.3) < 5 * (0.21 / 100_000) ** 0.5


def test_the_mask_is_independent_of_the_noise():
    zeros, rng = torch.zeros(100_000), hdrq.rng_state(0)
    noise = hdrq.ops.noise_quantize(zeros, torch.ones(1), -4, 3, rng)
    mask = hdrq.ops.drop_mix(torch.ones_like(zeros), zeros, 0.5, rng)
    assert abs(torch.corrcoef(torch.stack([noise, mask]))[0, 1]) < 5 / 100_000**0.5


BAD = [
    (ValueError, r"p must be finite and in \[0, 1\], got 1.5", {"p": 1.5}),
    (ValueError, r"p must be .*, got nan", {"p": float("nan")}),
    (ValueError, "b must have the shape of a", {"b": torch.zeros(3)}),
    (TypeError, "b must be a tensor of float32, got bfloat16", {"b": torch.zeros(4, dtype=torch.bfloat16)}),
]


@pytest.mark.parametrize(("error", "message", "change"), BAD)
def test_bad_input(error, message, change):
    arguments = {"a": torch.zeros(4), "b": torch.zeros(4), "p": 0.5, "rng": hdrq.rng_state(0)} | change
    with pytest.raises(error, match=message):
        hdrq.ops.drop_mix(**arguments)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("shape", "axis"), [((1030,), None), ((5, 4, 3), 1), ((2, 1100), 0)])
@pytest.mark.parametrize("op", ["noise_quantize", "noise_quantize, empirical", "fake_quantize"])
@pytest.mark.parametrize("backend", backend_params())
def test_fused_into_a_quantizer_it_has_the_same_bits(backend, op, shape, axis, dtype):
    device = device_of(backend)
    rng = hdrq.rng_state(*STATE, device=device)
    scale, x = scales(1 if axis is None else shape[axis]).to(device), sample(shape, dtype).to(device)
    grad = sample(shape, dtype, seed=3, special=False).to(device)
    name, _, noise = op.partition(", ")

    def quantizer(x, scale, **options):
        if name == "fake_quantize":
            return hdrq.ops.fake_quantize(x, scale, -8, 7, axis=axis, grad_scale=0.1, **options)
        options.pop("rng", None)
        given = {"noise": noise or "uniform", "axis": axis, "grad_scale": 0.1}
        return hdrq.ops.noise_quantize(x, scale, -8, 7, rng, **given, **options)

    def apart(x, scale):
        return hdrq.ops.drop_mix(quantizer(x, scale), x, 0.4, rng)

    results = []
    with hdrq.use_backend(backend):
        assert_same_bits(quantizer(x, scale, keep=0.4, rng=rng), apart(x, scale))
        for function in (lambda x, scale: quantizer(x, scale, keep=0.4, rng=rng), apart):
            a, s = x.nan_to_num(0, 1, -1).requires_grad_(), scale.clone().requires_grad_()
            function(a, s).backward(grad)
            results.append((a.grad, s.grad))
    (grad_x, grad_s), (expected_x, expected_s) = results
    assert_same_bits(grad_x, expected_x)
    torch.testing.assert_close(grad_s, expected_s)


def test_a_fused_drop_needs_a_stream():
    with pytest.raises(TypeError, match="rng must be a tensor of int64, got NoneType"):
        hdrq.ops.fake_quantize(torch.zeros(4), torch.ones(1), -8, 7, keep=0.5)
    for keep in (-0.1, 1.5):
        with pytest.raises(ValueError, match=r"keep must be finite and in \[0, 1\], got"):
            hdrq.ops.noise_quantize(torch.zeros(4), torch.ones(1), -8, 7, hdrq.rng_state(0), keep=keep)
