import numpy as np
import pytest
import torch
from helpers import MISSING, assert_same_bits, backend_params, device_of
from oracle import contract

import hdrq

STATE = (2**61 + 3, 2**32 - 1, 2**32 - 2)  # stream + k and step + d both wrap
f32 = np.float32


def models(count, shape, qmin, qmax, axis, seed=0):
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.int8 if qmax <= 127 else torch.int16
    codes = [torch.randint(qmin, qmax + 1, shape, generator=generator).to(dtype) for _ in range(count)]
    size = 1 if axis is None else shape[axis]
    return codes, [torch.rand(size, generator=generator) * 0.1 + 0.2 for _ in range(count)]


def run(backend, codes, deltas, qmin, qmax, **options):
    device = device_of(backend)
    with hdrq.use_backend(backend):
        result = hdrq.ops.merge(
            [c.to(device) for c in codes],
            [d.to(device) for d in deltas],
            qmin,
            qmax,
            hdrq.rng_state(*STATE, device=device),
            **options,
        )
    return hdrq.ops.MergedTensor(*(t.cpu() for t in result))


@pytest.mark.parametrize("backend", backend_params())
@pytest.mark.parametrize(("count", "weights"), [(2, None), (3, None), (3, (0.5, 0.3, 0.2))])
@pytest.mark.parametrize(("qmin", "qmax"), [(-4, 3), (0, 255)])
@pytest.mark.parametrize("axis", [None, 0])
def test_codes_have_the_bits_of_the_contract(backend, count, weights, qmin, qmax, axis):
    codes, deltas = models(count, (5, 7), qmin, qmax, axis)
    result = run(backend, codes, deltas, qmin, qmax, weights=weights, draws=3, axis=axis)
    lam = [f32(1 / count)] * count if weights is None else [f32(w) for w in weights]
    seed, stream, step = STATE
    drawn = (step + int(result.draw)) % 2**32
    for e in range(35):
        own = [d[0 if axis is None else e // 7].numpy() for d in deltas]
        noises = [contract.uniform((seed, (stream + k) % 2**32, drawn), e) for k in range(count)]
        integers = [int(c.flatten()[e]) for c in codes]
        assert int(result.codes.flatten()[e]) == contract.merged_code(integers, own, lam, noises, qmin, qmax)


@pytest.mark.parametrize("backend", backend_params(only=("torch", "cpp", "triton")))
@pytest.mark.parametrize("noise", ["all", "odd", "none"])
@pytest.mark.parametrize(("shape", "axis"), [((1,), None), ((2100,), None), ((6, 3, 3, 3), 0), ((4, 9), -1)])
def test_backends_agree_with_the_reference(backend, noise, shape, axis):
    codes, deltas = models(2, shape, -8, 7, axis)
    got, want = (run(b, codes, deltas, -8, 7, draws=4, noise=noise, axis=axis) for b in (backend, "reference"))
    assert_same_bits(got.codes, want.codes)
    assert_same_bits(got.scale, want.scale)
    assert_same_bits(got.draw, want.draw)
    torch.testing.assert_close(got.similarity, want.similarity, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", backend_params())
def test_the_draw_kept_is_the_best_aligned(backend):
    codes, deltas = models(2, (40, 5), -4, 3, None)
    result = run(backend, codes, deltas, -4, 3, draws=6)
    values = [c.double() * d.double() for c, d in zip(codes, deltas, strict=True)]
    step = result.codes.double() * result.scale.double()
    middle = sum(values) / 2
    cosines = [torch.cosine_similarity((step - v).flatten(), (middle - v).flatten(), dim=0) for v in values]
    torch.testing.assert_close(result.similarity[result.draw], torch.stack(cosines), rtol=1e-5, atol=1e-5)
    assert int(result.draw) == int(result.similarity.amin(dim=1).argmax())


def test_equal_scales_make_an_odd_sum_a_fair_coin_and_leave_an_even_one():
    codes = [torch.full((20_000,), 1, dtype=torch.int8), torch.full((20_000,), 2, dtype=torch.int8)]
    codes[1][:10_000] = 3
    merged = hdrq.ops.merge(codes, [torch.tensor([0.1])] * 2, -4, 3, hdrq.rng_state(0), rule="noise").codes
    assert (merged[:10_000] == 2).all()
    coin = (merged[10_000:] == 2).double().mean()
    assert ((merged[10_000:] == 1) | (merged[10_000:] == 2)).all()
    assert abs(coin - 0.5) < 5 * 0.5 / 100


def test_models_that_agree_merge_to_themselves():
    codes, _ = models(1, (50,), -8, 7, None)
    result = hdrq.ops.merge(codes * 2, [torch.tensor([0.25])] * 2, -8, 7, hdrq.rng_state(0), noise="none")
    assert torch.equal(result.codes, codes[0])
    assert result.similarity.tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize("backend", backend_params())
def test_mixed_ranges_layouts_and_zero_points_have_the_bits_of_the_contract(backend):
    generator = torch.Generator().manual_seed(3)
    ranges, shape = [(-8, 7), (0, 15), (-128, 127), (0, 255)], (3, 7)
    plain = [torch.randint(low, high + 1, shape, generator=generator).short() for low, high in ranges]
    device = device_of(backend)
    codes = [hdrq.ops.pack(plain[0]), hdrq.ops.pack(plain[1]), plain[2].char(), plain[3]]
    deltas = [torch.rand(3, generator=generator) + f for f in (8.0, 8.0, 0.5, 0.5)]
    zeros = [torch.full((3,), z) for z in (0.0, 7.0, -3.0, 128.0)]
    lam = (0.6, 0.5, -0.3, 0.2)
    with hdrq.use_backend(backend):
        result = hdrq.ops.merge(
            *([t.to(device) for t in tensors] for tensors in (codes, deltas)), -8, 7,
            hdrq.rng_state(*STATE, device=device), rule="noise", weights=lam, axis=0,
            zero_points=[z.to(device) for z in zeros], ranges=ranges, shape=shape, packed=True,
            extrapolate=True,
        )  # fmt: skip
    got = hdrq.ops.unpack(result.codes.cpu(), shape).flatten()
    for e in range(21):
        noises = [contract.uniform((STATE[0], (STATE[1] + k) % 2**32, STATE[2]), e) for k in range(4)]
        own, zero = ([t[e // 7].numpy() for t in tensors] for tensors in (deltas, zeros))
        integers = [int(c.flatten()[e]) for c in plain]
        assert int(got[e]) == contract.merged_code(integers, own, [f32(w) for w in lam], noises, -8, 7, zero)


@pytest.mark.parametrize("backend", backend_params())
@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.2, 0.8), (1.0, 0.0), (0.5, 0.3, 0.2), (0.4, 0.3, 0.2, 0.1)])
def test_fast_codes_have_the_bits_of_the_contract(backend, weights):
    codes, deltas = models(len(weights), (5, 7), -4, 3, 0)
    result = run(backend, codes, deltas, -4, 3, weights=weights, draws=10, axis=0, mode="fast")
    lam = [f32(w) for w in weights]
    for e in range(35):
        own, integers = [d[e // 7].numpy() for d in deltas], [int(c.flatten()[e]) for c in codes]
        assert int(result.codes.flatten()[e]) == contract.fast_merged_code(
            STATE, e, int(result.draw), integers, own, lam, -4, 3
        )


@pytest.mark.parametrize("backend", backend_params(only=("torch", "cpp", "triton")))
@pytest.mark.parametrize(("noise", "select"), [("all", "mean-cosine"), ("odd", "official"), ("none", "first")])
@pytest.mark.parametrize("weights", [(0.3, 0.7), (0.2, 0.5, 0.3)])
def test_fast_and_packed_agree_with_the_reference(backend, weights, noise, select):
    codes, deltas = models(len(weights), (3, 133), -8, 7, 0)  # rows that begin within a byte and within a tile
    options = {"axis": 0, "weights": weights, "select": select, "mode": "fast", "draws": 3, "noise": noise}
    packing = {"packed": True, "shape": (3, 133)}
    packed = [hdrq.ops.pack(c) for c in codes]
    got, want = (run(b, packed, deltas, -8, 7, **options, **packing) for b in (backend, "reference"))
    for part in ("codes", "scale", "draw", "zero_point"):  # similarity is a sum
        assert_same_bits(getattr(got, part), getattr(want, part))
    torch.testing.assert_close(got.similarity, want.similarity, rtol=1e-6, atol=1e-6)
    plain = run(backend, codes, deltas, -8, 7, **options).codes
    assert_same_bits(hdrq.ops.unpack(got.codes, plain.shape), plain)


@pytest.mark.parametrize(
    ("deltas", "weights"),
    [
        ((0.1, 0.1), None),
        ((0.1, 0.17), None),
        ((0.3, 0.1), (0.1, 0.9)),
        ((0.1, 0.1, 0.1), None),
        ((0.1, 0.17, 0.02), (0.5, 0.2, 0.3)),
        ((0.1, 0.2, 0.15, 0.12), (0.4, 0.3, 0.2, 0.1)),
    ],
)
def test_fast_draws_are_distributed_as_exact_ones(deltas, weights):
    """χ² between the outcomes of the two modes, for 256 tuples of 4-bit codes, for two models all there are."""
    samples = 20_000
    first, second = torch.cartesian_prod(torch.arange(-8, 8), torch.arange(-8, 8)).char().T
    more = [torch.randperm(256, generator=torch.Generator().manual_seed(k)) for k in range(len(deltas) - 2)]
    codes = [c.repeat_interleave(samples) for c in (first, second, *(second[order] for order in more))]
    scales = [torch.tensor([d]) for d in deltas]
    exact, fast = (
        hdrq.ops.merge(codes, scales, -8, 7, hdrq.rng_state(seed), weights=weights, mode=mode)
        .codes.view(256, -1)
        .short()
        for seed, mode in ((1, "exact"), (2, "fast"))
    )
    floor = torch.minimum(exact.amin(1), fast.amin(1))
    assert (torch.maximum(exact.amax(1), fast.amax(1)) - floor <= 1).all()
    up = [(c - floor[:, None]).sum(1).double() for c in (exact, fast)]
    share = (up[0] + up[1]) / (2 * samples)
    open_pairs = (share > 5 / samples) & (share < 1 - 5 / samples)
    chi2 = ((up[0] - up[1]).square() / (2 * samples * share * (1 - share)))[open_pairs]
    assert len(chi2) >= 100
    assert abs(chi2.sum() - len(chi2)) < 5 * (2 * len(chi2)) ** 0.5
    assert chi2.max() < 20


@pytest.mark.skipif(MISSING["cpp"] is not None, reason=f"cpp: {MISSING['cpp']}")
def test_draws_that_are_as_good_are_told_apart_alike():
    """2 bits, equal scales: many draws tie, and sums are known to their rounding only."""
    for seed in range(60):
        codes, _ = models(2, (3 + 5 * seed,), -2, 1, None, seed)
        scales = [torch.tensor([0.3])] * 2
        want, *others = (run(b, codes, scales, -2, 1, draws=30).draw for b in ("reference", "torch", "cpp"))
        for got in others:
            assert_same_bits(got, want)


def test_fast_draws_spread_as_exact_ones():
    """Scores of draws: one mean and one spread in both modes, and none follows from its neighbour in fast mode."""
    codes, deltas = models(2, (20_000,), -8, 7, None)
    scores = {m: run("cpp", codes, deltas, -8, 7, draws=400, mode=m).similarity[:, 0] for m in ("exact", "fast")}
    exact, fast = scores.values()
    deviation = exact.std()
    assert abs(exact.mean() - fast.mean()) < 5 * deviation * (2 / 400) ** 0.5
    assert 0.8 < fast.std() / deviation < 1.25
    for lag in (1, 2, 3, 64):
        assert abs(torch.corrcoef(torch.stack((fast[lag:], fast[:-lag])))[0, 1]) < 0.25


@pytest.mark.parametrize("backend", backend_params())
def test_the_official_rule_on_its_own_case(backend):
    """Two models, λ = ½, noise where the sum of integers is odd; a draw is kept where both cosines rise."""
    codes, deltas = models(2, (60,), -4, 3, None, seed=5)
    result = run(backend, codes, deltas, -4, 3, noise="odd", draws=12, select="official")
    a, b = ([int(c) for c in code] for code in codes)
    (da,), (db,) = (d.numpy() for d in deltas)
    step = float(f32(0.5) * da + f32(0.5) * db)
    half, best, kept = f32(0.5), None, None
    for draw in range(12):
        state = [(STATE[0], (STATE[1] + k) % 2**32, (STATE[2] + draw) % 2**32) for k in range(2)]
        merged = []
        for e, (i, j) in enumerate(zip(a, b, strict=True)):
            noises = [contract.uniform(s, e) if (i + j) % 2 else f32(0) for s in state]
            merged.append(contract.merged_code((i, j), (da, db), (half, half), noises, -4, 3))
        cosines = []
        for own, delta in ((a, float(da)), (b, float(db))):
            taken = np.array(merged) * step - np.array(own) * delta
            wanted = (np.array(a) * float(da) + np.array(b) * float(db)) / 2 - np.array(own) * delta
            cosines.append(taken @ wanted / np.sqrt((taken @ taken) * (wanted @ wanted)))
        if best is None or (cosines[0] > best[0] and cosines[1] > best[1]):
            best, kept = cosines, (draw, merged)
    assert (int(result.draw), result.codes.tolist()) == kept


@pytest.mark.parametrize("backend", backend_params())
def test_odd_noise_of_three_models_is_nearer_to_a_tie_than_to_an_integer(backend):
    sums = ([0, 1, 1, 1, 2], [0, 2, 1, 2, 2], [0, 2, 2, 1, 3])  # means 0, 5/3, 4/3, 4/3, 7/3
    codes = [torch.tensor(column).char().repeat(200) for column in sums]
    merged = run(backend, codes, [torch.ones(1)] * 3, -8, 7, noise="odd").codes.view(200, 5)
    assert [len(set(column.tolist())) for column in merged.T] == [1, 2, 2, 2, 2]
    quarters = run(backend, [codes[0]] * 3 + [codes[0] + 1], [torch.ones(1)] * 4, -8, 7, noise="odd").codes
    assert torch.equal(quarters, codes[0])


def test_packing_puts_the_low_nibble_first():
    codes = torch.tensor([[1, -2, 7], [-8, 0, -1], [3, 4, 5]], dtype=torch.int8)
    packed = hdrq.ops.pack(codes)
    assert packed.tolist() == [0xE1, 0x87, 0xF0, 0x43, 0x05]
    assert torch.equal(hdrq.ops.unpack(packed, (3, 3)), codes)
    assert torch.equal(hdrq.ops.unpack(packed, (3, 3), signed=False), codes & 15)
    with pytest.raises(ValueError, match=r"codes must be in \[-8, 7\] or in \[0, 15\] to be packed, got \[-1, 8\]"):
        hdrq.ops.pack(torch.tensor([-1, 8], dtype=torch.int8))
    with pytest.raises(ValueError, match=r"packed must have the shape \(5,\), two codes to a byte, got \(4,\)"):
        hdrq.ops.unpack(packed[:4], (3, 3))


INT8, ONE = torch.zeros(4, dtype=torch.int8), torch.ones(1)
BAD = [
    (ValueError, r"the number of tensors must be in \[2, 64\], got 1", {"codes": [INT8], "scales": [torch.ones(1)]}),
    (ValueError, "scales must be as many as codes, 2, got 1", {"scales": [torch.ones(1)]}),
    (ValueError, "weights must sum to 1, got 0.9", {"weights": (0.5, 0.4)}),
    (ValueError, r"weights\[1\] must be .*, got -0.5", {"weights": (1.0, -0.5)}),
    (ValueError, r"draws must be in \[1, \d+\], got 0", {"draws": 0}),
    (ValueError, "noise must be one of", {"noise": "some"}),
    (ValueError, r"codes\[1\] must have the shape", {"codes": [INT8, torch.zeros(5, dtype=torch.int8)]}),
    (
        ValueError,
        r"codes\[1\] must be in \[-4, 3\], got \[0, 9\]",
        {"codes": [INT8, torch.tensor([0, 0, 0, 9]).char()]},
    ),
    (TypeError, r"codes\[0\] must be a tensor of int8 or int16", {"codes": [INT8.float(), INT8]}),
    (ValueError, r"scales\[0\] must be positive", {"scales": [torch.zeros(1), torch.ones(1)]}),
    (ValueError, "select must be one of", {"select": "best"}),
    (
        ValueError,
        'mode must be "exact" but for 4 tensors or less',
        {"mode": "fast", "codes": [INT8] * 5, "scales": [ONE] * 5},
    ),
    (ValueError, 'mode must be "exact" but', {"mode": "fast", "weights": (1.5, -0.5), "extrapolate": True}),
    (
        ValueError,
        "the merged scale must be positive",
        {"weights": (-1.0, 2.0), "extrapolate": True, "scales": [3 * ONE, ONE]},
    ),
    (ValueError, "zero_points must be as many as codes, 2, got 1", {"zero_points": [ONE]}),
    (ValueError, "zero_point must be an integer", {"zero_points": [ONE, ONE / 2]}),
    (ValueError, "ranges must be as many as codes, 2, got 1", {"ranges": [(0, 3)]}),
    (ValueError, r"codes\[1\] must be in \[1, 3\], got \[0, 0\]", {"ranges": [(0, 3), (1, 3)]}),
    (ValueError, "shape must be given with packed codes", {"codes": [INT8, INT8.byte()]}),
    (ValueError, r"codes\[0\] must have the shape \(5,\)", {"codes": [INT8.byte()] * 2, "shape": (9,)}),
    (ValueError, "qmin and qmax must be inside .* for packed codes", {"packed": True, "qmax": 9}),
]


@pytest.mark.parametrize(("error", "message", "change"), BAD)
def test_bad_input(error, message, change):
    arguments = {"codes": [INT8, INT8], "scales": [torch.ones(1)] * 2, "qmin": -4, "qmax": 3} | change
    with pytest.raises(error, match=message):
        hdrq.ops.merge(**arguments, rng=hdrq.rng_state(0))
