"""Scales of groups: neighbours along the last axis share one. A group of one element is a scale for each element."""

import pytest
import torch
from helpers import assert_same_bits, backend_params, device_of, sample, scales

import hdrq
from hdrq import ops

SHAPE, SIZE = (3, 2, 12), 4
GRID = (3, 2, 3)  # the shape of its scales
LOW, HIGH = -8, 7


def grid(seed=0):
    return scales(18, seed).view(GRID), torch.arange(18).remainder(5).sub(2).float().view(GRID)


def each(values):
    """The number of each group for each of its elements."""
    return values.repeat_interleave(SIZE, -1)


@pytest.fixture(params=backend_params())
def device(request):
    with hdrq.use_backend(request.param):
        yield device_of(request.param)


def learned(op, device, s, size, upstream, z=None):
    """Output, gradient of x and of the scales: summed over groups, in the order of magnitude of their terms."""
    x = sample(SHAPE, special=False).to(device).requires_grad_()
    s = s.clone().to(device).requires_grad_()
    y = op(x, s, None if z is None else z.to(device), size)
    y.backward(upstream.to(device))
    return y.detach().cpu(), x.grad.cpu(), s.grad.cpu()


def noisy(noise):
    def op(x, s, z, size):
        return ops.noise_quantize(x, s, LOW, HIGH, hdrq.rng_state(3, device=x.device), noise=noise, group_size=size)

    return op


def dropped(x, s, z, size):
    rng = hdrq.rng_state(3, device=x.device)
    return ops.fake_quantize(x, s, LOW, HIGH, zero_point=z, group_size=size, keep=0.7, rng=rng)


def many(x, s, z, size):
    state = [hdrq.rng_state(3, device=x.device)]
    (y,), d = ops.quantize_weights([x], [s], [(LOW, HIGH)], sources=[x.detach() + 1], rngs=state, group_size=size)
    return y + 0 * d


@pytest.mark.parametrize("op", [noisy("uniform"), noisy("empirical"), dropped, many])
def test_a_group_is_its_elements_with_one_scale(device, op):
    (s, z), upstream = grid(), sample(SHAPE, seed=1, special=False)
    y, grad_x, grad_s = learned(op, device, s, SIZE, upstream, z)
    want = learned(op, device, each(s), 1, upstream, each(z))
    assert_same_bits(y, want[0])
    assert_same_bits(grad_x, want[1])
    assert grad_s.shape == GRID
    torch.testing.assert_close(grad_s, want[2].unflatten(-1, (-1, SIZE)).sum(-1), rtol=1e-5, atol=1e-6)


def test_a_whole_row_is_a_channel(device):
    x, s = sample((5, 12)).to(device), scales(5).to(device)
    y = ops.fake_quantize(x, s[:, None], LOW, HIGH, group_size=12)
    assert_same_bits(y, ops.fake_quantize(x, s, LOW, HIGH, axis=0))


def test_codes_and_back(device):
    (s, z), x = grid(), sample(SHAPE, special=False)
    codes = ops.quantize(x.to(device), s.to(device), LOW, HIGH, zero_point=z.to(device), group_size=SIZE)
    want = (x / each(s)).round().add(each(z)).clamp(LOW, HIGH)
    assert_same_bits(codes, want.to(torch.int8))
    back = ops.dequantize(codes, s.to(device), zero_point=z.to(device), group_size=SIZE)
    assert_same_bits(back, (want - each(z)) * each(s))


def test_adaround(device):
    (s, z), x = grid(), sample(SHAPE, special=False)
    alpha = ops.adaround_init(x.to(device), s.to(device), group_size=SIZE)
    assert_same_bits(alpha, ops.adaround_init(x, each(s), group_size=1))
    alpha.requires_grad_()
    args = (x.to(device), s.to(device), alpha, LOW, HIGH)
    y, penalty = ops.adaround_regularized(*args, 3.0, zero_point=z.to(device), group_size=SIZE)
    assert_same_bits(ops.adaround(*args, zero_point=z.to(device), group_size=SIZE), y)
    hard = ops.adaround(*args, zero_point=z.to(device), group_size=SIZE, hard=True)
    assert_same_bits(hard, ((x / each(s)).round().add(each(z)).clamp(LOW, HIGH) - each(z)) * each(s))
    (y.sum() + penalty).backward()
    own = alpha.detach().clone().requires_grad_()
    args = (args[0], each(s).to(device), own, LOW, HIGH)
    want, theirs = ops.adaround_regularized(*args, 3.0, zero_point=each(z).to(device), group_size=1)
    (want.sum() + theirs).backward()
    assert_same_bits(y, want)
    assert_same_bits(alpha.grad, own.grad)


