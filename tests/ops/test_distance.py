import pytest
import torch
from helpers import FLOATS, backend_params, device_of, sample

import hdrq

BACKENDS = backend_params()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(1,), (1029,), (16, 3, 3, 3)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_norm_and_gradient(backend, shape, dtype):
    w, w_src = (sample(shape, dtype, seed=seed, special=False).to(device_of(backend)) for seed in (0, 1))
    w.requires_grad_()
    with hdrq.use_backend(backend):
        distance = hdrq.ops.source_distance(w, w_src)
        (3 * distance).backward()
    difference = (w.detach().float() - w_src.float()).double()
    assert distance.dtype == torch.float32
    assert distance.item() == pytest.approx(difference.norm().item(), rel=1e-6)
    torch.testing.assert_close(w.grad, (3 * difference / difference.norm()).to(dtype))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_at_the_source_is_zero(backend):
    w = torch.ones(5, requires_grad=True, device=device_of(backend))
    with hdrq.use_backend(backend):
        hdrq.ops.source_distance(w, torch.ones_like(w)).backward()
    assert w.grad.tolist() == [0.0] * 5


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"w_src must have the shape of w, \(2, 3\), got \(3, 2\)"):
        hdrq.ops.source_distance(torch.zeros(2, 3), torch.zeros(3, 2))
