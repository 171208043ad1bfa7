import numpy as np
import pytest
import torch
from helpers import (
    CASES,
    FLOATS,
    assert_same_bits,
    assert_sums_close,
    backend_params,
    device_of,
    length,
    per_element,
    sample,
    scales,
)
from oracle import contract

import hdrq


def zero_points(count: int) -> torch.Tensor:
    return torch.randint(-3, 4, (count,), generator=torch.Generator().manual_seed(2)).float()


def run(backend, x, s, qmin, qmax, grad, zero_point=None, **options):
    """Output and gradients of one backend, on the CPU."""
    device = device_of(backend)
    x, s = (t.clone().to(device).requires_grad_() for t in (x, s))
    z = None if zero_point is None else zero_point.to(device)
    with hdrq.use_backend(backend):
        y = hdrq.ops.fake_quantize(x, s, qmin, qmax, zero_point=z, **options)
        y.backward(grad.to(device))
    return y.detach().cpu(), x.grad.cpu(), s.grad.cpu()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("backend", backend_params())
@pytest.mark.parametrize(("shaped", "quant_range"), CASES[::3])
def test_forward_has_the_bits_of_the_contract(backend, affine, dtype, shaped, quant_range):
    (shape, axis), (qmin, qmax) = shaped, quant_range
    x = sample(shape, dtype)
    s = scales(length(x, axis))
    z = zero_points(len(s)) if affine else torch.zeros(len(s))
    y, _, _ = run(backend, x, s, qmin, qmax, torch.ones_like(x), z if affine else None, axis=axis)
    elements = zip(x.float().flatten().numpy(), per_element(x, s, axis), per_element(x, z, axis), strict=True)
    with np.errstate(all="ignore"):
        expected = [contract.fake_quantize(*e, qmin, qmax) for e in elements]
    assert_same_bits(y, torch.tensor(np.array(expected, np.float32)).reshape(shape).to(dtype))


@pytest.mark.parametrize("rounding", ["reciprocal", "shifted"])
@pytest.mark.parametrize("backend", backend_params())
@pytest.mark.parametrize(("shaped", "quant_range"), CASES[::3])
def test_other_roundings_have_the_bits_of_the_contract(backend, rounding, shaped, quant_range):
    (shape, axis), (qmin, qmax) = shaped, quant_range
    x = sample(shape)
    s = scales(length(x, axis))
    z = zero_points(len(s)) + (0.3 if rounding == "shifted" else 0.0)
    y, _, _ = run(backend, x, s, qmin, qmax, torch.ones_like(x), z, axis=axis, rounding=rounding)
    elements = zip(x.flatten().numpy(), per_element(x, s, axis), per_element(x, z, axis), strict=True)
    with np.errstate(all="ignore"):
        expected = [contract.fake_quantize(*e, qmin, qmax, rounding) for e in elements]
    assert_same_bits(y, torch.tensor(np.array(expected, np.float32)).reshape(shape))


@pytest.mark.parametrize("gradient", ["round-first", "clamp-first", "pass-through"])
@pytest.mark.parametrize("rounding", ["quotient", "reciprocal", "shifted"])
@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize("backend", backend_params())
def test_gradients_are_those_of_the_written_out_quantizer(backend, axis, rounding, gradient):
    """Autograd differentiates it in float64: roundings pass gradients on, and so does the clamp of "pass-through"."""
    x, upstream = sample((3, 40), special=False), sample((3, 40), seed=1, special=False)
    s, z = scales(1 if axis is None else 3), zero_points(1 if axis is None else 3)
    device = device_of(backend)
    leaves = [t.clone().to(device).requires_grad_() for t in (x, s, z)]
    with hdrq.use_backend(backend):
        y = hdrq.ops.fake_quantize(
            leaves[0], leaves[1], -2, 5, zero_point=leaves[2], axis=axis, grad_scale=0.3, rounding=rounding,
            gradient=gradient,
        )  # fmt: skip
        found = torch.autograd.grad(y, leaves, upstream.to(device))

    def passing(value, result):
        return value + (result - value).detach()

    x64, s64, z64 = wide = [t.double().requires_grad_() for t in (x, s, z)]
    shape = (-1, 1) if axis == 0 else (1,)
    s64, z64 = s64.view(shape), z64.view(shape)
    v = x64 / s64
    if gradient == "clamp-first":
        q = (v + z64).clamp(-2, 5)
        q = passing(q, q.round() if rounding == "shifted" else (v.round() + z64).clamp(-2, 5))
    else:
        q = passing(v + z64, (v + z64).round()) if rounding == "shifted" else passing(v, v.round()) + z64
        q = passing(q, q.clamp(-2, 5)) if gradient == "pass-through" else q.clamp(-2, 5)
    expected = torch.autograd.grad((q - z64) * s64, wide, upstream.double())
    torch.testing.assert_close(found[0].cpu().double(), expected[0], rtol=1e-6, atol=0)
    for got, want in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(got.cpu().double(), 0.3 * want, rtol=0, atol=1e-5)


