"""Triton's interpreter stands in for a GPU, and must be asked for before triton is imported."""

import itertools
import os
import zlib
from collections import defaultdict

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # there is a worker for each core

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(config, items):
    """Of a test's interpreted Triton cases few run, since Python takes long for what the same code does with each
    dtype, range and axis. HDRQ_ALL_CASES=1 runs them all, as a GPU does."""
    if "TRITON_INTERPRET" not in os.environ or "HDRQ_ALL_CASES" in os.environ:
        return
    cases = defaultdict(list)
    for item in items:
        if hasattr(item, "callspec") and item.callspec.params.get("backend") == "triton":
            cases[item.function].append(item)
    left_out = set()
    for own in cases.values():
        left_out |= set(own) - set(spread(own))
    if left_out:
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = [item for item in items if item not in left_out]


def spread(cases):
    """An eighth of a test's cases, or as many as it takes: in an order that hashes of their names give, every case with
    a value of a parameter that none before it has, then others.

    A value is told by its identity, which the cases that ``parametrize`` makes share; ``callspec.indices`` number the
    cases in pytest 9, and no longer the values.
    """
    seen, chosen, others = set(), [], []
    for case in sorted(cases, key=lambda case: zlib.crc32(case.nodeid.encode())):
        values = {(name, id(value)) for name, value in case.callspec.params.items()}
        (others if values <= seen else chosen).append(case)
        seen |= values
    return chosen + others[: max(0, len(cases) // 8 - len(chosen))]


@pytest.fixture
def every_step_kept(monkeypatch):
    """No unit goes back to where it started, however little it has learned."""
    from hdrq.methods.reconstruct.learner import Learner

    lower = itertools.count(0, -1)
    monkeypatch.setattr(Learner, "_distance", lambda self: 1e9 * next(lower))
