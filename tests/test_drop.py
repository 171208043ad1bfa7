import contract
import pytest
import torch
from helpers import FLOATS, assert_same_bits, backend_params, device_of, sample

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
