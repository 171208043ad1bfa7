"""Two processes against one: ``python -m hdrq.benchmarks.distributed --out NAME``.

A run of :func:`hdrq.quantize` on a small ResNet (stem, bottlenecks, linear layer), QDrop at W4A4, batch 32, in three
ways that take turns: one process with one thread, one process with two, and two processes with one thread each, which
exchange by gloo. What is printed are medians of ratios within a turn, of the time of the clock and of the processor's:
the latter leaves out what other programs took, and waiting, so it bounds what idle cores would give.

Before anything is timed, both ranks have the same bits, and with ``--seeds`` the errors of what one and two processes
made are compared on data held out, seed by seed.
"""

from __future__ import annotations

import argparse
import json
import math
import socket
import statistics
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import hdrq
from hdrq.backends.info import facts
from hdrq.benchmarks.released import Bottleneck
from hdrq.checkpoint.workdir import state_hash
from hdrq.report import report_of

WAYS = {"one process, 1 thread": (1, 1), "one process, 2 threads": (1, 2), "two processes, 1 thread each": (2, 1)}


def network(width: int, blocks: int) -> nn.Module:
    """A stem of stride 2, residual blocks of ``4·width`` channels, a linear layer: random weights."""
    torch.manual_seed(0)
    body = [Bottleneck(width) for _ in range(blocks)]
    stem = nn.Conv2d(3, 4 * width, 3, stride=2, padding=1), nn.ReLU()
    return nn.Sequential(*stem, *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10)).eval()


def images(count: int, seed: int) -> torch.Tensor:
    """Smooth random images, (count, 3, 28, 28)."""
    return torch.randn((count, 3, 28, 28), generator=torch.Generator().manual_seed(seed)).cumsum(3) * 0.5


class Runs:
    """The same run in each of the ways, on a rank of two."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.rank = options, dist.get_rank()
        self.model = network(options.width, options.blocks)
        self.data, self.held_out = images(options.samples, 1), images(128, 2)

    def quantized(self, way: str, seed: int = 0) -> nn.Module | None:
        """What this rank makes; None where it takes no part."""
        processes, threads = WAYS[way]
        dist.barrier()
        if self.rank >= processes:
            return None
        torch.set_num_threads(threads)
        group = dist.group.WORLD if processes > 1 else None
        how = {"iterations": self.options.iterations, "progress": False, "seed": seed, "held_out": self.held_out}
        return hdrq.quantize(self.model, self.data, "qdrop", process_group=group, **how)

    def seconds(self, way: str) -> tuple[float, float]:
        """Of the clock and of the processor, of this rank."""
        dist.barrier()
        began, used = time.perf_counter(), time.process_time()
        self.quantized(way)
        return time.perf_counter() - began, time.process_time() - used


def serve(rank: int, options: argparse.Namespace, port: int, results) -> None:
    """What each of the two processes does."""
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    runs, (one, _, two) = Runs(options), WAYS
    model = runs.quantized(two)
    bits: list[str] = ["", ""]
    dist.all_gather_object(bits, state_hash(model.state_dict()))  # type: ignore[union-attr]
    if len(set(bits)) > 1:
        raise SystemExit(f"both ranks must have the same bits, got {bits}")
    errors = []
    for seed in range(options.seeds):
        made = [runs.quantized(way, seed) for way in (one, two)]
        if rank == 0:
            errors.append([-10 * math.log10(report_of(each).errors["output"]) for each in made])  # type: ignore[arg-type]
    turns = [{way: runs.seconds(way) for way in WAYS} for _ in range(options.turns)]
    if rank == 0:
        results.put((turns, errors))
    dist.barrier()
    dist.destroy_process_group()


def ratios(turns: list, clock: int) -> dict[str, list[float]]:
    """How many times as fast each way was as the first, turn by turn."""
    first = next(iter(WAYS))
    return {way: [turn[first][clock] / turn[way][clock] for turn in turns] for way in WAYS if way != first}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=32, help="of a bottleneck; blocks have 4 times as many channels")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--iterations", type=int, default=40)
    parser.add_argument("--turns", type=int, default=7, help="2 at least: what is printed are quartiles")
    parser.add_argument("--seeds", type=int, default=0, help="of runs whose errors are compared")
    parser.add_argument("--out", type=Path, help="without an ending: JSON")
    options = parser.parse_args()
    if options.turns < 2 or options.seeds == 1:
        parser.error("--turns must be 2 at least, and --seeds 0 or 2 at least, for there to be a spread")
    print(f"{facts()['processor']}, torch {torch.__version__}, width {options.width}, {options.iterations} iterations")
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(serve, (options, port, results), nprocs=2)
    turns, errors = results.get()
    figures = []
    for way in WAYS:
        seconds = statistics.median(turn[way][0] for turn in turns)
        print(f"{way:30}{seconds:8.2f} s")
        figures.append({"way": way, "seconds": seconds})
    for clock, name in enumerate(("clock", "processor")):
        for way, each in ratios(turns, clock).items():
            if clock and WAYS[way][1] > 1:
                continue  # a processor's time counts both threads
            low, median, high = statistics.quantiles(each, n=4, method="inclusive")
            print(f"{way}: {median:.2f} times as fast ({low:.2f} to {high:.2f}) as one thread, by the {name}")
            figures.append({"way": way, "by": name, "speed_up": median, "p25": low, "p75": high})
    if errors:
        gains = [two - one for one, two in errors]
        mean, spread = statistics.mean(gains), statistics.stdev(gains)
        ones, twos = (statistics.mean(column) for column in zip(*errors, strict=True))
        print(f"signal over error, {len(gains)} seeds: one process {ones:.2f} dB, two {twos:.2f} dB; "
              f"difference {mean:+.2f}, sd {spread:.2f}")  # fmt: skip
        figures.append({"seeds": len(gains), "one": ones, "two": twos, "difference": mean, "sd": spread})
    if options.out is not None:
        settings = {name: value for name, value in vars(options).items() if name != "out"}
        record = {"title": "one process and two", **facts(), "settings": settings, "figures": figures}
        options.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
