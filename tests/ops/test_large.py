"""More than 2³¹ elements: indices need 64 bits."""

import pytest
import torch
from oracle import contract

import hdrq

COUNT = 2**31 + 4099


def available_bytes() -> int:
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except OSError:
        return 0


@pytest.mark.skipif(hdrq.available_backends()["cpp"] is not None, reason="plain PyTorch would need over 100 GiB")
@pytest.mark.skipif(available_bytes() < 14 * 2**30, reason="needs 14 GiB of memory")
def test_elements_beyond_two_to_the_31():
    x = torch.zeros(COUNT, dtype=torch.bfloat16)
    tail = torch.linspace(-1, 1, 4099).bfloat16()
    x[-4099:] = tail
    s, state = torch.tensor([0.125]), (5, 1, 2)

    y = hdrq.ops.noise_quantize(x, s, -8, 7, hdrq.rng_state(*state))
    for e in (0, 2**31 - 1, 2**31, 2**31 + 5, COUNT - 2000, COUNT - 1):
        n = contract.uniform(state, e)
        expected = contract.noise_quantize(x[e].float().numpy(), s.numpy()[0], n, -8, 7)
        assert y[e] == torch.tensor(expected).bfloat16()
    del y

    codes = hdrq.ops.quantize(x, s, -8, 7)
    assert torch.equal(codes[-4099:], hdrq.ops.quantize(tail, s, -8, 7))
    assert codes[: 2**20].count_nonzero() == 0
