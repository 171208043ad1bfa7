"""Verify, then time: the providers of one operation, in turn, on pinned cores, with the machine's copy as the limit.

A provider is a function without arguments. They run in turn, so that a machine that changes speed changes it for all;
ratios are medians over medians of one table. ``triton.testing.do_bench`` times the rounds on a GPU.
"""

from __future__ import annotations

import importlib
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import torch

import hdrq

COPY, CLONE = "copy into existing memory", "clone"
CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
ROUNDS = 5  # at least
SHORTEST = 5e-3  # seconds that a measurement lasts at least: fast providers are repeated inside it
SECONDS = 1.0  # that a table is given when nothing limits the run


class Mismatch(Exception):
    """What was to be timed does not compute what it should."""


@dataclass(frozen=True)
class Provider:
    """One way to do the operation, and the bytes that it must move for each element."""

    name: str  # "hdrq…" if it is ours, and the first of those is what a user calls; "official…" if it is the baseline
    run: Callable
    bytes_per_element: float
    allocates: bool = True  # whether its result is new memory, whose pages the first touch pays for

    @property
    def ours(self) -> bool:
        return self.name.startswith("hdrq")


@dataclass(frozen=True)
class Bench:
    """A family of operations on the same inputs. Each operation is one job, done by several providers.

    ``inputs(shape, device, dtype)`` makes the arguments of ``verify``, which raises :class:`Mismatch`, and of the
    functions in ``operations``. Each of those gives the providers to compare, :func:`copies` first.
    """

    op: str
    inputs: Callable
    verify: Callable
    operations: dict[str, Callable]
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)


@dataclass(frozen=True)
class Figure:
    """What was measured for one provider in one table. Times are nanoseconds per element."""

    family: str
    operation: str
    case: str  # the layer, or the number of elements
    elements: int
    dtype: str
    threads: int
    provider: str
    p20: float
    p50: float
    p80: float
    bytes_per_element: float
    gigabytes_per_second: float
    floor: float  # time of its bytes at the bandwidth of this table's copy into existing memory
    reached: float  # floor over p50: the share of the machine's speed
    over_copy: float  # time as a multiple of the copy that allocates as this provider does
    speedup: float | None  # over the official eager formula


@dataclass(frozen=True)
class Plan:
    """What to time: every family at every case, in every type it takes, on every number of threads."""

    families: list[str]
    cases: list[tuple[str, tuple[int, ...]]]
    dtypes: list[torch.dtype] = field(default_factory=lambda: [torch.float32])
    threads: list[int] = field(default_factory=lambda: [1])
    device: str = "cpu"
    seconds: float | None = None  # for all of it
    compile: bool = True  # whether torch.compile takes part


@dataclass
class Result:
    """Figures; verifications that failed; tables and providers that were left out, and why."""

    figures: list[Figure] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def families() -> list[str]:
    """Every family that has a bench."""
    return sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py"))


def load(family: str) -> Bench:
    """The bench of a family."""
    return importlib.import_module(f"hdrq.benchmarks.bench_{family}").BENCH


def run(plan: Plan, show: Callable[[str, float], None] = lambda text, share: None) -> Result:
    """Verify, then measure. ``show`` is told what comes next, and the share of the tables that are done."""
    result = Result()
    benches = [(family, load(family)) for family in plan.families]
    groups = [
        (family, bench, case, dtype, threads)
        for case, dtype, threads in product(plan.cases, plan.dtypes, plan.threads)
        for family, bench in benches  # innermost: who runs out of time has seen a bit of each
        if dtype in bench.dtypes
    ]
    for (family, bench), dtype in product(benches, plan.dtypes):
        if dtype not in bench.dtypes:
            result.left_out.append(f"{family}: takes {', '.join(map(name, bench.dtypes))}, not {name(dtype)}")
    tables, done = sum(len(bench.operations) for _, bench, *_ in groups), 0
    end = math.inf if plan.seconds is None else time.monotonic() + plan.seconds
    for family, bench, (case, shape), dtype, threads in groups:
        label = f"{bench.op}, {case}, {name(dtype)}, {threads} thread{'s' * (threads > 1)}"
        if time.monotonic() > end:
            result.left_out.append(f"{label}: out of time")
            continue
        with pinned(threads):
            tensors = bench.inputs(shape, plan.device, dtype)
            try:
                bench.verify(*tensors)
            except Mismatch as mismatch:
                result.failures.append(f"{label}: {mismatch}")
                done += len(bench.operations)
                continue
            for operation, providers in bench.operations.items():
                show(f"{operation}: {label}", done / tables)
                usable, why = _usable(providers(*tensors), plan.compile)
                result.left_out += [f"{operation}: {label}: {reason}" for reason in why]
                times = _times(usable, plan.device, min(SECONDS, (end - time.monotonic()) / (tables - done)))
                key = (family, f"{bench.op} {operation}", case, math.prod(shape), name(dtype), threads)
                result.figures += _figures(key, usable, times)
                done += 1
    order = {family: i for i, family in enumerate(plan.families)}
    result.figures.sort(key=lambda f: order[f.family])
    return result


