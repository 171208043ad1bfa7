"""Other codes' quantizers, written out here from their published signatures and semantics, against ours."""

import pytest
import torch
from helpers import assert_same_bits, sample

import hdrq
from hdrq.compat import functional as F

LOW, HIGH = -4, 3


def passing(value, result):
    """``result``, through which the gradient of ``value`` passes."""
    return value + (result - value).detach()


def scaled_gradient(value, factor):
    """Written so that the value keeps its bits: ``(s − s·f) + s·f``, as the codes have it, may be an ulp off."""
    return value.detach() + (value * factor - (value * factor).detach())


def qdrop(x, scale, zero_point, quant_min, quant_max, grad_factor=1.0):
    """Round, add the zero point, clamp."""
    scale = scaled_gradient(scale, grad_factor)
    q = torch.clamp(passing(x / scale, (x / scale).round()) + zero_point, quant_min, quant_max)
    return (q - zero_point) * scale


def lsq_plus(x, scale, zero_point, quant_min, quant_max, grad_factor):
    """The zero point learns too, and is rounded."""
    zero_point = scaled_gradient(passing(zero_point, zero_point.round()), grad_factor)
    return qdrop(x, scale, zero_point, quant_min, quant_max, grad_factor)


def lsq(w, alpha, g, low, high):
    """Clamp, then round."""
    alpha = scaled_gradient(alpha, g)
    v = (w / alpha).clamp(low, high)
    return passing(v, v.round()) * alpha


def brevitas(x, scale, zero_point, low, high, ste_clamp):
    """Add the zero point before rounding; the clamp may pass gradients."""
    q = passing(x / scale + zero_point, (x / scale + zero_point).round())
    q = passing(q, q.clamp(low, high)) if ste_clamp else q.clamp(low, high)
    return (q - zero_point) * scale


def auto_round(x, scale, low, high):
    """Scales of either sign."""
    return passing(x / scale, (x / scale).round()).clamp(low, high) * scale


def brecq_adaround(x, scale, zero_point, alpha, low, high):
    h = torch.clamp(torch.sigmoid(alpha) * 1.2 - 0.1, 0, 1)
    return (torch.clamp(torch.floor(x / scale) + h + zero_point, low, high) - zero_point) * scale


def compare(ours, theirs, inputs, *, bits=True):
    """Both on copies of the inputs: values bit for bit, gradients within round-off of their sums."""
    results = []
    for function in (ours, theirs):
        leaves = [t.detach().clone().requires_grad_() for t in inputs]
        y = function(*leaves)
        upstream = sample(y.shape, seed=3, special=False)
        results.append((y, torch.autograd.grad(y, leaves, upstream)))
    (y, gradients), (want, expected) = results
    if bits:
        assert_same_bits(y, want)
    else:
        torch.testing.assert_close(y, want, rtol=1e-6, atol=1e-6)
    for got, reference, given in zip(gradients, expected, inputs, strict=True):
        assert got.shape == given.shape
        torch.testing.assert_close(got, reference, rtol=1e-5, atol=2e-4)


X = sample((6, 40), special=False)
PER_TENSOR, PER_CHANNEL = torch.tensor(0.25), torch.rand(6, 1, generator=torch.Generator().manual_seed(0)) + 0.1
ZEROS = torch.tensor([[-1.0], [0.0], [1.0], [2.0], [-2.0], [0.0]])


