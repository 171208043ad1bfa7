"""The demo: quantize three adapted models, merge their integers, and compare."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from hdrq._version import __version__
from hdrq.calibrate.progress import Step
from hdrq.checkpoint.saving import save as save_model
from hdrq.demo.data import TARGETS, load
from hdrq.demo.model import load_model
from hdrq.evaluate.averaging import average
from hdrq.evaluate.metrics import Row, accuracy
from hdrq.merging.models import merge
from hdrq.methods.post_training import fold, quantize
from hdrq.methods.reconstruct.memory import keep_freed_memory
from hdrq.report.figures import write_bars
from hdrq.report.tables import write_rows

ITERATIONS = 400
CALIBRATION = 1024  # images of each domain, without their labels


@dataclass(frozen=True)
class Result:
    """What the demo found: rows of the table, and the model that HDRQ and the noise-sampled merge made."""

    rows: list[Row]
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

    def row(method: str, models: dict[str, nn.Module]) -> Row:
        return Row(method, {domain: accuracy(models[domain], *tests[domain]) for domain in TARGETS})

    def everywhere(model: nn.Module) -> dict[str, nn.Module]:
        return dict.fromkeys(TARGETS, model)

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

    full = average([fold(adapted[domain], images[domain][:32]) for domain in TARGETS])
    nearest = quantized("rtn")
    learned = quantized("hdrq", source=source, iterations=ITERATIONS)
    merged = merge(learned, seed=seed)
    rows = [
        row("full precision", everywhere(full)),
        row("round to nearest, naive merge", everywhere(merge(nearest, noise="none", draws=1))),
        row("HDRQ, naive merge", everywhere(merge(learned, noise="none", draws=1))),
        row("HDRQ, noise-sampled merge", everywhere(merged)),
    ]
    return Result(rows, merged)


def save(result: Result, folder: Path, bits: str, seed: int) -> None:
    """Write the table (CSV and JSON), the figure, and the merged model."""
    facts = {"bits": bits, "seed": seed, "hdrq": __version__, "torch": torch.__version__}
    write_rows(result.rows, folder, facts)
    write_bars(result.rows, folder / "figure.png", f"Three digit domains merged into one {bits} model")
    save_model(result.merged, folder / "merged.safetensors")
