"""Systematic rounding of a merge: the contract's bits, and what it promises of sums and probabilities."""

import pytest
import torch
from helpers import assert_same_bits, backend_params, device_of
from oracle import contract

import hdrq
from hdrq.ops import merge

STATE = (2**61 + 3, 2**32 - 1, 2**32 - 2)
RNG = hdrq.rng_state(*STATE)
WEIGHTS = {2: (None, (0.7, 0.3)), 3: (None, (0.5, 0.3, 0.2))}


def models(count, shape, ranges, axis, seed=0):
    """Codes, scales that differ by little (so that there are near-ties), and zero points."""
    generator = torch.Generator().manual_seed(seed)
    length = 1 if axis is None else shape[axis]
    codes = [torch.randint(low, high + 1, shape, generator=generator).short() for low, high in ranges[:count]]
    scales = [torch.rand(length, generator=generator) * 0.02 + 0.2 for _ in range(count)]
    zeros = [torch.randint(low, high + 1, (length,), generator=generator).float() for low, high in ranges[:count]]
    return codes, scales, zeros


def run(backend, codes, scales, *args, state=RNG, **options):
    device = device_of(backend)
    options = {
        name: [t.to(device) for t in value] if name == "zero_points" and value else value
        for name, value in options.items()
    }
    with hdrq.use_backend(backend):
        result = merge(
            [c.to(device) for c in codes], [s.to(device) for s in scales], *args, state.to(device), **options
        )
    return hdrq.ops.MergedTensor(*(t.cpu() for t in result))


def expanded(values, shape, axis):
    """One entry for each element."""
    view = [1] * len(shape)
    if axis is not None:
        view[axis] = -1
    return values.view(view).expand(shape).flatten().numpy()


@pytest.mark.parametrize("backend", backend_params())
@pytest.mark.parametrize("axis", [None, 0, -1])
@pytest.mark.parametrize("tau", [0.0, 0.1, 0.5])
@pytest.mark.parametrize(
    "ranges, weights",
    [
        ([(-8, 7)] * 2, None),
        ([(-8, 7)] * 2, (0.7, 0.3)),
        ([(0, 15), (-8, 7)], None),
        ([(-128, 127)] * 3, (0.5, 0.3, 0.2)),
        ([(0, 255), (0, 15), (-8, 7)], None),
    ],
)
def test_codes_have_the_bits_of_the_contract(backend, axis, tau, ranges, weights):
    """1,500 elements: a whole group and a part of another."""
    shape, count = (3, 500), len(ranges)
    codes, scales, zeros = models(count, shape, ranges, axis)
    packs = all(high - low == 15 for low, high in ranges)
    stored = [hdrq.ops.pack(c) for c in codes] if packs else codes
    options = {"weights": weights, "axis": axis, "ranges": ranges, "shape": shape, "packed": packs}
    result = run(backend, stored, scales, -8, 7, tau=tau, zero_points=zeros, **options)
    lam = [contract.f32(1 / count)] * count if weights is None else [contract.f32(w) for w in weights]
    each = [[expanded(t, shape, axis) for t in tensors] for tensors in (scales, zeros)]
    want = contract.systematic_codes(STATE, [c.flatten().tolist() for c in codes], each[0], lam, tau, -8, 7, each[1])
    got = hdrq.ops.unpack(result.codes, shape) if packs else result.codes
    assert got.flatten().tolist() == want
    assert result.similarity.shape == (0, count) and int(result.draw) == 0


