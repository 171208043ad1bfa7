"""Baselines of merging: fixed rules at ties known by hand, and float means rounded anew."""

import numpy as np
import pytest
import torch

import hdrq
from hdrq.merging.rules import merge_rule

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


def test_refusals():
    ones = [floats(1)] * 2
    with pytest.raises(ValueError, match=r"rule must be one of 'half-even', .*, got 'down'"):
        merge_rule(TIES, ones, -4, 3, "down")
    with pytest.raises(ValueError, match=r"codes\[0\] must be in \[-1, 1\], got \[-1, 2\]"):
        merge_rule(TIES, ones, -1, 1, "half-up")


def test_of_two_models_a_step_apart_the_coarser_decides_if_scales_differ():
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(-7, 7, (500,), generator=generator).to(torch.int8)
    fine = coarse + torch.randint(-1, 2, (500,), generator=generator).to(torch.int8)
    for rule in ("half-even", "half-up", "half-away"):
        assert torch.equal(merge_rule([coarse, fine], [floats(0.101), floats(0.1)], -8, 7, rule).codes, coarse)
