import math

import numpy as np
import pytest
import torch
from helpers import CASES, FLOATS, assert_same_bits, backend_params, device_of, length, sample, scales
from oracle import contract

import hdrq
from hdrq.backends.reference.elementary import power, sigmoid

ALPHAS = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 2.3978953, -2.3978953, 100.0, -100.0])


def alphas(shape) -> torch.Tensor:
    alpha = torch.randn(shape, generator=torch.Generator().manual_seed(5)) * 2
    flat = alpha.view(-1)
    n = min(len(ALPHAS), flat.numel() // 2)
    flat[flat.numel() - n :] = ALPHAS[:n]
    return alpha


def each(x, s, axis):
    shape = [1] * x.ndim
    if axis is not None:
        shape[axis] = -1
    return s.reshape(shape).expand(x.shape).flatten().numpy()


def zero_points(count: int) -> torch.Tensor:
    return torch.randint(-3, 4, (count,), generator=torch.Generator().manual_seed(2)).float()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("backend", backend_params())
@pytest.mark.parametrize(("shaped", "quant_range"), CASES[1::4])
def test_forward_has_the_bits_of_the_contract(backend, hard, affine, dtype, shaped, quant_range):
    (shape, axis), (qmin, qmax) = shaped, quant_range
    x, alpha = sample(shape, dtype), alphas(shape)
    s, device = scales(length(x, axis)), device_of(backend)
    with hdrq.use_backend(backend):
        options = {"axis": axis, "hard": hard, "zero_point": zero_points(len(s)).to(device) if affine else None}
        y = hdrq.ops.adaround(*(t.to(device) for t in (x, s, alpha)), qmin, qmax, **options)
    z = each(x, zero_points(len(s)) if affine else torch.zeros(len(s)), axis)
    with np.errstate(all="ignore"):
        elements = zip(x.float().flatten().numpy(), each(x, s, axis), alpha.flatten().numpy(), z, strict=True)
        expected = [contract.adaround(*element, qmin, qmax, hard, shift) for *element, shift in elements]
    assert_same_bits(y, torch.tensor(np.array(expected, np.float32)).reshape(shape).to(dtype))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("beta", [2.0, 7.5, 20.0])
@pytest.mark.parametrize(("shape", "axis"), [((1029,), None), ((5, 4, 3), 1), ((2, 1100), 0), ((0,), None)])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("backend", backend_params())
def test_penalty_and_gradient(backend, affine, shape, axis, beta, dtype):
    x, alpha, device = sample(shape, dtype, special=False), alphas(shape).nan_to_num(0, 3, -3), device_of(backend)
    s, grad = scales(length(x, axis)), sample(shape, dtype, seed=1, special=False)
    own, z = alpha.clone().to(device).requires_grad_(), zero_points(len(s)) * affine
    options = {"axis": axis, "zero_point": z.to(device) if affine else None}
    with hdrq.use_backend(backend):
        y, penalty = hdrq.ops.adaround_regularized(x.to(device), s.to(device), own, -8, 7, beta, **options)
        torch.autograd.backward([y, penalty], [grad.to(device), torch.tensor(0.01, device=device)])
        assert_same_bits(y, hdrq.ops.adaround(x.to(device), s.to(device), own, -8, 7, **options))
    wide, factor = alpha.double().requires_grad_(), torch.from_numpy(each(x, s, axis)).reshape(shape).double()
    u = 1.2 * torch.sigmoid(wide) - 0.1
    h = torch.where((u - u.round()).abs() < 1e-6, u.round(), u).clamp(0, 1)  # the corner is float32's to decide
    z = torch.from_numpy(each(x, z, axis)).reshape(shape).double()
    q = (torch.floor((x.float() / factor.float()).double()) + h + z).clamp(-8, 7) - z
    terms = 1 - (2 * h - 1).abs() ** beta
    ((q * factor * grad.double()).sum() + 0.01 * terms.sum()).backward()
    assert penalty.dtype == torch.float32
    assert penalty.item() == pytest.approx(terms.sum().item(), abs=2e-6 * max(1, terms.numel()))
    corner = (u - u.round()).abs() < 1e-6
    torch.testing.assert_close(own.grad.cpu().double()[~corner], wide.grad[~corner], rtol=1e-5, atol=1e-6)


def test_hard_rounding_and_the_tensors_that_stay_have_no_gradient():
    x, s, alpha = (t.requires_grad_() for t in (torch.randn(9), torch.ones(1), torch.randn(9)))
    hdrq.ops.adaround(x, s, alpha, -8, 7).sum().backward()
    assert alpha.grad is not None
    assert x.grad is None
    assert s.grad is None
    alpha.grad = None
    hdrq.ops.adaround(x, s, alpha, -8, 7, hard=True).sum().backward()
    assert alpha.grad is None


def test_soft_rounding_starts_at_the_weight_and_can_be_learned_from_there():
    x, s = torch.linspace(-1, 1, 1001), torch.tensor([0.25])
    alpha = hdrq.ops.adaround_init(x, s).requires_grad_()
    y = hdrq.ops.adaround(x, s, alpha, -8, 7)
    assert ((y - x).abs() <= 0.25 * 2**-10 + 1e-6).all()
    y.sum().backward()
    assert (alpha.grad > 0).all()  # also where x is on the grid


def test_hard_rounding_starts_at_the_nearest_point_and_ties_at_the_even_one():
    x, s = torch.cat([torch.arange(-31, 32) / 8, torch.linspace(-4, 3, 999)]), torch.tensor([0.25])
    nearest = hdrq.ops.fake_quantize(x, s, -8, 7)
    assert torch.equal(hdrq.ops.adaround(x, s, hdrq.ops.adaround_init(x, s), -8, 7, hard=True), nearest)


def test_beta_may_be_a_tensor_and_change_in_place():
    x, s, alpha, beta = torch.randn(9), torch.ones(1), torch.randn(9), torch.tensor(20.0)
    first = hdrq.ops.adaround_regularized(x, s, alpha, -8, 7, beta)[1]
    beta.fill_(2.0)
    second = hdrq.ops.adaround_regularized(x, s, alpha, -8, 7, beta)[1]
    assert first > second == hdrq.ops.adaround_regularized(x, s, alpha, -8, 7, 2.0)[1]


def test_the_sigmoid_is_within_two_ulp():
    x = np.linspace(-16, 16, 400_001).astype(np.float32)
    exact = 1 / (1 + np.exp(-x.astype(np.float64)))
    assert (np.abs(sigmoid(x) - exact) / np.spacing(exact.astype(np.float32))).max() <= 2


@pytest.mark.parametrize("p", [0.0, 1.0, 2.4, 20.0])
def test_a_power_is_as_close_as_its_exponent_allows(p):
    t = np.linspace(0, 4, 100_001).astype(np.float32)[1:]
    exact = t.astype(np.float64) ** p
    got, large = power(t, np.float32(p)), exact > 1e-37
    bound = 2e-7 * (1 + p * np.abs(np.log2(t.astype(np.float64))))
    assert (np.abs(got - exact) <= bound * exact)[large].all()
    ends = np.array([0, 1, 1e-40, np.nan, np.inf], np.float32)
    with np.errstate(all="ignore"):
        assert power(ends, np.float32(2.4)).tolist()[:3] == [0, 1, 0]
        assert math.isnan(power(ends, np.float32(2.4))[3])
        assert power(ends, np.float32(2.4))[4] == np.inf


X, S = torch.ones(4, 2), torch.ones(1)
BAD = [
    (TypeError, "alpha must be a tensor of float32, got bfloat16", {"alpha": X.bfloat16()}),
    (ValueError, r"alpha must have the shape of x, \(4, 2\), got \(2, 4\)", {"alpha": X.T}),
    (ValueError, "scale must be positive and finite, got -1.0", {"scale": -S}),
    (ValueError, r"beta must be finite and in \[1, inf\], got 0.5", {"beta": 0.5}),
    (ValueError, r"beta must be finite and in \[1, inf\], got nan", {"beta": torch.tensor(torch.nan)}),
    (ValueError, "beta must have 1 element, got 2", {"beta": torch.ones(2)}),
    (ValueError, "qmin must be less than qmax", {"qmin": 7}),
]


@pytest.mark.parametrize(("error", "message", "change"), BAD)
def test_bad_input(error, message, change):
    arguments = {"x": X, "scale": S, "alpha": X, "qmin": -8, "qmax": 7, "beta": 2.0} | change
    with pytest.raises(error, match=message):
        hdrq.ops.adaround_regularized(**arguments)