@pytest.mark.parametrize("backend", backend_params(only=("torch", "cpp", "triton")))
@pytest.mark.parametrize(
    "shape, axis",
    [((), None), ((0,), None), ((1,), None), ((2049,), None), ((2, 1024), 0), ((3, 1500), 0), ((6, 3, 7, 9), 1)],
)
@pytest.mark.parametrize("packed", [True, False])
def test_backends_agree_with_the_reference(backend, shape, axis, packed):
    ranges = [(-8, 7)] * 2
    codes, scales, _ = models(2, shape, ranges, axis)
    codes = [hdrq.ops.pack(c) for c in codes] if packed else codes
    options = {"axis": axis, "shape": shape, "packed": packed}
    got, want = (run(b, codes, scales, -8, 7, **options) for b in (backend, "reference"))
    for one, other in zip(got, want, strict=True):
        assert_same_bits(one, other)


@pytest.mark.parametrize("backend", backend_params(only=("cpp",)))
def test_many_groups_and_threads(backend):
    """Past a tile of 16 groups, with an odd end, whichever way the outcomes are found, on one thread and on three."""
    shape = (17 * 1024 * 16 + 4097,)
    codes, scales, _ = models(2, shape, [(-8, 7)] * 2, None)
    want = run("reference", codes, scales, -8, 7).codes
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert_same_bits(run(backend, codes, scales, -8, 7).codes, want)
            packed = run(backend, [hdrq.ops.pack(c) for c in codes], scales, -8, 7, shape=shape, packed=True)
            assert_same_bits(hdrq.ops.unpack(packed.codes, shape), want)
    finally:
        torch.set_num_threads(before)


