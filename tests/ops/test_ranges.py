"""The search for scales against an exhaustive one, which is the definition."""

import pytest
import torch
from helpers import FLOATS, assert_same_bits, backend_params, device_of, sample

import hdrq
from hdrq.backends.dispatch import implementation
from hdrq.ops import ranges

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies
few = hypothesis.settings(max_examples=25, deadline=None, derandomize=True, database=None)

BOUND = 1 + 1e-5
BACKENDS = backend_params()
FAST = backend_params(only=("reference", "torch", "cpp"))  # an interpreter takes seconds for a few hundred candidates
LONG = 4 * ranges.BINS
HUGE = torch.finfo(torch.float32).max


def error(x, scale, qmin, qmax, norm=2.4, zero_point=None):
    """Σ |fake_quantize(x) − x|^norm, in units that keep it finite."""
    y = hdrq.ops.fake_quantize(x.float(), scale, qmin, qmax, zero_point=zero_point)
    return ((y - x.float()).abs().double() / x.abs().max().double()).pow(norm).sum().item()


def thresholds(x, qmin, qmax, candidates=100, affine=False):
    """All scales of the definition."""
    x = x.float()
    if affine:
        extent, levels = x.max().clamp(min=0) / 2 - x.min().clamp(max=0) / 2, (qmax - qmin) / 2
    else:
        extent = x.abs().max() if qmin < 0 else x.max().clamp(min=0)
        levels = (qmax - qmin) / 2 if qmin < 0 else qmax
    fractions = torch.arange(1, candidates + 1) / candidates
    return (extent * fractions / levels).clamp(2.0**-126, HUGE).unsqueeze(1)


def least(x, qmin, qmax, norm=2.4, candidates=100):
    return min(error(x, s, qmin, qmax, norm) for s in thresholds(x, qmin, qmax, candidates))


def least_affine(x, qmin, qmax, norm=2.4, candidates=100):
    zeros = torch.arange(qmin, qmax + 1).float().unsqueeze(1)
    return min(
        error(x, s, qmin, qmax, norm, z) for s in thresholds(x, qmin, qmax, candidates, affine=True) for z in zeros
    )


def search(backend, x, *args, affine=False, **options):
    """``(scale, zero point or None)``, on the CPU."""
    function = hdrq.ops.search_affine if affine else hdrq.ops.search_scale
    with hdrq.use_backend(backend):
        found = function(x.to(device_of(backend)), *args, **options)
    return tuple(t.cpu() for t in found) if affine else (found.cpu(), None)


def kinds(count, seed=0):
    """Values of every shape that weights and activations have."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(count, generator=generator)
    uniform = torch.rand(count, generator=generator)
    return {
        "normal": normal,
        "rectified": normal.relu(),
        "skewed": normal.exp() - 0.3,
        "heavy-tailed": normal / (uniform + 1e-4),
        "far from zero": normal * 0.01 + 5,
        "few values": (normal * 2).round() / 7,
        "constant": torch.full((count,), -0.7),
        "an outlier": torch.cat([normal[1:] * 1e-3, torch.ones(1)]),
    }


GRIDS = [(-8, 7), (0, 7), (-2, 1)]


@pytest.mark.parametrize(
    ("backend", "grid", "dtype"),
    [
        pytest.param(*backend.values, grid, dtype, marks=backend.marks)
        for backend in BACKENDS
        for i, grid in enumerate(GRIDS)
        for j, dtype in enumerate(FLOATS)
        if i == j or backend.values != ("triton",)  # an interpreter takes seconds: it has each grid and each type once
    ],
)
def test_no_threshold_has_a_smaller_error(backend, grid, dtype):
    x, candidates = sample((1100,), dtype, special=False), 20 if backend == "triton" else 100
    scale, _ = search(backend, x, *grid, candidates=candidates)
    assert error(x, scale, *grid) <= least(x, *grid, candidates=candidates) * BOUND


@pytest.mark.parametrize("backend", FAST)
@few
@hypothesis.given(
    kind=st.sampled_from(list(kinds(1))),
    count=st.integers(1, 40),
    seed=st.integers(0, 99),
    grid=st.sampled_from([(-2, 1), (-8, 7), (0, 15), (-3, 12), (-128, 127), (0, 255)]),
    norm=st.sampled_from([0.5, 1.0, 2.0, 2.4, 4.0]),
    magnitude=st.sampled_from([1.0, 2.0**-100, 2.0**90, HUGE / 400]),
)
def test_any_small_tensor(backend, kind, count, seed, grid, norm, magnitude):
    x = (kinds(count, seed)[kind].double() * magnitude).clamp(-HUGE, HUGE).float()
    scale, _ = search(backend, x, *grid, norm=norm, candidates=20)
    if (scale == 1).all():
        assert not (x.abs() if grid[0] < 0 else x.clamp(min=0)).any()
    else:
        assert error(x, scale, *grid, norm) <= least(x, *grid, norm, candidates=20) * BOUND


@pytest.mark.parametrize("backend", FAST)
@few
@hypothesis.given(
    kind=st.sampled_from(list(kinds(1))),
    count=st.integers(1, 40),
    grid=st.sampled_from([(-2, 1), (0, 15), (-3, 12)]),
    norm=st.sampled_from([1.0, 2.4]),
)
def test_any_small_tensor_with_a_zero_point(backend, kind, count, grid, norm):
    x = kinds(count)[kind]
    scale, zero = search(backend, x, *grid, affine=True, norm=norm, candidates=10)
    assert grid[0] <= zero.item() <= grid[1]
    if x.any():
        assert error(x, scale, *grid, norm, zero) <= least_affine(x, *grid, norm, candidates=10) * BOUND


@pytest.mark.parametrize("kind", kinds(1))
@pytest.mark.parametrize("backend", backend_params(only=("torch", "cpp")))
def test_a_long_tensor_is_ranked_by_its_table(backend, kind):
    x = kinds(LONG + 11)[kind]
    for grid in [(-8, 7)] if backend == "torch" else [(-8, 7), (0, 15), (-128, 127)]:
        scale, _ = search(backend, x, *grid)
        errors = _all_errors(x, thresholds(x, *grid), *grid)
        best = errors.min().item()
        assert _all_errors(x, scale[None], *grid).item() <= best * BOUND


@pytest.mark.parametrize("far", [1, 30, 1000])
@pytest.mark.parametrize("grid", [(-2, 1), (-8, 7), (0, 15)])
@pytest.mark.parametrize("backend", backend_params(only=("torch", "cpp")))
def test_channels_of_a_layer_are_ranked_by_their_tables(backend, grid, far):
    """4,608 inputs, some of them far away: then a table's bins are wider than the steps it ranks."""
    generator = torch.Generator().manual_seed(far)
    x = torch.randn(64, 4608, generator=generator) * (1 + (far - 1) * torch.eye(64, 4608))
    assert ranges._bins(4608, grid[1] - grid[0], affine=False)
    scale, _ = search(backend, x, *grid, axis=0)
    for row, found in zip(x, scale, strict=True):
        best = _all_errors(row, thresholds(row, *grid), *grid).min().item()
        assert _all_errors(row, found.view(1, 1), *grid).item() <= best * BOUND


