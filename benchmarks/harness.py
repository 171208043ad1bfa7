"""Verify, then time: providers of one operation, in turn, on pinned cores, with the machine's copy as the limit.

A provider is a function without arguments. They run in turn, so that a machine that changes speed changes it for all;
ratios are medians over medians of one run. On a GPU ``triton.testing.do_bench`` times each provider.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch

import hdrq
from hdrq.info import facts

ROUNDS = 7
SHORTEST = 5e-3  # seconds that a measurement lasts at least: fast providers are repeated inside it


@dataclass(frozen=True)
class Provider:
    """One way to do the operation, and the bytes that it must move for each element."""

    name: str
    run: Callable
    bytes_per_element: int
    allocates: bool = True  # whether its result is new memory, whose pages the first touch pays for


@dataclass(frozen=True)
class Figure:
    """What was measured for one provider at one size: quantiles of nanoseconds per element."""

    operation: str
    provider: str
    elements: int
    threads: int
    p20: float
    p50: float
    p80: float
    gigabytes_per_second: float
    over_copy: float  # time as a multiple of the copy that allocates as this provider does
    speedup: float  # of this provider over the official eager formula


def bench(op: str, inputs: Callable, verify: Callable, operations: dict[str, Callable]) -> None:
    """The main program of a bench: verify, then measure, every operation at every size and number of threads.

    ``inputs(size, device)`` makes the arguments of ``verify`` and of the functions in ``operations``. Each of those
    gives the providers to compare, the two copies first.
    """
    options = arguments(op)
    figures: list[Figure] = []
    for threads in dict.fromkeys(options.threads):
        pin(threads)
        for size in options.sizes:
            tensors = inputs(size, options.device)
            verify(*tensors)
            for name, providers in operations.items():
                figures += measure(f"{op} {name}", providers(*tensors), size, threads, options.device)
    report(f"{op}, float32", figures, options.out)


def normal(size: int, device: str) -> torch.Tensor:
    """Normal values, the same at every run."""
    return torch.randn(size, generator=torch.Generator().manual_seed(0)).to(device)


def arguments(op: str) -> argparse.Namespace:
    """The options that all benches share."""
    parser = argparse.ArgumentParser(description=f"Verify and time {op}.")
    parser.add_argument("--sizes", type=int, nargs="+", default=[2**12, 2**16, 2**20, 2**24], help="elements")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, os.cpu_count()], help="each gives a table")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="path without ending: writes .csv and .json")
    return parser.parse_args()


def pin(threads: int) -> None:
    """Use ``threads`` threads on as many cores."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, set(sorted(_CORES)[:threads]))
    torch.set_num_threads(threads)


_CORES = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()


def measure(operation: str, providers: list[Provider], elements: int, threads: int, device: str) -> list[Figure]:
    """Figures of all providers at one size. The first two are the copies: into memory that exists, and into new."""
    times = _times_on_gpu(providers) if device == "cuda" else _times_on_cpu(providers)
    nanoseconds = {name: [1e9 * t / elements for t in samples] for name, samples in times.items()}
    medians = {name: statistics.median(samples) for name, samples in nanoseconds.items()}
    copies = {p.allocates: medians[p.name] for p in providers[:2]}
    official = next((medians[p.name] for p in providers if p.name.startswith("official")), float("nan"))
    figures = []
    for p in providers:
        p20, p50, p80 = (statistics.quantiles(nanoseconds[p.name], n=10)[i] for i in (1, 4, 7))
        over, faster = p50 / copies[p.allocates], official / p50
        figures.append(
            Figure(operation, p.name, elements, threads, p20, p50, p80, p.bytes_per_element / p50, over, faster)
        )
    return figures


def _times_on_cpu(providers: list[Provider]) -> dict[str, list[float]]:
    repeats = {}
    for p in providers:
        p.run()  # compiles, touches memory
        start = time.perf_counter()
        p.run()
        repeats[p.name] = max(1, round(SHORTEST / max(time.perf_counter() - start, 1e-7)))
    times: dict[str, list[float]] = {p.name: [] for p in providers}
    for _ in range(ROUNDS):
        for p in providers:
            start = time.perf_counter()
            for _ in range(repeats[p.name]):
                p.run()
            times[p.name].append((time.perf_counter() - start) / repeats[p.name])
    return times


def _times_on_gpu(providers: list[Provider]) -> dict[str, list[float]]:
    from triton.testing import do_bench

    return {p.name: [ms / 1e3 for ms in do_bench(p.run, return_mode="all")] for p in providers}


def report(title: str, figures: list[Figure], out: Path | None) -> None:
    """Print a table for each size and number of threads; write all figures where ``out`` says."""
    print(
        f"\n{title}\n{platform.machine()}, {facts()['processor']}, torch {torch.__version__}, hdrq {hdrq.__version__}"
    )
    for key in dict.fromkeys((f.operation, f.elements, f.threads) for f in figures):
        print(f"\n{key[0]}, {key[1]:,} elements, {key[2]} thread{'s' * (key[2] > 1)}")
        print(f"{'':38}{'ns/element p20 / p50 / p80':>30}{'GB/s':>8}{'x copy':>9}{'speed-up':>10}")
        for f in figures:
            if (f.operation, f.elements, f.threads) == key:
                quantiles = f"{f.p20:.3f} / {f.p50:.3f} / {f.p80:.3f}"
                print(f"{f.provider:38}{quantiles:>30}{f.gigabytes_per_second:8.1f}{f.over_copy:9.2f}{f.speedup:10.1f}")
    if out is not None:
        rows = [asdict(f) for f in figures]
        with open(out.with_suffix(".csv"), "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()} for row in rows)
        taken = datetime.now(timezone.utc).isoformat(timespec="seconds")
        record = {"title": title, "taken": taken, **facts(), "figures": rows}
        out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")


def compiled(function: Callable, *args) -> Callable | None:
    """``torch.compile`` of a function, tried on arguments; None, and a word why, where that fails."""
    fast = torch.compile(function)
    try:
        fast(*args)
    except Exception as error:
        print(f"torch.compile left out: {type(error).__name__}: {str(error).splitlines()[0]}")
        return None
    return fast
