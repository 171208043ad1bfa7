"""The demo: quantize three adapted models, merge their integers, and compare."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path

import torch
from torch import nn

from hdrq._version import __version__
from hdrq.calibrate.progress import Step
from hdrq.checkpoint.saving import save as save_model
from hdrq.demo.data import TARGETS, load
from hdrq.demo.model import load_model
from hdrq.evaluate.averaging import average
from hdrq.evaluate.metrics import Row, accuracy, harmonic_mean
from hdrq.merging.models import merge
from hdrq.methods.post_training import fold, quantize
from hdrq.methods.reconstruct.memory import keep_freed_memory
from hdrq.report.figures import write_bars
from hdrq.report.tables import write_rows

ITERATIONS = 400
CALIBRATION = 1024  # images of each domain, without their labels


@dataclass(frozen=True)
class Result:
    """What the demo found, and the model that HDRQ and systematic rounding made of all three."""

    rows: list[Row]  # of models merged from all three: accuracies by domain
    pairs: list[Row]  # of models merged from two: by pair, the harmonic mean of the accuracies on its domains
    merged: nn.Module


@contextmanager
def one_thread() -> Iterator[None]:
    """The order of sums in convolutions follows the number of threads: one gives the same table on any."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@one_thread()
@keep_freed_memory()
def run(bits: str, seed: int, progress: Callable[[str, Step], None]) -> Result:
    """Quantize and merge the shipped models; ``progress`` is told the domain and the step."""
    images = {domain: load(domain, "train")[0][:CALIBRATION] for domain in TARGETS}
    tests = {domain: load(domain, "test") for domain in TARGETS}
    source = load_model("source")
    adapted = {domain: load_model(domain) for domain in TARGETS}

    def scores(model: nn.Module, domains: Sequence[str]) -> dict[str, float]:
        return {domain: accuracy(model, *tests[domain]) for domain in domains}

    def quantized(recipe: str, **options) -> list[nn.Module]:
        return [
            quantize(
                adapted[domain],
                images[domain],
                recipe,
                bits=bits,
                seed=seed,
                progress=partial(progress, domain),
                **options,
            )
            for domain in TARGETS
        ]

    full = [fold(adapted[domain], images[domain][:32]) for domain in TARGETS]
    nearest = quantized("rtn")
    learned = quantized("hdrq", source=source, iterations=ITERATIONS)
    methods: dict[str, tuple[list[nn.Module], Callable[[list[nn.Module]], nn.Module]]] = {
        "full precision": (full, average),
        "round to nearest, naive merge": (nearest, partial(merge, rule="half-even")),
        "HDRQ, naive merge": (learned, partial(merge, rule="half-even")),
        "HDRQ, noise-sampled merge": (learned, partial(merge, rule="noise", seed=seed)),
        "HDRQ, systematic merge": (learned, partial(merge, rule="systematic", seed=seed)),
    }
    merged = {name: make(models) for name, (models, make) in methods.items()}
    rows = [Row(name, scores(model, TARGETS)) for name, model in merged.items()]
    pairs = []
    for name, (models, make) in methods.items():
        both = {}
        for i, j in combinations(range(len(TARGETS)), 2):
            found = scores(make([models[i], models[j]]), (TARGETS[i], TARGETS[j]))
            both[f"{TARGETS[i]} + {TARGETS[j]}"] = harmonic_mean(found.values())
        pairs.append(Row(name, both))
    return Result(rows, pairs, merged["HDRQ, systematic merge"])


def save(result: Result, folder: Path, bits: str, seed: int) -> None:
    """Write both tables (CSV and JSON), the figure, and the merged model."""
    facts = {"bits": bits, "seed": seed, "hdrq": __version__, "torch": torch.__version__}
    write_rows(result.rows, folder, facts)
    write_rows(result.pairs, folder, facts, name="pairs")
    panels = {f"Two models merged into one {bits} model": result.pairs, "Three": result.rows}
    write_bars(panels, folder / "figure.png")
    save_model(result.merged, folder / "merged.safetensors")
