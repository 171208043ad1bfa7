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

MODES = ("uniform", "empirical")
STATE = (2**63 - 5, 3, 9)


def run(backend, x, s, qmin, qmax, grad, **options):
    """Output and gradients of one backend, on the CPU."""
    device = device_of(backend)
    x, s = (t.clone().to(device).requires_grad_() for t in (x, s))
    with hdrq.use_backend(backend):
        y = hdrq.ops.noise_quantize(x, s, qmin, qmax, hdrq.rng_state(*STATE, device=device), **options)
        y.backward(grad.to(device))
    return y.detach().cpu(), x.grad.cpu(), s.grad.cpu()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", backend_params())
@pytest.mark.parametrize(("shaped", "quant_range"), CASES[::3])
def test_forward_has_the_bits_of_the_contract(backend, mode, dtype, shaped, quant_range):
    (shape, axis), (qmin, qmax) = shaped, quant_range
    x = sample(shape, dtype)
    s = scales(length(x, axis))
    y, _, _ = run(backend, x, s, qmin, qmax, torch.ones_like(x), noise=mode, axis=axis)
    wide, each = x.float().flatten().numpy(), per_element(x, s, axis)
    with np.errstate(all="ignore"):
        counts = contract.histogram(wide, each, qmin, qmax) if mode == "empirical" else None
        expected = [
            contract.noise_quantize(
                wide[e],
                each[e],
                contract.uniform(STATE, e) if counts is None else contract.empirical(STATE, e, counts),
                qmin,
                qmax,
            )
            for e in range(x.numel())
        ]
    assert_same_bits(y, torch.tensor(np.array(expected, np.float32)).reshape(shape).to(dtype))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", backend_params(only=("torch", "cpp", "triton")))
@pytest.mark.parametrize(("shaped", "quant_range"), CASES)
def test_backends_agree_with_the_reference(backend, mode, dtype, shaped, quant_range):
    (shape, axis), (qmin, qmax) = shaped, quant_range
    x, grad = sample(shape, dtype), sample(shape, dtype, seed=1, special=False)
    s = scales(length(x, axis))
    options = {"noise": mode, "axis": axis, "grad_scale": 0.3}
    y, grad_x, grad_s = run(backend, x, s, qmin, qmax, grad, **options)
    y_ref, grad_x_ref, grad_s_ref = run("reference", x, s, qmin, qmax, grad, **options)
    assert_same_bits(y, y_ref)
    assert_same_bits(grad_x, grad_x_ref)
    each = torch.tensor(per_element(x, s, axis))  # an element that is a channel of its own: its sum is its term
    _, _, terms = run("reference", x.flatten(), each, qmin, qmax, grad.flatten(), **options | {"axis": 0})
    assert_sums_close(grad_s, grad_s_ref, terms.reshape(shape), axis)


@pytest.mark.parametrize("backend", backend_params())
def test_gradients_have_their_closed_form(backend):
    x = torch.tensor([-5.0, -1.0, -0.9, 0.3, 0.74, 0.75, 2.0])
    grad = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0])
    s = torch.tensor([0.25])
    _, grad_x, grad_s = run(backend, x, s, -4, 3, grad, grad_scale=0.5)
    n = [float(contract.uniform(STATE, e)) for e in range(7)]
    assert grad_x.tolist() == [0, 0, 3, 4, 5, 0, 0]
    expected = 1 * -4 + 2 * -4 + 3 * n[2] + 4 * n[3] + 5 * n[4] + 6 * 3 + 7 * 3
    assert grad_s.item() == pytest.approx(0.5 * expected, rel=1e-6)


@pytest.mark.parametrize("backend", backend_params())
@pytest.mark.parametrize("mode", MODES)
def test_strides_do_not_matter(backend, mode):
    x = sample((6, 5, 4, 3)).to(memory_format=torch.channels_last)[:, 1:]
    s, grad = scales(6), torch.ones(1).expand(x.shape)
    for got, want in zip(
        run(backend, x, s, -8, 7, grad, noise=mode, axis=0),
        run(backend, x.contiguous(), s, -8, 7, grad.contiguous(), noise=mode, axis=0),
        strict=True,
    ):
        assert_same_bits(got, want)


@pytest.mark.parametrize("backend", backend_params())
def test_nan_stays_at_its_element(backend):
    x = torch.linspace(-1, 1, 40)
    clean, _, _ = run(backend, x, torch.tensor([0.1]), -8, 7, torch.ones(40))
    x[13] = torch.nan
    y, _, _ = run(backend, x, torch.tensor([0.1]), -8, 7, torch.ones(40))
    assert y.isnan().nonzero().flatten().tolist() == [13]
    assert_same_bits(y[torch.arange(40) != 13], clean[torch.arange(40) != 13])