def near_ties(seed, count=8192):
    """Two models a step apart with scales within 1% of each other: every mean is near a tie; and the means v."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(-2, 2, (count,), generator=generator).to(torch.int8)
    codes, scales = [first, first + 1], [torch.tensor([0.200]), torch.tensor([0.201])]
    v = sum(c.double() * float(s) for c, s in zip(codes, scales, strict=True)) / float(sum(scales))
    return codes, scales, v


@pytest.mark.parametrize("seed", range(3))
def test_sums_of_groups_stay_within_one_step(seed):
    codes, scales, v = near_ties(seed)
    merged = merge(codes, scales, -8, 7, hdrq.rng_state(seed)).codes.double()
    off = (merged - v).view(-1, 1024).sum(1)
    assert off.abs().max() < 1.01  # 2⁻¹⁰ of a step for weights of 20 bits, and float32
    assert (merged - v).abs().max() < 1
    nearest = merge(codes, scales, -8, 7, hdrq.rng_state(seed), rule="half-even").codes.double()
    assert (nearest - v).view(-1, 1024).sum(1).abs().min() > 100  # one model wins everywhere
    noisy = merge(codes, scales, -8, 7, hdrq.rng_state(seed), rule="noise").codes.double()
    assert (noisy - v).view(-1, 1024).sum(1).std() > 5  # independent coins: √(1024 / 4) = 16


def test_an_element_goes_up_with_the_probability_of_its_fraction():
    codes, scales, _ = near_ties(5, 2**17)
    weights, runs = (0.45, 0.55), 500
    v = sum(w * c.double() * float(s) for w, c, s in zip(weights, codes, scales, strict=True))
    v = v / sum(w * float(s) for w, s in zip(weights, scales, strict=True))
    total = torch.zeros(2**17, dtype=torch.float64)
    for seed in range(runs):
        total += merge(codes, scales, -8, 7, hdrq.rng_state(seed), weights=weights).codes.double()
    share = v - v.floor()
    deviation = (total / runs - v) / (share * (1 - share) / runs).sqrt()
    assert deviation.abs().max() < 6
    assert abs(deviation.square().mean() - 1) < 0.5  # elements of a group share a draw: 128 groups are averaged
    assert abs(deviation.mean()) < 0.5


def test_far_from_a_tie_rounding_is_to_nearest():
    generator = torch.Generator().manual_seed(1)
    codes = [torch.randint(-8, 8, (4096,), generator=generator).to(torch.int8) for _ in range(3)]
    scales = [torch.tensor([s]) for s in (0.1, 0.17, 0.24)]
    v = sum(c.double() * float(s) for c, s in zip(codes, scales, strict=True)) / float(sum(scales))
    far = (v - v.floor() - 0.5).abs() > 0.1001
    merged = [merge(codes, scales, -8, 7, RNG, **rule).codes for rule in ({}, {"rule": "half-even"}, {"tau": 0.5})]
    assert torch.equal(merged[0][far], merged[1][far]) and far.any() and not far.all()
    assert not torch.equal(merged[0], merged[1])
    assert not torch.equal(merged[2][far], merged[1][far])


# --- invariants of every rule that draws no noise of its own


@pytest.mark.parametrize("rule", ["systematic", "half-even"])
@pytest.mark.parametrize("axis", [None, 0])
def test_a_model_merged_with_itself_gives_its_codes(rule, axis):
    codes, scales, zeros = models(1, (5, 700), [(-8, 7)], axis)
    for count in (2, 3, 7):
        merged = merge(codes * count, scales * count, -8, 7, RNG, rule=rule, axis=axis, zero_points=zeros * count)
        assert torch.equal(merged.codes, codes[0].to(torch.int8))
        assert torch.equal(merged.zero_point, zeros[0])


@pytest.mark.parametrize("rule", ["systematic", "half-even"])
def test_a_weight_of_one_gives_that_model(rule):
    codes, scales, zeros = models(3, (5, 700), [(-8, 7)] * 3, 0)
    for k in range(3):
        weights = [float(k == j) for j in range(3)]
        merged = merge(codes, scales, -8, 7, RNG, rule=rule, axis=0, weights=weights, zero_points=zeros)
        assert torch.equal(merged.codes, codes[k].to(torch.int8)) and torch.equal(merged.scale, scales[k])


@pytest.mark.parametrize("rule", ["systematic", "half-even"])
def test_the_order_of_two_models_does_not_matter(rule):
    codes, scales, zeros = models(2, (5, 700), [(-8, 7)] * 2, None)
    one = merge(codes, scales, -8, 7, RNG, rule=rule, weights=(0.7, 0.3), zero_points=zeros)
    other = merge(codes[::-1], scales[::-1], -8, 7, RNG, rule=rule, weights=(0.3, 0.7), zero_points=zeros[::-1])
    assert torch.equal(one.codes, other.codes)


# --- what is given


def test_an_option_of_the_noise_asks_for_noise():
    codes, scales, _ = near_ties(0)
    plain, asked = merge(codes, scales, -8, 7, RNG), merge(codes, scales, -8, 7, RNG, draws=2)
    assert len(plain.similarity) == 0 and len(asked.similarity) == 2
    assert torch.equal(plain.codes, merge(codes, scales, -8, 7, RNG, rule="systematic", tau=0.1).codes)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"tau": 0.6}, r"tau must be finite and in \[0, 0.5\], got 0.6"),
        ({"tau": -0.1}, r"tau must be finite and in \[0, 0.5\], got -0.1"),
        ({"tau": float("nan")}, "tau must be finite"),
        ({"rule": "random"}, "rule must be one of"),
        (
            {"rule": "systematic", "draws": 4},
            'draws must be left out but for rule "noise", got 4 for rule "systematic"',
        ),
        ({"rule": "half-even", "tau": 0.1}, 'tau must be left out but for rule "systematic", got 0.1'),
        ({"noise": "odd", "tau": 0.1}, 'tau must be left out but for rule "systematic", got 0.1 for rule "noise"'),
    ],
)
def test_bad_input(options, message):
    codes, scales, _ = near_ties(0, 8)
    with pytest.raises(ValueError, match=message):
        merge(codes, scales, -8, 7, RNG, **options)


def test_codes_out_of_range_are_refused():
    codes, scales, _ = near_ties(0, 8)
    with pytest.raises(ValueError, match=r"codes\[1\] must be in \[-2, 1\]"):
        merge(codes, scales, -2, 1, RNG, rule="systematic")