@pytest.mark.parametrize("count", [3000, LONG // 4])
@pytest.mark.parametrize("kind", kinds(1))
@pytest.mark.parametrize("backend", backend_params(only=("cpp",)))
def test_zero_points_are_ranked_by_few_points(backend, kind, count, monkeypatch):
    """Of the elements, and of a table: a quarter of its bins, which ranks worse, since all pairs take seconds."""
    monkeypatch.setattr(ranges, "BINS", ranges.BINS // 4)
    x = kinds(count)[kind]
    grid = (0, 15)
    scale, zero = search(backend, x, *grid, affine=True)
    zeros = torch.arange(grid[0], grid[1] + 1).float()
    scales = thresholds(x, *grid, affine=True)
    best = min(_all_errors(x, scales, *grid, z).min().item() for z in zeros)
    assert _all_errors(x, scale[None], *grid, zero[0]).item() <= best * BOUND


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_ranks_by_tables(backend, affine, monkeypatch):
    for name, value in {"BINS": 2**10, "COARSE": 2**8, "AFFINE_SHORTLIST": 20}.items():
        monkeypatch.setattr(ranges, name, value)
    x = kinds(2**12 + 5)["skewed"]
    scale, zero = search(backend, x, -2, 1, affine=affine, candidates=12)
    zeros = (-2, -1, 0, 1) if affine else (0,)
    scales = thresholds(x, -2, 1, 12, affine)
    best = min(_all_errors(x, scales, -2, 1, z).min().item() for z in zeros)
    assert _all_errors(x, scale[None], -2, 1, zero if affine else 0).item() <= best * BOUND


def _all_errors(x, scales, qmin, qmax, zero=0.0):
    """The errors of scales (n, 1) on a long tensor: a backend's own sums, which another test holds to the reference."""
    n = len(scales)
    low, high = torch.full((1, n), qmin - float(zero)), torch.full((1, n), qmax - float(zero))
    run = implementation("ranges", "range_errors", x)
    return run(x[None], None, scales.view(1, n), low, high, x.abs().max().view(1), 2.4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_8_bits_with_a_zero_point(backend):
    x = kinds(500)["skewed"]
    options = {} if backend in ("cpp", "torch") else {"candidates": 1}  # the others take minutes for all 25,600
    scale, zero = search(backend, x, 0, 255, affine=True, **options)
    with hdrq.use_backend("cpp" if hdrq.available_backends()["cpp"] is None else "torch"):
        best = min(
            _all_errors(x, thresholds(x, 0, 255, affine=True, **options), 0, 255, z).min().item() for z in range(256)
        )
        assert _all_errors(x, scale[None], 0, 255, zero).item() <= best * BOUND


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_each_channel_has_what_it_would_have_alone(backend, affine):
    x = sample((4, 50, 3), special=False) * torch.tensor([0.1, 1.0, 10.0])
    options = {"affine": affine, "candidates": 4 if backend == "triton" else 10}
    together = search(backend, x, -4, 3, axis=-1, **options)
    alone = [search(backend, x[..., i], -4, 3, **options) for i in range(3)]
    for i in range(1 + affine):
        assert_same_bits(together[i], torch.cat([a[i] for a in alone]))


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(5),
        torch.zeros(0),
        torch.full((3,), 1e-45),
        torch.ones(4),
        -torch.ones(()),
        torch.tensor([3e38, -HUGE]),
        torch.tensor([1e-40, -3e-39]),
        torch.zeros(3, 0),
    ],
)
@pytest.mark.parametrize("qmin", [-8, 0])
def test_any_tensor_has_a_positive_finite_scale(backend, x, qmin, affine):
    scale, zero = search(backend, x, qmin, 7, affine=affine, candidates=3 if backend == "triton" else 10)
    assert scale.shape == (1,)
    assert 0 < scale.item() < torch.inf
    assert not affine or qmin <= zero.item() <= 7


@pytest.mark.parametrize("axis", [0, 1])
def test_an_axis_without_elements(axis):
    assert hdrq.ops.search_scale(torch.zeros(3, 0), -8, 7, axis=axis).tolist() == [1.0] * (3, 0)[axis]
    for found in hdrq.ops.search_affine(torch.zeros(3, 0), 2, 7, axis=axis):
        assert found.shape == ((3, 0)[axis],)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_errors_of_candidates(backend, weighted, dtype):
    """Candidates and lengths beyond every block of the implementations."""
    device = device_of(backend)
    candidates = 18 if backend == "triton" and device == "cpu" else 66  # see conftest.py
    x = sample((2, 1050), dtype, special=False)
    weights = torch.arange(1050).remainder(5).float().expand(2, -1).contiguous() if weighted else None
    scale = torch.linspace(0.001, 0.5, candidates).expand(2, -1).contiguous()
    low, high, unit = torch.full_like(scale, -8), torch.full_like(scale, 7), torch.tensor([0.5, 0.01])
    arguments = [x, weights, scale, low, high, unit]
    with hdrq.use_backend("reference"):
        want = implementation("ranges", "range_errors", x)(*arguments, 2.4)
    with hdrq.use_backend(backend):
        moved = [None if t is None else t.to(device) for t in arguments]
        got = implementation("ranges", "range_errors", moved[0])(*moved, 2.4)
    torch.testing.assert_close(got.cpu(), want, rtol=2e-6, atol=0)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bins", [512, 65536])
@pytest.mark.parametrize("backend", BACKENDS)
def test_tables_have_the_same_bits(backend, bins, dtype):
    device = device_of(backend)
    x = sample((2, 3001), dtype, special=False)
    x[0, 7], x[1] = 3e4, 0.25
    arguments = [x, torch.tensor([-2.0, 0.125]), torch.tensor([2**24 / 3, 3e38])]
    with hdrq.use_backend("reference"):
        want = implementation("ranges", "range_table", x)(*arguments, bins)
    with hdrq.use_backend(backend):
        moved = [t.to(device) for t in arguments]
        got = implementation("ranges", "range_table", moved[0])(*moved, bins)
    assert want[..., 0].sum() == x.numel()
    assert_same_bits(got, want)


@pytest.mark.parametrize("backend", backend_params(only=("cpp",)))
def test_threads_and_instruction_sets(backend):
    from hdrq import _C

    x = kinds(LONG + 7)["skewed"]
    before, isa, found = torch.get_num_threads(), _C.isa(), []
    try:
        for name, threads in [(isa, 1), (isa, 3), *((name, 2) for name in _C.isas())]:
            _C.use_isa(name)
            torch.set_num_threads(threads)
            found.append(torch.cat(search(backend, x, 0, 15, affine=True)))
    finally:
        torch.set_num_threads(before)
        _C.use_isa(isa)
    for other in found[1:]:
        assert_same_bits(other, found[0])


BAD = [
    (ValueError, "norm must be over 0, got 0", {"norm": 0}),
    (ValueError, r"candidates must be in \[1, \d+\], got 0", {"candidates": 0}),
    (ValueError, "x must be finite to search its scale, got 1 ", {"x": torch.tensor([1.0, torch.nan])}),
    (ValueError, "x must be finite to search its scale, got 2 ", {"x": torch.tensor([-torch.inf, 1, torch.inf])}),
]


@pytest.mark.parametrize("op", [hdrq.ops.search_scale, hdrq.ops.search_affine])
@pytest.mark.parametrize(("error", "message", "change"), BAD)
def test_bad_input(op, error, message, change):
    with pytest.raises(error, match=message):
        op(**({"x": torch.ones(3), "qmin": -8, "qmax": 7} | change))