@pytest.mark.parametrize("backend", backend_params(only=("torch", "cpp")))
class TestStatistics:
    COUNT = 200_000

    def noise(self, backend, stream=0, step=0, **options):
        x = torch.zeros(self.COUNT) if "x" not in options else options.pop("x")
        with hdrq.use_backend(backend):
            y = hdrq.ops.noise_quantize(x, torch.ones(1), -128, 127, hdrq.rng_state(1, stream, step), **options)
        return (y - x).double()

    def test_mean_and_variance_are_those_of_a_uniform(self, backend):
        n = self.noise(backend)
        assert n.min() >= -0.5
        assert n.max() < 0.5
        assert abs(n.mean()) < 5 / np.sqrt(12 * self.COUNT)
        assert abs(n.var() - 1 / 12) < 5 * np.sqrt(1 / 180 / self.COUNT)

    def test_steps_and_streams_are_independent(self, backend):
        first = self.noise(backend)
        for other in (self.noise(backend, step=1), self.noise(backend, stream=1), first.roll(1)):
            assert abs(torch.corrcoef(torch.stack([first, other]))[0, 1]) < 5 / np.sqrt(self.COUNT)

    def test_empirical_noise_reproduces_the_histogram(self, backend):
        generator = torch.Generator().manual_seed(3)
        x = torch.randint(-100, 100, (self.COUNT,), generator=generator) + 0.4 * torch.rand(
            self.COUNT, generator=generator
        )
        error = (x.round() - x).double()
        n = self.noise(backend, x=x, noise="empirical")
        drawn, wanted = (torch.histc(v, 64, -0.5, 0.5) / self.COUNT for v in (n, error))
        assert (drawn - wanted).abs().max() < 5 * np.sqrt(1 / 25 / self.COUNT)
        assert n.max() <= 2 / 256  # the errors lie in [−0.4, 0]


def test_a_tensor_that_is_clipped_throughout_has_no_empirical_noise():
    y = hdrq.ops.noise_quantize(torch.full((5,), 9.0), torch.ones(1), -4, 3, hdrq.rng_state(0), noise="empirical")
    assert y.tolist() == [3.0] * 5


def test_noise_differs_between_steps_and_repeats_for_a_state():
    x, s = torch.zeros(64), torch.ones(1)
    rng = hdrq.rng_state(5)
    first = hdrq.ops.noise_quantize(x, s, -4, 3, rng)
    assert torch.equal(first, hdrq.ops.noise_quantize(x, s, -4, 3, rng))
    rng[2] += 1
    assert not torch.equal(first, hdrq.ops.noise_quantize(x, s, -4, 3, rng))


def test_rng_must_not_advance_before_the_backward_pass():
    x, rng = torch.zeros(8, requires_grad=True), hdrq.rng_state(5)
    y = hdrq.ops.noise_quantize(x, torch.ones(1), -4, 3, rng)
    rng[2] += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


BAD = [
    (TypeError, "x must be a tensor of float32 or bfloat16 or float16, got float64", {"x": torch.zeros(4).double()}),
    (TypeError, "x must be a tensor of .*, got int64", {"x": torch.zeros(4, dtype=torch.int64)}),
    (TypeError, "scale must be a tensor of float32, got float64", {"scale": torch.ones(1).double()}),
    (ValueError, "scale must have 1 element, got 2", {"scale": torch.ones(2)}),
    (ValueError, "scale must have 4 elements, the length of axis 0, got 3", {"scale": torch.ones(3), "axis": 0}),
    (ValueError, "scale must be positive and finite, got 0.0", {"scale": torch.zeros(1)}),
    (ValueError, "scale must be positive and finite, got -1.0", {"scale": -torch.ones(1)}),
    (ValueError, "scale must be positive and finite, got nan", {"scale": torch.tensor([torch.nan])}),
    (ValueError, "scale must be positive and finite, got inf", {"scale": torch.tensor([torch.inf])}),
    (ValueError, "scale must be on cpu, where x is, got meta", {"scale": torch.ones(1, device="meta")}),
    (ValueError, "qmin must be less than qmax, got qmin=3, qmax=3", {"qmin": 3}),
    (ValueError, "qmax must be in .*, got 70000", {"qmax": 70000}),
    (ValueError, "axis must be in .*, got 1", {"axis": 1}),
    (TypeError, "rng must be a tensor of int64, got int32", {"rng": torch.zeros(3, dtype=torch.int32)}),
    (ValueError, r"rng must have shape \(3,\).*got \(4,\)", {"rng": torch.zeros(4, dtype=torch.int64)}),
    (ValueError, "rng must be on cpu, where x is, got meta", {"rng": torch.zeros(3, dtype=torch.int64, device="meta")}),
    (ValueError, "noise must be one of 'uniform', 'empirical', got 'normal'", {"noise": "normal"}),
    (ValueError, "grad_scale must be finite, got nan", {"grad_scale": float("nan")}),
]


@pytest.mark.parametrize("backend", backend_params())
@pytest.mark.parametrize(("error", "message", "change"), BAD)
def test_bad_input(backend, error, message, change):
    arguments = {"x": torch.zeros(4), "scale": torch.ones(1), "qmin": -4, "qmax": 3, "rng": hdrq.rng_state(0)} | change
    with pytest.raises(error, match=message), hdrq.use_backend(backend):
        hdrq.ops.noise_quantize(**arguments)
