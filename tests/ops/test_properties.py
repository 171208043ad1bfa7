"""Properties of the ops over shapes, strides, dtypes, axes and ranges that hypothesis chooses."""

import pytest
import torch
from helpers import FLOATS, assert_same_bits, backend_params, length

import hdrq
from hdrq.backends.eager import per_element

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

# A fixed sequence of cases: what passes here passes on any machine. `hdrq parity` draws others.
few = hypothesis.settings(max_examples=25, deadline=None, derandomize=True, database=None)
BACKENDS = backend_params(only=("torch", "cpp"))
RNG = hdrq.rng_state(2**63 + 11, 2**32 - 1, 5)


LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1) if x.ndim else x,
    "strided": lambda x: torch.stack([x, x + 1], -1)[..., 0],
    "offset": lambda x: torch.cat([torch.ones(1, dtype=x.dtype), x.flatten()])[1:].view(x.shape),
    "expanded": lambda x: x[:1].expand(x.shape) if x.ndim else x,
    "flipped": lambda x: x.flip(-1) if x.ndim else x,
    "channels_last": lambda x: x.to(memory_format=torch.channels_last) if x.ndim == 4 else x,
}


@st.composite
def grids(draw, dtypes=FLOATS):
    """x, scale, range and axis; x in any layout, with ties, elements outside the range, and infinities."""
    shape = draw(st.lists(st.integers(0, 9), max_size=4).map(tuple))
    axis = draw(st.none() | st.integers(-len(shape), len(shape) - 1)) if shape else None
    qmin, qmax = draw(st.sampled_from([(-2, 1), (-8, 7), (0, 15), (-3, 12), (-128, 127), (0, 255), (-2000, 900)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    step = 2.0 ** draw(st.integers(-10, 3))
    x = torch.randn(shape, generator=generator) * (qmax - qmin) * 0.4 * step
    if draw(st.booleans()):
        x = (x / step * 2).round() / 2 * step  # every other element is a tie of the first scale
    if draw(st.booleans()) and x.numel():
        x.view(-1)[-1] = draw(st.sampled_from([torch.inf, -torch.inf, -0.0, 1e-40]))
    scale = step * (1 + torch.rand(length(x, axis), generator=generator))
    scale[:1] = step
    x = LAYOUTS[draw(st.sampled_from(list(LAYOUTS)))](x.to(draw(st.sampled_from(dtypes))))
    return x, scale, qmin, qmax, axis


def zeros_or_shift(scale, qmin, qmax):
    """A zero point inside the range for each scale."""
    return (torch.arange(len(scale)) % 5 + (qmin + qmax) // 2).float()


FORWARD = {
    "noise_quantize": lambda x, s, low, high, axis: hdrq.ops.noise_quantize(x, s, low, high, RNG, axis=axis),
    "noise_quantize, empirical": lambda x, s, low, high, axis: hdrq.ops.noise_quantize(
        x, s, low, high, RNG, axis=axis, noise="empirical"
    ),
    "fake_quantize": lambda x, s, low, high, axis: hdrq.ops.fake_quantize(x, s, low, high, axis=axis),
    "fake_quantize, affine": lambda x, s, low, high, axis: hdrq.ops.fake_quantize(
        x, s, low, high, axis=axis, zero_point=zeros_or_shift(s, low, high)
    ),
    "quantize": lambda x, s, low, high, axis: hdrq.ops.quantize(x, s, low, high, axis=axis),
    "dequantize": lambda x, s, low, high, axis: hdrq.ops.dequantize(
        x.nan_to_num(posinf=3, neginf=-3).clamp(-128, 127).to(torch.int8), s, axis=axis
    ),
    "drop_mix": lambda x, s, low, high, axis: hdrq.ops.drop_mix(x, -x, 0.4, RNG),
    "merge": lambda x, s, low, high, axis: (
        hdrq.ops.merge(
            [x.nan_to_num(posinf=0, neginf=0).clamp(-8, 7).to(torch.int8).add(k).clamp(-8, 7) for k in range(3)],
            [s, s * 2, s * 3],
            -8,
            7,
            RNG,
            axis=axis,
        ).codes
    ),
}


TRAINED = ("noise_quantize", "fake_quantize", "drop_mix")


def gradients(op, x, scale, *args):
    """The result, and where the op is differentiable the gradients of x and scale."""
    if op.partition(",")[0] not in TRAINED:
        return (FORWARD[op](x, scale, *args),)
    x, scale = (t.detach().requires_grad_() for t in (x, scale))
    y = FORWARD[op](x, scale, *args)
    grads = torch.autograd.grad(y, (x, scale), torch.ones_like(y), materialize_grads=True, allow_unused=True)
    return y.detach(), *grads


@pytest.mark.parametrize("op", FORWARD)
@pytest.mark.parametrize("backend", BACKENDS)
@few
@hypothesis.given(grid=grids())
def test_every_backend_has_the_bits_of_the_reference(backend, op, grid):
    with hdrq.use_backend("reference"):
        want = gradients(op, *grid)
    with hdrq.use_backend(backend):
        got = gradients(op, *grid)
    for g, w in zip(got[:2], want[:2], strict=True):  # the gradient of the scale is a sum
        assert_same_bits(g, w)


@pytest.mark.parametrize("op", FORWARD)
@few
@hypothesis.given(grid=grids())
def test_strides_change_nothing(op, grid):
    x, *rest = grid
    for got, want in zip(gradients(op, x, *rest), gradients(op, x.contiguous(), *rest), strict=True):
        assert_same_bits(got, want)


@pytest.mark.parametrize("affine", [False, True])
@few
@hypothesis.given(grid=grids(dtypes=(torch.float32,)))
def test_codes_and_back_are_fake_quantize(affine, grid):
    x, s, low, high, axis = grid
    z = zeros_or_shift(s, low, high) if affine else None
    codes = hdrq.ops.quantize(x, s, low, high, axis=axis, zero_point=z)
    assert codes.numel() == 0 or (codes.min() >= low and codes.max() <= high)
    y = hdrq.ops.fake_quantize(x, s, low, high, axis=axis, zero_point=z)
    assert_same_bits(hdrq.ops.dequantize(codes, s, axis=axis, zero_point=z) + 0.0, y + 0.0)  # a code has no −0


@few
@hypothesis.given(grid=grids(dtypes=(torch.float32,)))
def test_what_is_on_the_grid_stays(grid):
    y = hdrq.ops.fake_quantize(*grid[:4], axis=grid[4])
    assert_same_bits(hdrq.ops.fake_quantize(y, *grid[1:4], axis=grid[4]), y)


@pytest.mark.parametrize("noise", ["uniform", "empirical"])
@few
@hypothesis.given(grid=grids(dtypes=(torch.float32,)))
def test_noise_is_half_a_step_at_most_inside_and_the_bound_outside(noise, grid):
    x, s, low, high, axis = grid
    y = hdrq.ops.noise_quantize(x, s, low, high, RNG, noise=noise, axis=axis)
    each = per_element(s, x.ndim, axis)
    above, below = x >= high * each, x <= low * each
    assert_same_bits(y[above], (high * each).expand(x.shape)[above])
    assert_same_bits(y[below], (low * each).expand(x.shape)[below])
    rounding = torch.maximum(x.abs(), y.abs()) * 2.0**-23
    assert ((y - x).abs() <= each / 2 + rounding)[~above & ~below].all()


@pytest.mark.parametrize("dtype", FLOATS)
@few
@hypothesis.given(grid=grids(), p=st.floats(0, 1))
def test_drop_mix_picks_from_one_or_the_other(dtype, grid, p):
    a = grid[0].to(dtype)
    b = torch.full_like(a, 7)
    y = hdrq.ops.drop_mix(a, b, p, RNG)
    assert ((y == a) | (y == b)).all()
    assert_same_bits(hdrq.ops.drop_mix(a, b, 1.0, RNG), a)
    assert_same_bits(hdrq.ops.drop_mix(a, b, 0.0, RNG), b)


@pytest.mark.parametrize("backend", backend_params())
@pytest.mark.parametrize("axis", [None, 0, 1, 2])
@pytest.mark.parametrize("op", FORWARD)
def test_a_tensor_without_elements_passes_whichever_axis_is_empty(backend, op, axis):
    x = torch.zeros(3, 0, 2)
    with hdrq.use_backend(backend):
        y, *grads = gradients(op, x, torch.ones(length(x, axis)), -8, 7, axis)
    assert y.shape == x.shape
    assert not any(g.any() for g in grads)