@pytest.mark.parametrize(("scale", "zero"), [(PER_TENSOR, torch.tensor(1.0)), (PER_CHANNEL, ZEROS)])
class TestTheirs:
    def test_qdrop(self, scale, zero):
        compare(
            lambda x, s: F.fake_quantize(x, s, zero, LOW, HIGH, grad_factor=0.3),
            lambda x, s: qdrop(x, s, zero, LOW, HIGH, 0.3),
            (X, scale),
        )

    def test_lsq_plus(self, scale, zero):
        compare(
            lambda x, s, z: F.fake_quantize(x, s, z, LOW, HIGH, grad_factor=0.3),
            lambda x, s, z: lsq_plus(x, s, z, LOW, HIGH, 0.3),
            (X, scale, zero + 0.3),
        )

    def test_lsq(self, scale, zero):
        compare(lambda w, a: F.lsq(w, a, 0.1, LOW, HIGH), lambda w, a: lsq(w, a, 0.1, LOW, HIGH), (X, scale))

    @pytest.mark.parametrize("ste_clamp", [False, True])
    def test_brevitas(self, scale, zero, ste_clamp):
        gradient = "pass-through" if ste_clamp else "round-first"
        compare(
            lambda x, s, z: F.fake_quantize(
                x, s, z, LOW, HIGH, rounding="shifted", zero_point_rounding=None, gradient=gradient
            ),
            lambda x, s, z: brevitas(x, s, z, LOW, HIGH, ste_clamp),
            (X, scale, zero + 0.25),
        )

    def test_scales_of_either_sign(self, scale, zero):
        signed = scale * torch.tensor([[1.0], [-1.0], [1.0], [-1.0], [-1.0], [1.0]]) if scale.ndim else -scale
        compare(
            lambda x, s: F.fake_quantize(x, s, None, LOW, HIGH, signed_scale=True),
            lambda x, s: auto_round(x, s, LOW, HIGH),
            (X, signed),
        )

    def test_adaround(self, scale, zero):
        alpha = sample((6, 40), seed=2, special=False)
        compare(
            lambda a: F.adaround(X, scale, zero, a, LOW, HIGH),
            lambda a: brecq_adaround(X, scale, zero, a, LOW, HIGH),
            (alpha,),
            bits=False,  # its sigmoid is torch's
        )


@pytest.mark.parametrize("offset", [0.3, 0.5, -0.5, 40.0])  # to the nearest, at ties to even, and into the range
def test_torchs_own_ops_per_channel(offset):
    scale, zero = PER_CHANNEL.flatten(), ZEROS.flatten()
    compare(
        lambda x, s, z: F.fake_quantize(
            x, s, z, LOW, HIGH, 0, 0.3, rounding="reciprocal", zero_point_rounding="clamped"
        ),
        lambda x, s, z: torch._fake_quantize_learnable_per_channel_affine(x, s, z, 0, LOW, HIGH, 0.3),
        (X, scale, zero + offset),
    )
    y = F.fake_quantize(X, scale, zero.int(), LOW, HIGH, 0, rounding="reciprocal")
    assert_same_bits(y, torch.fake_quantize_per_channel_affine(X, scale, zero.int(), 0, LOW, HIGH))


@pytest.mark.parametrize(
    "scale", [0.25, torch.tensor(0.25), torch.tensor([[0.25]]), torch.tensor([0.25], dtype=torch.float16)]
)
@pytest.mark.parametrize("zero", [1, 1.0, torch.tensor(1), torch.tensor([1], dtype=torch.int8), torch.tensor([1.0])])
def test_numbers_and_tensors_of_any_dtype(scale, zero):
    assert_same_bits(F.fake_quantize(X, scale, zero, LOW, HIGH), qdrop(X, torch.tensor(0.25), 1, LOW, HIGH))


@pytest.mark.parametrize("how", ["half-even", "clamped"])
def test_a_frozen_zero_point_is_rounded_as_one_that_learns(how):
    zero = torch.tensor([1.5, -2.5, 20.0, 0.25, -0.5, 1.0])
    options = {"rounding": "reciprocal", "zero_point_rounding": how}
    frozen, learned = (
        F.fake_quantize(X, PER_CHANNEL.flatten(), z, LOW, HIGH, 0, **options)
        for z in (zero, zero.clone().requires_grad_())
    )
    assert_same_bits(frozen, learned.detach())
    rounded = zero.round() if how == "half-even" else zero.round().clamp(LOW, HIGH)
    assert_same_bits(frozen, F.fake_quantize(X, PER_CHANNEL.flatten(), rounded.int(), LOW, HIGH, 0, **options))


@pytest.mark.parametrize("order", [(0, 2, 3, 1), (3, 1, 0, 2), (1, 0, 3, 2)])
@pytest.mark.parametrize("axis", [None, 0, -2])
def test_the_memory_format_stays(order, axis):
    """Of x, of the result and of the gradient; channels last is one of them."""
    x = sample((2, 3, 4, 5), special=False)
    laid = torch.empty([x.shape[i] for i in order]).permute([order.index(i) for i in range(4)]).copy_(x)
    scale = torch.rand(1 if axis is None else x.shape[axis]) + 0.1
    results = []
    for given in (x, laid):
        leaf = given.detach().requires_grad_()
        y = F.fake_quantize(leaf, scale, None, LOW, HIGH, axis)
        (grad,) = torch.autograd.grad(y, leaf, sample(y.shape, seed=1, special=False))
        results.append((y.detach(), grad))
    for got, want in zip(results[1], results[0], strict=True):
        assert got.stride() == laid.stride() != want.stride()
        assert_same_bits(got.contiguous(), want)


