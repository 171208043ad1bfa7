"""What the tests share: backends as parameters, the comparison of bits, inputs with every kind of element."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

import hdrq
from hdrq.checkpoint.format import Reader

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MISSING = hdrq.available_backends()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def backend_params(*, only=None):
    """The backends as test parameters; one that is missing here is skipped with its reason."""
    return [
        pytest.param(name, marks=pytest.mark.skipif(why is not None, reason=f"{name}: {why}"))
        for name, why in MISSING.items()
        if only is None or name in only
    ]


def device_of(backend: str) -> str:
    """Where a backend's tensors must be."""
    return DEVICE if backend == "triton" else "cpu"


def assert_same_bits(got: torch.Tensor, want: torch.Tensor) -> None:
    """Every bit equal (a NaN is a NaN, whatever its payload); says how many differ and where first."""
    got, want = got.detach().cpu(), want.detach().cpu()
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    if got.is_floating_point():
        nan = got.isnan() & want.isnan()
        same = ((got == want) & (got.signbit() == want.signbit())) | nan
    else:
        same = got == want
    if not same.all():
        wrong = (~same).flatten().nonzero().flatten()
        first = int(wrong[0])
        values = f"{got.flatten()[first].item()!r}, not {want.flatten()[first].item()!r}"
        raise AssertionError(f"{len(wrong)} of {got.numel()} elements differ, first at {first}: {values}")


def sample(shape, dtype=torch.float32, *, scale=1.0, seed=0, special=True) -> torch.Tensor:
    """Normal values, with NaN, infinities, ties, zeros of both signs and a huge value among the first elements."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
    if special:
        extremes = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.125, 0.375, -0.125, 0.0, -0.0, 3e38, 1e-40])
        flat = x.view(-1)
        flat[: min(len(extremes), flat.numel() // 2)] = extremes[: flat.numel() // 2]
    return x.to(dtype)


def scales(count: int, seed: int = 0) -> torch.Tensor:
    """Positive scales, the first of them ¼: so that eighths are ties."""
    s = torch.rand(count, generator=torch.Generator().manual_seed(seed)) * 0.3 + 0.02
    s[:1] = 0.25
    return s


def length(x: torch.Tensor, axis: int | None) -> int:
    """How many scales a tensor has."""
    return 1 if axis is None else x.shape[axis]


SHAPES = [  # with the axis of the scales
    ((1,), None),
    ((), None),
    ((0,), None),
    ((7,), None),
    ((1029,), None),
    ((3, 0, 2), 0),
    ((6, 3, 3, 3), 0),
    ((5, 4, 3), 1),
    ((9, 70), -1),
    ((2, 1100), 0),
]
RANGES = [(-2, 1), (-8, 7), (0, 15), (-128, 127), (0, 255)]
CASES = list(itertools.product(SHAPES, RANGES[1:3])) + [(((6, 3, 3, 3), 0), r) for r in RANGES]


def assert_sums_close(got: torch.Tensor, want: torch.Tensor, terms: torch.Tensor, axis: int | None) -> None:
    """Each channel's sum within 1e-6 of ``want``, relative to the magnitudes of its own ``terms``: contract 2."""
    rows = (terms[None] if axis is None else terms.movedim(axis, 0))[..., None]
    magnitude = rows.double().abs().flatten(1).sum(1)
    wrong = (got.double() - want.double()).abs() > 1e-6 * magnitude
    assert not wrong.any(), (got[wrong], want[wrong], magnitude[wrong])


def state(model):
    """A copy of the state of a model."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def files_that_hold(model):
    """For each parameter of more than one element, the file that its memory is mapped from; "" for none."""
    places = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, _, _, _, *path = line.split(maxsplit=5)
        low, high = (int(part, 16) for part in span.split("-"))
        places.append((low, high, path[0] if path else ""))
    return {
        name: next(path for low, high, path in places if low <= p.data_ptr() < high)
        for name, p in model.named_parameters()
        if p.numel() > 1
    }


def same(a, b):
    """Whether two states are equal, tensor by tensor."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def merged_content(path):
    """All that a merged file holds but the hashes of what it was merged of, which models in memory have not."""
    with Reader(path) as file:
        models = [{key: fact for key, fact in parent.items() if key != "sha256"} for parent in file.manifest["models"]]
        return {**file.manifest, "models": models}, file.specs  # the manifest has the hash of each tensor


def per_element(x, s, axis):
    """The scale of each element, flat."""
    shape = [1] * x.ndim
    if axis is not None:
        shape[axis] = -1
    return s.reshape(shape).expand(x.shape).flatten().numpy()
