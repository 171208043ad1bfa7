"""Merges to compare with: naive rules, ties known by hand, and means rounded anew."""

import numpy as np
import pytest
import torch

import hdrq
from hdrq.baselines import RULES, SAMPLED, compare, float_then_round, merge_rule

RNG = hdrq.rng_state(0)


def int8(*values):
    return torch.tensor(values, dtype=torch.int8)


def floats(*values):
    return torch.tensor(values, dtype=torch.float32)


TIES = [int8(0, 1, 0, -1, 2), int8(1, 2, -1, -2, 2)]  # ½, 1½, −½, −1½, 2


@pytest.mark.parametrize(
    ("rule", "codes"),
    [("half-even", [0, 2, 0, -2, 2]), ("half-up", [1, 2, 0, -1, 2]), ("half-away", [1, 2, -1, -2, 2])],
)
def test_ties(rule, codes):
    merged = merge_rule(TIES, [floats(0.5)] * 2, -4, 3, rule)
    assert merged.codes.tolist() == codes and merged.codes.dtype == torch.int8
    assert (merged.scale.tolist(), merged.zero_point.tolist()) == ([0.5], [0.0])


ROUNDED = {
    "half-even": np.rint,
    "half-up": lambda v: np.floor(v + 0.5),
    "half-away": lambda v: np.copysign(np.floor(np.abs(v) + 0.5), v),
}


@pytest.mark.parametrize("rule", ROUNDED)
@pytest.mark.parametrize("axis", [None, 0, -1])
@pytest.mark.parametrize("weights", [None, (0.25, 0.75), (0.5, 0.25, 0.25)])
def test_rules_in_exact_arithmetic(rule, axis, weights):
    count, shape = len(weights or (1, 1)), (6, 8)
    length = 1 if axis is None else shape[axis]
    random = np.random.default_rng(0)
    ranges = [(-8, 7), (0, 15), (-128, 127)][:count]
    codes = [torch.from_numpy(random.integers(low, high + 1, shape)).short() for low, high in ranges]
    scales = [torch.full((length,), 0.25) for _ in codes]  # powers of two: no operation of float32 rounds
    zeros = [torch.full((length,), z) for z in (0.0, 6.0, 1.0)[:count]]
    merged = merge_rule(codes, scales, -8, 7, rule, weights=weights, zero_points=zeros, ranges=ranges, axis=axis)
    lam = weights or (0.5, 0.5)
    v = sum(w * (c.double() - z[0]) for w, c, z in zip(lam, codes, zeros, strict=True)).numpy()
    zero = np.rint(sum(w * float(z[0]) for w, z in zip(lam, zeros, strict=True)))
    assert merged.codes.tolist() == np.clip(ROUNDED[rule](v) + zero, -8, 7).tolist()
    assert merged.zero_point.tolist() == [zero] * length and merged.scale.tolist() == [0.25] * length


def test_half_to_even_is_merging_without_noise_and_rules_differ_from_it_at_ties_only():
    generator = torch.Generator().manual_seed(0)
    codes = [torch.randint(-8, 8, (40, 50), generator=generator).to(torch.int8) for _ in range(2)]
    scales = [torch.rand(40, generator=generator) + 0.1 for _ in codes]
    scales[1][::2] = scales[0][::2]
    options = {"weights": (0.5, 0.5), "axis": 0}
    even = merge_rule(codes, scales, -8, 7, "half-even", **options)
    want = hdrq.ops.merge(codes, scales, -8, 7, RNG, noise="none", **options)
    assert torch.equal(even.codes, want.codes) and torch.equal(even.scale, want.scale)
    values = sum(c.double() * s.double()[:, None] for c, s in zip(codes, scales, strict=True)) / 2
    position = values / even.scale.double()[:, None]
    tie = (position - position.floor() - 0.5).abs() < 1e-5
    for rule in ("half-up", "half-away"):
        differs = merge_rule(codes, scales, -8, 7, rule, **options).codes != even.codes
        assert differs.any() and not (differs & ~tie).any()


def test_requantize_searches_a_scale_for_the_mean():
    merged = merge_rule([int8(0, 1), int8(1, 2)], [floats(1)] * 2, 0, 3, "requantize")
    assert (merged.codes.tolist(), merged.scale.tolist(), merged.zero_point.tolist()) == ([1, 3], [0.5], [0])