def test_alpha_of_any_stride():
    alpha, scale = sample((40, 6), seed=2, special=False).t(), torch.rand(6, 4) + 0.1
    got = F.adaround(X, scale, None, alpha, LOW, HIGH)
    assert_same_bits(got, F.adaround(X, scale, None, alpha.contiguous(), LOW, HIGH))


def test_one_zero_point_serves_all_channels():
    zero = torch.tensor([[1]])
    assert_same_bits(F.fake_quantize(X, PER_CHANNEL, zero, LOW, HIGH), qdrop(X, PER_CHANNEL, 1, LOW, HIGH))


def test_gradients_return_in_the_dtype_of_the_scale():
    scale = torch.tensor([[0.25]], dtype=torch.float64, requires_grad=True)
    F.fake_quantize(X, scale, None, LOW, HIGH).sum().backward()
    assert scale.grad.dtype == torch.float64 and scale.grad.shape == (1, 1) and scale.grad.item() != 0


VIEWS = {
    "groups of the last axis": (6, 8, 5),
    "blocks of whole rows": (3, 1, 1),
    "blocks of whole rows of each matrix": (6, 2, 1),
    "columns in groups": (1, 1, 3),
    "one axis in groups": (1, 4, 1),
    "two axes": (6, 8, 1),
    "the last two axes, by broadcasting": (8, 15),
    "all elements": (6, 8, 15),
}


