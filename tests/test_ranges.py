import pytest
import torch
from helpers import FLOATS, backend_params, sample

import hdrq


def error(x, scale, qmin, qmax, norm=2.4):
    return (hdrq.ops.fake_quantize(x, scale, qmin, qmax) - x).abs().double().pow(norm).sum().item()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("qmin", "qmax"), [(-8, 7), (0, 7), (-2, 1)])
@pytest.mark.parametrize("backend", backend_params(only=("reference", "torch")))
def test_no_threshold_has_a_smaller_error(backend, qmin, qmax, dtype):
    x = sample((2000,), dtype, special=False)
    x = x.abs() if qmin == 0 else x
    with hdrq.use_backend(backend):
        scale = hdrq.ops.search_scale(x, qmin, qmax)
    x = x.float()
    levels = (qmax - qmin) / 2 if qmin < 0 else qmax
    best = min(error(x, (x.abs().max() * i / 100 / levels).reshape(1), qmin, qmax) for i in range(1, 101))
    assert error(x, scale, qmin, qmax) <= best * (1 + 1e-5)


@pytest.mark.parametrize("backend", backend_params(only=("reference", "torch")))
def test_each_channel_has_the_scale_it_would_have_alone(backend):
    x = sample((4, 50, 3), special=False) * torch.tensor([0.1, 1.0, 10.0])
    with hdrq.use_backend(backend):
        together = hdrq.ops.search_scale(x, -4, 3, axis=-1)
        alone = [hdrq.ops.search_scale(x[..., i], -4, 3) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone))


@pytest.mark.parametrize("backend", backend_params(only=("reference", "torch")))
@pytest.mark.parametrize("x", [torch.zeros(5), torch.zeros(0), torch.full((3,), 1e-45), torch.ones(4), -torch.ones(())])
@pytest.mark.parametrize("qmin", [-8, 0])
def test_a_constant_has_a_positive_finite_scale(backend, x, qmin):
    with hdrq.use_backend(backend):
        scale = hdrq.ops.search_scale(x, qmin, 7)
    assert scale.shape == (1,)
    assert 0 < scale.item() < torch.inf


BAD = [
    (ValueError, "norm must be over 0, got 0", {"norm": 0}),
    (ValueError, r"candidates must be in \[1, \d+\], got 0", {"candidates": 0}),
    (ValueError, "x must be finite to search its scale, got 1 ", {"x": torch.tensor([1.0, torch.nan])}),
]


@pytest.mark.parametrize(("error", "message", "change"), BAD)
def test_bad_input(error, message, change):
    with pytest.raises(error, match=message):
        hdrq.ops.search_scale(**({"x": torch.ones(3), "qmin": -8, "qmax": 7} | change))
