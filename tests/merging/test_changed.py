"""Changing one tensor: every rule against its definition, the grids a weight may have, and what is counted."""

import pytest
import torch
from networks import data

import hdrq
from hdrq import rng as stream
from hdrq.calibrate.moments import Moments
from hdrq.merging import weights
from hdrq.merging.changed import RULES, changed_float, changed_weight
from hdrq.merging.weights import Difference, Plain, Product, Quantized, slabs

SHAPE = (24, 110)  # 2,640 elements: groups of 1,024 that begin inside rows
RNG = hdrq.rng_state(3, stream=64, step=5)


def quantized(shape=SHAPE, low=-8, high=7, axis=None, group_size=None, affine=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(low + 2, high - 1, shape, generator=generator, dtype=torch.int8)
    grid = (*shape[:-1], shape[-1] // group_size) if group_size else (1 if axis is None else shape[axis],)
    scale = torch.rand(grid, generator=generator) + 0.5
    zero = torch.randint(low, high, grid, generator=generator, dtype=torch.int32) if affine else None
    return Quantized(codes, scale, zero, {"range": [low, high], "axis": axis, "group_size": group_size})


def in_steps(old, steps):
    """A change of so many steps of each element."""
    return Plain((steps.double().reshape(len(old.codes), -1) * old.step(slice(None))).reshape(steps.shape))


def changed(old, steps, rule, rng=RNG, **options):
    codes, found = changed_weight("w", old, in_steps(old, steps), rule, rng, **options)
    return codes.int() - old.codes.int(), found


STEPS = data(*SHAPE, seed=1) * 0.7


def test_to_nearest_is_half_even_of_the_position():
    ties = torch.tensor([0.5, -0.5, 1.5, 0.25]).repeat(6).view(24, 1).expand(SHAPE)
    old = quantized(affine=True)
    moved, _ = changed(old, ties, "nearest")
    place = old.codes.double() - old.zero_point
    assert torch.equal(moved.double(), (place + ties.double()).round() - place)
    assert {*moved[0].tolist()} == {0, 1}  # to even, of I − z


def test_systematic_rounding_is_that_of_a_merge_with_every_element_near_a_tie():
    for axis in (None, 0):
        a, b = quantized(axis=axis), quantized(seed=1, axis=axis)
        merged = hdrq.ops.merge([a.codes, b.codes], [a.scale] * 2, -8, 7, RNG, tau=0.5, axis=axis)
        half = Difference(Plain(b.codes.double()), Plain(a.codes.double()), 0.5)
        steps = half.rows(slice(None)).reshape(SHAPE)
        moved, _ = changed(Quantized(a.codes, a.scale, None, a.facts), steps, "systematic")
        assert torch.equal(a.codes + moved, merged.codes)


def test_noise_is_the_streams():
    moved, _ = changed(quantized(), STEPS, "noise")
    n = torch.from_numpy((stream.words(RNG.numpy(), STEPS.numel()) >> 8).astype("float64") * 2**-24 - 0.5).view(SHAPE)
    assert torch.equal(
        moved.double(), (quantized().codes + STEPS.double() + n).round().clamp(-8, 7) - quantized().codes
    )


@pytest.mark.parametrize("rule", ["systematic", "noise"])
def test_sampled_rounding_keeps_a_change_far_below_a_step_in_the_mean(rule):
    old, steps = quantized(), torch.full(SHAPE, 0.05) * torch.sign(data(*SHAPE, seed=2))
    assert not changed(old, steps, "nearest")[0].any()
    moved = torch.stack([changed(old, steps, rule, hdrq.rng_state(seed))[0].double() for seed in range(400)])
    spread = (0.05 * 0.95 / 400) ** 0.5
    assert (moved.mean(0) - steps).abs().max() < 5 * spread
    kept = [changed(old, steps, rule, hdrq.rng_state(seed))[1].kept for seed in range(20)]
    assert abs(sum(kept) / 20 - 1) < 5 * (0.95 / 0.05 / old.codes.numel() / 20) ** 0.5


def test_the_sum_of_a_group_is_kept_to_a_step():
    steps = torch.full(SHAPE, 0.3)
    for rule, bound in (("systematic", 1.01), ("noise", 100)):
        moved, _ = changed(quantized(), steps, rule)
        off = (moved.flatten() - 0.3).split(1024)
        worst = max(abs(float(group.sum())) for group in off)
        assert worst < bound and (rule == "systematic" or worst > 3)


GRIDS = [
    {"axis": None},
    {"axis": 0, "affine": True},
    {"axis": 1, "affine": True},
    {"axis": -1},
    {"group_size": 11, "affine": True},
    {"shape": (6, 4, 3, 2), "axis": 1, "affine": True},
    {"shape": (6, 4, 3, 4), "group_size": 2},
    {"low": 0, "high": 15, "axis": 0, "affine": True},
]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("rule", RULES[:3])
def test_whole_steps_arrive_whole_on_every_grid(grid, rule):
    old = quantized(**grid)
    steps = torch.randint(-1, 2, tuple(old.codes.shape), generator=torch.Generator().manual_seed(4))
    moved, found = changed(old, steps, rule)
    assert torch.equal(moved, steps.int())
    assert found.kept == pytest.approx(1) and found.error < 1e-12 and found.clipped == 0
    assert found.steps == pytest.approx(float(steps.double().square().mean() ** 0.5))
    real = hdrq.ops.dequantize(
        old.codes,
        old.scale,
        zero_point=None if old.zero_point is None else old.zero_point.float(),
        axis=old.facts["axis"],
        group_size=old.facts["group_size"],
    )
    torch.testing.assert_close(old.rows(slice(None)).reshape(real.shape).float(), real)


def test_a_change_of_nothing_leaves_every_code():
    old = quantized()
    for rule in RULES:
        moments = Moments((data(110, 110).T @ data(110, 110)).double()[None]) if rule == "calibrated" else None
        moved, found = changed(old, torch.zeros(SHAPE), rule, moments=moments)
        assert not moved.any() and found is None


def test_the_size_of_slabs_decides_nothing(monkeypatch):
    old, steps = quantized((24, 384), axis=0), data(24, 384, seed=1) * 0.7
    want = [changed(old, steps, rule) for rule in RULES[:3]]
    monkeypatch.setattr(weights, "AT_ONCE", 1)
    assert [s.start for s in slabs((24, 384))] == [0, 8, 16]  # 8 rows are three groups
    for rule, (codes, found) in zip(RULES, want, strict=False):
        again, report = changed(old, steps, rule)
        assert torch.equal(codes, again) and report.kept == pytest.approx(found.kept)


def test_what_is_reported_is_what_happened():
    old = quantized(axis=0)
    change = Product(data(24, 3, seed=5), data(3, 110, seed=6), 0.3)
    codes, found = changed_weight("w", old, change, "systematic", RNG)
    delta = change.rows(slice(None))
    made = (codes.double() - old.codes) * old.step(slice(None))
    assert found.change == pytest.approx(float(delta.norm()))
    assert found.kept == pytest.approx(float((made * delta).sum() / delta.square().sum()))
    assert found.error == pytest.approx(float((made - delta).norm() / delta.norm()))
    assert found.elements == delta.numel() and found.rule == "systematic" and found.input_error is None


def test_clipped_codes_are_counted():
    moved, found = changed(quantized(), torch.full(SHAPE, 6.0), "nearest")
    outside = (quantized().codes + 6) > 7
    assert found.clipped == pytest.approx(float(outside.float().mean())) and 0.3 < found.clipped < 0.9
    assert (quantized().codes + moved).max() == 7
    moments = Moments(torch.eye(110, dtype=torch.float64)[None])
    assert changed(quantized(), torch.full(SHAPE, 6.0), "calibrated", moments=moments)[1].clipped == found.clipped


def calibration(columns=110, seed=7):
    x = data(400, 20, seed=seed) @ data(20, columns, seed=seed + 1) + 0.3 * data(400, columns, seed=seed + 2)
    return Moments((x.T @ x).double()[None], rows=400), x.double()


def test_calibrated_rounding_keeps_what_inputs_see():
    old, (moments, x) = quantized(axis=0), calibration()
    steps = data(*SHAPE, seed=9) * 0.2
    errors = {}
    for rule in RULES:
        codes, found = changed_weight("w", old, in_steps(old, steps), rule, RNG, moments)
        delta = in_steps(old, steps).rows(slice(None))
        missed = (codes.double() - old.codes) * old.step(slice(None)) - delta
        assert found.input_error == pytest.approx(float((missed @ x.T).norm() / (delta @ x.T).norm()), rel=1e-6)
        errors[rule] = found.input_error
    assert errors["calibrated"] < 0.5 * min(errors[rule] for rule in RULES[:3])


def test_calibrated_rounding_of_convolution_groups_and_of_turned_weights():
    old = quantized((6, 4, 3, 3), axis=0)
    steps = data(6, 4, 3, 3, seed=9) * 0.3
    one, other = (calibration(36, seed)[0].hessian[0] for seed in (1, 2))
    whole, _ = changed_weight("w", old, in_steps(old, steps), "calibrated", RNG, Moments(torch.stack([one, other])))
    for rows, hessian in ((slice(3), one), (slice(3, 6), other)):
        part = Quantized(old.codes[rows], old.scale[rows], None, old.facts)
        codes, _ = changed_weight("w", part, in_steps(part, steps[rows]), "calibrated", RNG, Moments(hessian[None]))
        assert torch.equal(codes, whole[rows])
    old, moments = quantized((36, 6), axis=1), Moments(one[None])
    turned = Quantized(old.codes.T, old.scale, None, {**old.facts, "axis": 0})
    steps = data(36, 6, seed=9) * 0.3
    want, _ = changed_weight("w", turned, in_steps(turned, steps.T), "calibrated", RNG, moments)
    codes, found = changed_weight("w", old, in_steps(old, steps), "calibrated", RNG, Moments(one[None], True))
    assert torch.equal(codes, want.T) and found.rule == "calibrated"


def test_calibrated_rounding_says_where_it_was_another():
    old, moments = quantized(axis=0), calibration()[0]
    assert changed(old, STEPS, "calibrated")[1].rule == "systematic"
    broken = Moments(-moments.hessian)
    assert changed(old, STEPS, "calibrated", moments=broken)[1].rule == "nearest"
    moments.hessian[0, 5], moments.hessian[0, :, 5] = 0, 0
    moved, found = changed(old, STEPS, "calibrated", moments=moments)
    assert found.dead == 1 and found.rule == "calibrated"
    assert torch.equal(
        moved[:, 5].double(), (old.codes[:, 5] + STEPS[:, 5].double()).round().clamp(-8, 7) - old.codes[:, 5]
    )


def test_tensors_in_float_are_changed_and_rounded_once():
    old, change = Plain(data(7, 5)), Plain(data(7, 5, seed=1) * 1e-3)
    value, found = changed_float("bias", old, change)
    assert torch.equal(value, (old.value.double() + change.value.double()).float())
    assert found.rule == "float" and found.steps is None and found.kept == pytest.approx(1, abs=1e-4)
    half = Plain(torch.full((64,), 256.0, dtype=torch.bfloat16))
    value, found = changed_float("bias", half, Plain(torch.full((64,), 0.5)))
    assert torch.equal(value, half.value) and found.kept == 0 and found.error == 1  # lost in the type
    assert changed_float("scalar", Plain(torch.tensor(2.0)), Plain(torch.tensor(1.0)))[0] == 3
    mask = Plain(torch.tensor([0.0, -torch.inf]))
    assert torch.equal(changed_float("mask", mask, Plain(torch.tensor([1.0, 0.0])))[0], torch.tensor([1.0, -torch.inf]))


def test_numbers_that_are_none_are_refused():
    with pytest.raises(ValueError, match="the change of w must be finite, got"):
        changed(quantized(), STEPS.masked_fill(STEPS > 2, torch.nan), "nearest")
    half = Plain(torch.full((4,), 6e4, dtype=torch.float16))
    with pytest.raises(ValueError, match="head must stay finite in float16, got a change beyond it"):
        changed_float("head", half, Plain(torch.full((4,), 1e4)))
    with pytest.raises(ValueError, match=r"norm\.running_var must stay positive, got -1"):
        changed_float("norm.running_var", Plain(torch.ones(4)), Plain(torch.full((4,), -2.0)))