def test_a_zero_point_learns_as_torchs_own_op_has_it():
    x, upstream = sample((500,), special=False), sample((500,), seed=1, special=False)
    ours = [t.clone().requires_grad_() for t in (x, torch.tensor([0.25]), torch.tensor([2.0]))]
    theirs = [t.clone().requires_grad_() for t in ours]
    y = hdrq.ops.fake_quantize(ours[0], ours[1], -3, 4, zero_point=ours[2], rounding="reciprocal")
    want = torch._fake_quantize_learnable_per_tensor_affine(*theirs, -3, 4, 1.0)
    assert_same_bits(y, want)
    for got, expected in zip(
        torch.autograd.grad(y, ours, upstream), torch.autograd.grad(want, theirs, upstream), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_a_zero_point_that_does_not_learn_has_no_gradient():
    x, s, z = torch.ones(4), torch.ones(1, requires_grad=True), torch.zeros(1)
    hdrq.ops.fake_quantize(x, s, -4, 3, zero_point=z).sum().backward()
    assert s.grad is not None and z.grad is None


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("backend", backend_params(only=("torch", "cpp", "triton")))
@pytest.mark.parametrize(("shaped", "quant_range"), CASES)
def test_backends_agree_with_the_reference(backend, affine, dtype, shaped, quant_range):
    (shape, axis), (qmin, qmax) = shaped, quant_range
    x, grad = sample(shape, dtype), sample(shape, dtype, seed=1, special=False)
    x = x.nan_to_num(nan=0.1)  # a NaN's gradient is a NaN: its sum has no bound to check
    s = scales(length(x, axis))
    z = zero_points(len(s)) if affine else None
    options = {"axis": axis, "grad_scale": 0.3}
    y, grad_x, grad_s = run(backend, x, s, qmin, qmax, grad, z, **options)
    y_ref, grad_x_ref, grad_s_ref = run("reference", x, s, qmin, qmax, grad, z, **options)
    assert_same_bits(y, y_ref)
    assert_same_bits(grad_x, grad_x_ref)
    each = [None if t is None else torch.tensor(per_element(x, t, axis)) for t in (s, z)]
    # An element that is a channel of its own has its term for its sum.
    _, _, terms = run("reference", x.flatten(), each[0], qmin, qmax, grad.flatten(), each[1], **options | {"axis": 0})
    assert_sums_close(grad_s, grad_s_ref, terms.reshape(shape), axis)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("backend", backend_params())
@pytest.mark.parametrize(("shaped", "quant_range"), CASES)
def test_codes_are_what_fake_quantize_stands_on(backend, affine, shaped, quant_range):
    (shape, axis), (qmin, qmax) = shaped, quant_range
    device = device_of(backend)
    x = sample(shape).nan_to_num(nan=0.3).to(device)
    s = scales(length(x, axis)).to(device)
    z = zero_points(len(s)).to(device) if affine else None
    with hdrq.use_backend(backend):
        codes = hdrq.ops.quantize(x, s, qmin, qmax, zero_point=z, axis=axis)
        values = hdrq.ops.dequantize(codes, s, zero_point=z, axis=axis)
        assert_same_bits(values, hdrq.ops.fake_quantize(x, s, qmin, qmax, zero_point=z, axis=axis))
    assert codes.dtype == (torch.int8 if qmax <= 127 else torch.int16)
    assert codes.numel() == 0 or (codes.min() >= qmin and codes.max() <= qmax)


@pytest.mark.parametrize("backend", backend_params())
def test_gradients_have_their_closed_form(backend):
    x = torch.tensor([-5.0, -1.2, -0.9, 0.3, 0.8, 2.0])
    grad = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    _, grad_x, grad_s = run(backend, x, torch.tensor([0.25]), -4, 3, grad)
    # x/s = −20, −4.8, −3.6, 1.2, 3.2, 8: round to −20, −5, −4, 1, 3, 8
    assert grad_x.tolist() == [0, 0, 3, 4, 5, 0]
    assert grad_s.item() == pytest.approx(1 * -4 + 2 * -4 + 3 * -0.4 + 4 * -0.2 + 5 * -0.2 + 6 * 3, rel=1e-6)


@pytest.mark.parametrize("backend", backend_params())
def test_nan_stays_at_its_element_and_has_no_code(backend):
    device = device_of(backend)
    x, s = torch.linspace(-1, 1, 40, device=device), torch.tensor([0.1], device=device)
    x[13] = torch.nan
    with hdrq.use_backend(backend):
        assert hdrq.ops.fake_quantize(x, s, -8, 7).isnan().nonzero().flatten().tolist() == [13]
        with pytest.raises(ValueError, match=r"x must hold no NaN .*, got 1 of 40"):
            hdrq.ops.quantize(x, s, -8, 7)


@pytest.mark.parametrize("backend", backend_params())
def test_sums_do_not_drift_on_a_long_tensor(backend):
    count = 20_000 if backend == "triton" else 1_000_000
    x, grad = sample((count,), special=False), sample((count,), seed=1, special=False)
    _, _, grad_s = run(backend, x, torch.tensor([0.25]), -8, 7, grad)
    v = x.double() / 0.25
    q = v.round().clamp(-8, 7)
    terms = grad.double() * (q - torch.where(v.round() == q, v, 0.0))
    assert abs(grad_s.item() - terms.sum().item()) <= 1e-6 * terms.abs().sum().item()


BAD = [
    (ValueError, "zero_point must have 1 element, got 2", {"zero_point": torch.zeros(2)}),
    (ValueError, "zero_point must be an integer .*, got 0.5", {"zero_point": torch.tensor([0.5])}),
    (TypeError, "zero_point must be a tensor of float32, got int64", {"zero_point": torch.zeros(1, dtype=torch.int64)}),
    (ValueError, "scale must be positive and finite, got -1.0", {"scale": -torch.ones(1)}),
    (ValueError, "qmin must be less than qmax", {"qmin": 9}),
    (TypeError, "qmin must be an int, got float", {"qmin": -4.0}),
]


FORMS = [
    ("rounding must be one of 'quotient', 'reciprocal', 'shifted', got 'up'", {"rounding": "up"}),
    ("gradient must be one of 'round-first', .*, got 'none'", {"gradient": "none"}),
    ("zero_point must be a number of .*, got nan", {"rounding": "shifted", "zero_point": torch.tensor([torch.nan])}),
]


@pytest.mark.parametrize(("message", "change"), FORMS)
def test_unknown_forms_are_refused(message, change):
    with pytest.raises(ValueError, match=message):
        hdrq.ops.fake_quantize(torch.zeros(4), torch.ones(1), -4, 3, **change)


@pytest.mark.parametrize("backend", backend_params())
@pytest.mark.parametrize(("error", "message", "change"), BAD)
@pytest.mark.parametrize("op", ["fake_quantize", "quantize"])
def test_bad_input(backend, op, error, message, change):
    arguments = {"x": torch.zeros(4), "scale": torch.ones(1), "qmin": -4, "qmax": 3} | change
    with pytest.raises(error, match=message), hdrq.use_backend(backend):
        getattr(hdrq.ops, op)(**arguments)


@pytest.mark.parametrize("backend", backend_params())
@pytest.mark.parametrize("quant_range", [(-40000, 25535), (-65535, 0), (0, 65535)])
def test_ranges_of_uint16_with_any_zero_point(backend, quant_range):
    x = torch.cat([sample((257,)) * 3e4, torch.tensor(quant_range) + 0.5])
    s, z = torch.tensor([0.37]), torch.zeros(1)
    y, _, _ = run(backend, x * s, s, *quant_range, torch.ones_like(x))
    elements = zip((x * s).numpy(), per_element(x, s, None), per_element(x, z, None), strict=True)
    with np.errstate(all="ignore"):
        assert_same_bits(y, torch.tensor(np.array([contract.fake_quantize(*e, *quant_range) for e in elements])))


def test_a_range_beyond_int16_has_no_codes():
    with pytest.raises(ValueError, match="must fit int16"):
        hdrq.ops.quantize(torch.zeros(4), torch.ones(1), 0, 65535)


def test_codes_must_be_integers():
    with pytest.raises(TypeError, match="codes must be a tensor of int8 or int16, got float32"):
        hdrq.ops.dequantize(torch.zeros(4), torch.ones(1))