@pytest.mark.parametrize("shape", VIEWS.values(), ids=VIEWS)
def test_scales_in_groups_and_blocks_are_rows_of_a_view(shape):
    x, generator = sample((6, 8, 15), special=False), torch.Generator().manual_seed(1)
    scale, zero = torch.rand(shape, generator=generator) + 0.1, torch.randint(-2, 3, shape, generator=generator)

    def spread(values):
        for axis, (n, m) in enumerate(zip((1,) * (3 - len(shape)) + shape, x.shape, strict=True)):
            values = values.reshape((1,) * (3 - values.ndim) + values.shape).repeat_interleave(m // n, axis)
        return values

    compare(
        lambda x, s: F.fake_quantize(x, s, zero, LOW, HIGH),
        lambda x, s: qdrop(x, spread(s), spread(zero), LOW, HIGH),
        (x, scale),
    )


def test_blocks_that_lie_apart_are_refused_and_taken_side_by_side():
    x, scale = sample((4, 30), special=False), torch.rand(2, 3) + 0.1
    with pytest.raises(ValueError, match=r"scale must vary along one axis of some view .* blocks of 2 × 10 elements"):
        F.fake_quantize(x, scale, None, LOW, HIGH)
    blocks = x.unflatten(1, (3, 10)).unflatten(0, (2, 2)).movedim(2, 1)
    y = F.fake_quantize(blocks, scale[:, :, None, None], None, LOW, HIGH).movedim(1, 2).reshape(x.shape)
    want = qdrop(x, scale.repeat_interleave(2, 0).repeat_interleave(10, 1), 0, LOW, HIGH)
    assert_same_bits(y + 0.0, want + 0.0)


def test_what_does_not_learn_may_be_written_to_before_the_gradients():
    x, scale, zero = X.clone().requires_grad_(), torch.tensor([0.25]), torch.tensor([1.0])
    y = F.fake_quantize(x, scale, zero, LOW, HIGH) + F.fake_quantize(x, scale.fill_(0.5), zero.fill_(0.0), LOW, HIGH)
    y.sum().backward()
    inside = (((X / 0.25).round() + 1).clamp(LOW, HIGH) == (X / 0.25).round() + 1).float()
    assert torch.equal(x.grad, inside + ((X / 0.5).round().clamp(LOW, HIGH) == (X / 0.5).round()).float())


def test_noise_is_the_released_kind_and_its_state_may_be_advanced():
    rng, x = hdrq.rng_state(3), X.clone().requires_grad_()
    y = F.noise_quantize(x, 0.25, LOW, HIGH, rng)
    rng[2] += 1
    y.sum().backward()
    want = hdrq.ops.noise_quantize(X, torch.tensor([0.25]), LOW, HIGH, hdrq.rng_state(3), noise="empirical")
    assert_same_bits(y, want)
    assert torch.equal(x.grad, ((X < 0.25 * HIGH) & (X > 0.25 * LOW)).float())
    assert not torch.equal(y, F.noise_quantize(X, 0.25, LOW, HIGH, rng))


def test_all_elements_clipped_are_the_bounds_where_the_released_code_raises():
    y = F.noise_quantize(torch.full((9,), 50.0), 0.25, LOW, HIGH, hdrq.rng_state(0))
    assert y.tolist() == [0.25 * HIGH] * 9


BAD = [
    (TypeError, "x must be float32, bfloat16 or float16, got float64", {"x": X.double()}),
    (TypeError, "x must be a tensor", {"x": [1.0]}),
    (ValueError, r"scale must have one element, or broadcast .* got \(6, 7\)", {"scale": torch.ones(6, 7)}),
    (ValueError, r"scale must have one element, or broadcast .* got \(5,\)", {"scale": torch.ones(5)}),
    (ValueError, r"scale must have one element, or broadcast .* got \(0, 1\)", {"scale": torch.ones(0, 1)}),
    (
        ValueError,
        r"blocks of 1 × 2 × 1 elements lie apart: bring the axes",
        {"x": X.reshape(6, 2, 20), "scale": torch.ones(6, 1, 20)},
    ),
    (ValueError, "scale must be positive", {"scale": torch.tensor(-1.0)}),
    (TypeError, "scale must be a number, got str", {"scale": "1"}),
    (TypeError, "zero_point must be real", {"zero_point": torch.ones(1, dtype=torch.complex64)}),
    (
        ValueError,
        r"zero_point must have 1 elements, given this scale, got the shape \(6,\)",
        {"zero_point": torch.ones(6)},
    ),
    (ValueError, "zero_point must be an integer", {"zero_point": 0.5}),
    (
        ValueError,
        r"zero_point must vary along the axis of the scale, 0, got the shape \(1, 6\) beside \(6, 1\)",
        {"x": torch.ones(6, 6), "scale": torch.ones(6, 1), "zero_point": torch.zeros(1, 6)},
    ),
    (
        ValueError,
        r"zero_point must vary along the axis of the scale, 0, got the shape \(6,\)",
        {"x": torch.ones(6, 6), "scale": torch.ones(6, 1), "zero_point": torch.zeros(6)},
    ),
    (
        ValueError,
        r"scale must vary along ch_axis, 1, got the shape \(6, 1\)",
        {"scale": torch.ones(6, 1), "ch_axis": 1},
    ),
    (
        ValueError,
        "scale must have 6 elements, the length of ch_axis 0, got one",
        {"scale": torch.ones(1), "ch_axis": 0},
    ),
    (ValueError, "zero_point_rounding must be one of", {"zero_point_rounding": "up"}),
    (ValueError, r"ch_axis must be in \[-2, 1\]", {"scale": torch.ones(6), "ch_axis": 2}),
    (TypeError, "quant_min must be an int, got float", {"quant_min": 0.0}),
    (ValueError, "quant_min must be less than quant_max, got quant_min=3, quant_max=3", {"quant_min": 3}),
    (TypeError, "grad_factor must be a number, got str", {"grad_factor": "1"}),
]


@pytest.mark.parametrize(("error", "message", "change"), BAD)
def test_bad_input(error, message, change):
    arguments = {"x": X, "scale": 0.25, "zero_point": None, "quant_min": LOW, "quant_max": HIGH} | change
    with pytest.raises(error, match=message):
        F.fake_quantize(**arguments)


def test_noise_wants_its_state():
    with pytest.raises(TypeError, match="rng must be a tensor of int64, got NoneType"):
        F.noise_quantize(X, 0.25, LOW, HIGH, None)


def test_a_hard_rounding_has_no_penalty():
    with pytest.raises(ValueError, match="beta must be None where hard is true"):
        F.adaround(X, 0.25, None, torch.zeros_like(X), LOW, HIGH, hard=True, beta=2.0)
    y, penalty = F.adaround(X, 0.25, 1, torch.zeros_like(X), LOW, HIGH, beta=2.0)
    assert_same_bits(y, F.adaround(X, 0.25, 1, torch.zeros_like(X), LOW, HIGH))
    assert penalty.item() == pytest.approx(X.numel())  # h = ½ everywhere