@pytest.mark.parametrize("search", [ops.search_scale, ops.search_affine])
def test_each_group_is_searched_by_itself(device, search):
    x = sample((2, 12), special=False).to(device) * torch.tensor([1.0, 0.2, 5.0]).repeat_interleave(4).to(device)
    found = search(x, LOW, HIGH, candidates=10, group_size=4)
    parts = [search(part, LOW, HIGH, candidates=10) for part in x.reshape(6, 4)]
    for k, got in enumerate(found if isinstance(found, tuple) else (found,)):
        want = [part[k] if isinstance(part, tuple) else part for part in parts]
        assert_same_bits(got, torch.cat(want).view(2, 3))


@pytest.mark.parametrize("rule", ["systematic", "noise", "half-even"])
@pytest.mark.parametrize("packed", [False, True])
def test_merging(device, rule, packed):
    """With one scale for each element, and packed or not, codes are the same; grids are shaped as the groups."""
    codes = [torch.randint(LOW, HIGH + 1, SHAPE, generator=torch.Generator().manual_seed(k)).char() for k in range(2)]
    (s0, z0), (s1, z1) = grid(), grid(1)
    given = [ops.pack(c) for c in codes] if packed else codes

    def merge(codes, size, spread, **options):
        tensors = [[spread(t).to(device) for t in pair] for pair in ((s0, s1), (z0, z1))]
        rng = hdrq.rng_state(5, device=device)
        codes = [c.to(device) for c in codes]
        return ops.merge(
            codes, tensors[0], LOW, HIGH, rng, rule=rule, zero_points=tensors[1], group_size=size, **options
        )

    got = merge(given, SIZE, lambda t: t, **({"shape": SHAPE, "packed": True} if packed else {}))
    want = merge(codes, 1, each)
    assert_same_bits(ops.unpack(got.codes, SHAPE, signed=True) if packed else got.codes, want.codes)
    assert_same_bits(each(got.scale), want.scale)
    assert_same_bits(each(got.zero_point), want.zero_point)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_size": 5}, r"group_size must divide the last axis of x, got 5 for the shape \(3, 2, 12\)"),
        ({"group_size": 0}, r"group_size must be in \[1, 2147483647\], got 0"),
        ({"group_size": 4, "axis": 0}, "axis must be None with a group_size"),
        ({"group_size": 6}, "scale must have 12 elements, one for each group of 6, got 18"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        ops.fake_quantize(sample(SHAPE), grid()[0], LOW, HIGH, **options)


def test_refusals_of_a_merge():
    codes, (s, _) = [torch.zeros(SHAPE, dtype=torch.int8)] * 2, grid()
    with pytest.raises(ValueError, match=r"scales\[1\] must have 18 elements, one for each group of 4, got 1"):
        ops.merge(codes, [s, s.new_ones(1)], LOW, HIGH, hdrq.rng_state(0), group_size=4)
    with pytest.raises(ValueError, match=r"codes\[1\] must have the shape of codes\[0\]"):
        ops.merge([codes[0], codes[0].view(6, 12)[:3]], [s, s], LOW, HIGH, hdrq.rng_state(0), group_size=4)


def test_tensors_without_elements_and_without_axes():
    x = torch.empty(3, 0, 4)
    assert ops.fake_quantize(x, torch.empty(3, 0, 2), LOW, HIGH, group_size=2).shape == x.shape
    assert ops.search_scale(x, LOW, HIGH, group_size=2).shape == (3, 0, 2)
    with pytest.raises(ValueError, match=r"group_size must divide the last axis of x, got 1 for the shape \(\)"):
        ops.fake_quantize(torch.tensor(1.0), torch.ones(1), LOW, HIGH, group_size=1)