def test_requantize_searches_a_zero_point_where_models_have_them():
    codes, ones = [int8(1, 2), int8(0, 2)], [floats(1)] * 2
    merged = merge_rule(codes, ones, 0, 3, "requantize", zero_points=ones)  # m = −½, 1
    assert (merged.codes.tolist(), merged.scale.tolist(), merged.zero_point.tolist()) == ([0, 3], [0.5], [1])


def test_requantize_per_channel():
    codes = [int8([0, 1], [0, 3]), int8([1, 2], [0, 3])]
    merged = merge_rule(codes, [floats(1, 2)] * 2, 0, 3, "requantize", axis=0)
    assert (merged.codes.tolist(), merged.scale.tolist()) == ([[1, 3], [0, 3]], [0.5, 2.0])


def test_floats_are_averaged_then_rounded():
    first, second = floats([0, 1], [0, 6]), floats([2, 5], [0, 6])
    merged = float_then_round([first, second], 0, 3, weights=(0.75, 0.25), axis=0)  # m = (½, 2 | 0, 6)
    assert merged.scale[1] == 2 and merged.codes.tolist()[1] == [0, 3]
    mean = 0.75 * first + 0.25 * second
    scale = hdrq.ops.search_scale(mean, 0, 3, axis=0)
    assert torch.equal(merged.scale, scale) and torch.equal(merged.codes, hdrq.ops.quantize(mean, scale, 0, 3, axis=0))
    assert float_then_round([floats(0.5, 1.5).bfloat16()], 0, 3).codes.tolist() == [1, 3]


def test_squared_distances_to_the_midpoint():
    errors = compare(TIES, [floats(0.5)] * 2, -4, 3, RNG, draws=3)
    assert list(errors) == [*RULES, SAMPLED]
    fixed = {rule: error for rule, error in errors.items() if rule != "requantize"}
    assert fixed == dict.fromkeys(fixed, 0.25)  # four weights, a quarter off: whatever rule decides a tie
    exact = compare([int8(0, 1), int8(1, 2)], [floats(1)] * 2, 0, 3, RNG)
    assert (exact["half-even"], exact["requantize"]) == (0.5, 0)


def test_noise_adds_its_variance_to_that_of_rounding():
    generator = torch.Generator().manual_seed(0)
    codes = [torch.randint(0, 16, (8, 2000), generator=generator).to(torch.int8) for _ in range(3)]
    scales = [torch.rand(8, generator=generator) * 0.1 + 0.5 for _ in codes]
    zeros = [torch.full((8,), 8.0) for _ in codes]
    errors = compare(codes, scales, 0, 15, RNG, zero_points=zeros, axis=0, weights=(0.5, 0.3, 0.2), draws=1)
    assert errors["half-even"] == pytest.approx(errors["half-up"], rel=1e-4)  # ties are rare
    assert errors[SAMPLED] == pytest.approx(1.38 * errors["half-even"], rel=0.05)  # 1 + ¼ + 0.09 + 0.04


def test_refusals():
    ones = [floats(1)] * 2
    with pytest.raises(ValueError, match=r"rule must be one of 'half-even', .*, got 'down'"):
        merge_rule(TIES, ones, -4, 3, "down")
    with pytest.raises(ValueError, match=r"codes\[0\] must be in \[-1, 1\], got \[-1, 2\]"):
        merge_rule(TIES, ones, -1, 1, "half-up")
    with pytest.raises(ValueError, match=r"number of tensors must be in \[1, 64\], got 0"):
        float_then_round([], -4, 3)
    with pytest.raises(ValueError, match=r"float_weights\[1\] must have the shape of float_weights\[0\], \(1,\)"):
        float_then_round([floats(1), floats(1, 2)], -4, 3)
    with pytest.raises(TypeError, match=r"float_weights\[0\] must be a tensor of float32 .* got int8"):
        float_then_round(TIES, -4, 3)


def test_of_two_models_a_step_apart_the_coarser_decides_if_scales_differ():
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(-7, 7, (500,), generator=generator).to(torch.int8)
    fine = coarse + torch.randint(-1, 2, (500,), generator=generator).to(torch.int8)
    for rule in ("half-even", "half-up", "half-away"):
        assert torch.equal(merge_rule([coarse, fine], [floats(0.101), floats(0.1)], -8, 7, rule).codes, coarse)
