"""Does training with quantizers sharpen the loss? Curvature of the models of :mod:`hdrq.reproduce.leave_one_out`.

``python -m hdrq.reproduce.sharpness --out DIR`` measures every model in the folder of such a run, and the network that
all start from, on test images of the domains that they were trained on, BatchNorm folded: the top eigenvalue and the
trace of the Hessian of the cross-entropy in the weights (:mod:`hdrq.evaluate.curvature`), and by how much the loss
rises along random directions that are a quarter as large as the filters, mean of both ways, with weights moved and
scales held, and with scales alone moved. Beside them stand the loss, and which test images of each domain are right.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Iterator
from dataclasses import asdict, astuple, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hdrq.checkpoint.files import csv_text, write_atomically
from hdrq.checkpoint.library import load_file
from hdrq.checkpoint.loading import load
from hdrq.evaluate import direction_surface, hessian_top_eigenvalue, hessian_trace
from hdrq.methods.post_training import fold
from hdrq.quantizers.layers import quantized_layers
from hdrq.reproduce.jobs import joined
from hdrq.reproduce.leave_one_out import FOLDED, Job
from hdrq.reproduce.measures import contributions, encoded
from hdrq.reproduce.tasks import task_of

COLUMNS = ("task", "seed", "target", "arm", "bits", "measure", "value", "error")
START = "start"  # the arm of the network that all others go on from
IMAGES = 200  # test images of each domain that a loss is taken of
STEPS, PROBES = 32, 8
DIRECTIONS, REACH = 4, 0.25


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy of a batch of images and labels."""
    return F.cross_entropy(model(batch[0]), batch[1])


def measured(model: nn.Module, job: Job) -> Iterator[tuple[str, Any, Any]]:
    """Measures of a job's model: name, value, standard error."""
    task = task_of(job.task)
    names = (task.source, *task.targets)
    tests = {name: task.load(name, "test") for name in names}
    batches = [(x[:IMAGES], y[:IMAGES]) for name, (x, y) in tests.items() if name != job.target]

    @torch.no_grad()
    def loss(moved: nn.Module) -> float:
        return sum(float(loss_of(moved, batch)) for batch in batches) / len(batches)

    at = loss(model)
    yield "loss", at, ""
    top = hessian_top_eigenvalue(model, loss_of, batches, steps=STEPS)
    yield "top eigenvalue", top.value, top.residual
    trace = hessian_trace(model, loss_of, batches, probes=PROBES).total
    yield "trace", trace.value, trace.standard_error
    for move in ("weights", "scales") if quantized_layers(model) else ("weights",):
        rises = []
        for seed in range(DIRECTIONS):
            surface = direction_surface(model, loss, move=move, directions=1, points=2, reach=REACH, seed=seed)
            rises.append(surface.losses.mean() - at)
        rise = torch.stack(rises)
        yield f"rise, {move} moved", float(rise.mean()), float(rise.std()) / DIRECTIONS**0.5
    found = {name: contributions(model, *pair) for name, pair in tests.items()}
    yield "correct", json.dumps({name: encoded(values) for name, values in found.items()}), ""


def run(folder: Path) -> None:
    """Measure the models of a folder whose rows are not there, and write all rows to ``sharpness.csv``."""
    (folder / "sharpness").mkdir(exist_ok=True)
    with (folder / "rows.csv").open(newline="", encoding="utf-8") as file:
        read = csv.DictReader(file)
        jobs = {Job(row["task"], int(row["seed"]), row["target"], row["arm"], row["bits"]) for row in read}
    for job in sorted(jobs | {replace(job, arm=START, bits="float") for job in jobs}, key=astuple):
        path = folder / "sharpness" / f"{job.id}.csv"
        if not path.is_file():
            rows = [{"measure": m, "value": v, "error": e} for m, v, e in measured(_model(job, folder), job)]
            write_atomically(path, csv_text([{**asdict(job), **row} for row in rows], COLUMNS))
            print(job.id, flush=True)
    write_atomically(folder / "sharpness.csv", joined(folder / "sharpness", COLUMNS))


def _model(job: Job, folder: Path) -> nn.Module:
    """A model of the run, without BatchNorm."""
    task = task_of(job.task)
    if job.bits != "float":
        return load(folder / "models" / f"{job.id}.safetensors", task.network()).eval()
    example = task.load(task.source, "train")[0][:32]
    model = task.network().eval()
    if job.arm == FOLDED:
        model = fold(model, example)
    place = Path("float", job.start) if job.arm == START else Path("models", job.id)
    model.load_state_dict(load_file(folder / f"{place}.safetensors"))
    return fold(model, example)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("leave-one-out"), help="folder of rows and models")
    given = parser.parse_args()
    torch.set_num_threads(1)  # one order of sums on any machine
    run(given.out)
    from hdrq.reproduce.training_tables import tables  # which reads what this module writes

    text = tables(given.out / "sharpness.csv")
    write_atomically(given.out / "tables.md", text)
    print(text)


if __name__ == "__main__":
    main()