def name(dtype: torch.dtype) -> str:
    """``float32``, not ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def normal(shape: tuple[int, ...], device: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Normal values, the same at every run."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def head(x: torch.Tensor) -> torch.Tensor:
    """The first elements, few enough for the reference."""
    return x.flatten()[: 2**14]


def copies(x: torch.Tensor) -> list[Provider]:
    """The limit: a copy into memory that exists, and one into new memory, whose pages the first touch pays for."""
    y, moved = torch.empty_like(x).copy_(x), 2 * x.element_size()
    return [Provider(COPY, lambda: y.copy_(x), moved, allocates=False), Provider(CLONE, x.clone, moved)]


def compiled(function: Callable, *args) -> Callable:
    """``torch.compile`` of a function of these arguments, for their shapes alone. It compiles when it first runs."""
    fast = torch.compile(function, dynamic=False)
    return lambda: fast(*args)


def kernel_alone(
    x: torch.Tensor,
    scale: torch.Tensor,
    qmin: int,
    qmax: int,
    rng: torch.Tensor | None = None,
    cumulative: torch.Tensor | None = None,
) -> list[Provider]:
    """The C++ quantizer into memory that exists, where there is one; with noise if there is a random state."""
    if x.device.type != "cpu" or hdrq.available_backends()["cpp"] is not None:
        return []
    from hdrq import _C
    from hdrq.backends import native

    y = torch.empty_like(x).copy_(x)
    all_kept = (None, rng, hdrq.rng.KEEP_ALL)
    q = native.quantizer(x, scale, None, qmin, qmax, *all_kept, noise=rng is not None, cumulative=cumulative)
    arguments = (native.FLOATS[x.dtype], [q], [y.data_ptr()])
    run = lambda outlive=(x, y): _C.quantizer_forward(torch.get_num_threads(), *arguments)  # noqa: E731
    return [Provider("hdrq, kernel alone", run, 2 * x.element_size(), allocates=False)]


def same_as_reference(what: str, operation: Callable) -> None:
    """Raise :class:`Mismatch` unless an operation gives the reference's bits with the backend in use."""
    got = operation()
    with hdrq.use_backend("reference"):
        expected = operation()
    if not torch.equal(got, expected):
        raise Mismatch(f"{what} differs from the reference in {int((got != expected).sum())} of {got.numel()} elements")


@contextmanager
def pinned(threads: int) -> Iterator[None]:
    """Use ``threads`` threads on as many cores."""
    before = torch.get_num_threads()
    set_cores = getattr(os, "sched_setaffinity", lambda process, cores: None)
    set_cores(0, CORES[:threads])
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        set_cores(0, CORES)
        torch.set_num_threads(before)


def _usable(providers: list[Provider], compile: bool) -> tuple[list[Provider], list[str]]:
    """Run each provider once, which compiles and touches memory. Those that fail are left out, with a word why."""
    torch.compiler.reset()  # or the ninth shape of a function would run uncompiled
    usable, left_out = [], []
    for p in providers:
        if "torch.compile" in p.name and not compile:
            continue
        try:
            p.run()
        except Exception as error:
            if p.ours:
                raise
            left_out.append(f"{p.name} fails, {type(error).__name__}: {str(error).partition(chr(10))[0]}")
        else:
            usable.append(p)
    return usable, left_out


def _times(providers: list[Provider], device: str, seconds: float) -> list[list[float]]:
    """Seconds of each provider, in rounds, until ``seconds`` are over."""
    measure = _on_gpu if device == "cuda" else _on_cpu
    rounds = [measure(p.run, seconds / (ROUNDS * len(providers))) for p in providers]
    times: list[list[float]] = [[] for _ in providers]
    start, done = time.monotonic(), 0
    while done < ROUNDS or time.monotonic() - start < seconds:
        done += 1
        for samples, once in zip(times, rounds, strict=True):
            samples += once()
    return times


def _on_cpu(run: Callable, seconds: float) -> Callable[[], list[float]]:
    start = time.perf_counter()
    run()
    repeats = max(1, round(SHORTEST / max(time.perf_counter() - start, 1e-7)))

    def once() -> list[float]:
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        return [(time.perf_counter() - start) / repeats]

    return once


def _on_gpu(run: Callable, seconds: float) -> Callable[[], list[float]]:
    from triton.testing import do_bench

    return lambda: [ms / 1e3 for ms in do_bench(run, warmup=5, rep=max(1, 1e3 * seconds), return_mode="all")]


def _figures(key: tuple, providers: list[Provider], times: list[list[float]]) -> list[Figure]:
    """The figures of a table. Its first two providers are the copies."""
    elements = key[3]
    nanoseconds = [[1e9 * t / elements for t in samples] for samples in times]
    medians = [statistics.median(samples) for samples in nanoseconds]
    copy = {p.allocates: median for p, median in zip(providers[:2], medians, strict=False)}
    official = next((m for p, m in zip(providers, medians, strict=True) if p.name.startswith("official")), None)
    bandwidth = providers[0].bytes_per_element / medians[0]
    figures = []
    for p, samples, p50 in zip(providers, nanoseconds, medians, strict=True):
        deciles = statistics.quantiles(samples, n=10, method="inclusive")
        floor = p.bytes_per_element / bandwidth
        figures.append(
            Figure(
                *key,
                provider=p.name,
                p20=deciles[1],
                p50=p50,
                p80=deciles[7],
                bytes_per_element=p.bytes_per_element,
                gigabytes_per_second=p.bytes_per_element / p50,
                floor=floor,
                reached=floor / p50,
                over_copy=p50 / copy[p.allocates],
                speedup=official and official / p50,
            )
        )
    return figures
