"""Training with one domain left out, as jobs: plain LSQ, sharpness-aware steps, and the freezing presets.

``python -m hdrq.reproduce.leave_one_out --out DIR`` runs what is missing in a folder; rows of several machines in one
folder are one run. All arms of a seed and a target start from one network in full precision, which never saw the
target; they read the same samples in the same order for the same number of epochs. The left-out domain's accuracy is
that of its test images. Nothing was chosen by a result: rates are LSQ's, rho and alpha SAGM's, K and tau guesses.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hdrq import checks
from hdrq._version import __version__
from hdrq.checkpoint.files import csv_text, write_atomically
from hdrq.checkpoint.library import load_file
from hdrq.checkpoint.library import save as to_bytes
from hdrq.checkpoint.saving import save
from hdrq.methods.post_training import fold
from hdrq.qat.settings import SELECTIONS
from hdrq.qat.training import Trained, selected, train
from hdrq.reproduce.jobs import file_name, joined, shard_of
from hdrq.reproduce.tasks import task_of

SAMPLES = 1000  # of each training domain
FLOAT: dict[str, Any] = {"bits": "float", "optimizer": "adam", "lr": 2e-3, "epochs": 12, "label_smoothing": 0.1}
QAT: dict[str, Any] = {"epochs": 12, "lr": 0.01, "per_channel": True}
RULE = {"period": 60, "tau": 0.25}  # some six decisions a run
FOLDED = "float, folded"  # BatchNorm is folded before, as in arms that quantize
ARMS: dict[str, dict[str, Any]] = {
    "float": {"bits": "float", "per_channel": False},
    FOLDED: {"bits": "float", "per_channel": False},
    "LSQ": {},
    "LSQ+SAM": {"flatness": "sam"},
    "LSQ+SAGM": {"flatness": "sagm"},
    "gaqat_a": {"flatness": "sagm", "freeze": "gaqat_a", "rule": RULE},
    "gaqat_b": {"flatness": "sagm", "freeze": "gaqat_b", "rule": RULE},
    "fqat": {"flatness": "sagm", "freeze": "fqat", "rule": {"period": 60}},
    "alternate": {"flatness": "sagm", "freeze": "alternate", "rule": {"period": 60}},
    "forever": {"flatness": "sagm", "freeze": "forever", "rule": RULE},
}
COLUMNS = ("task", "seed", "target", "arm", "bits", "selection", "epoch", "in_domain", "out_of_domain", "frozen",
           "seconds", "hdrq", "torch")  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One arm, with one domain left out."""

    task: str
    seed: int
    target: str
    arm: str
    bits: str

    @property
    def id(self) -> str:
        """A name for files."""
        return "-".join(file_name(part) for part in astuple(self))

    @property
    def start(self) -> str:
        """That of the network that all arms start from."""
        return f"{self.task}-{self.seed}-{self.target}"


def grid(task: str, seeds: Iterable[int], bits: Iterable[str], arms: Iterable[str] = tuple(ARMS)) -> list[Job]:
    """Every arm with every domain left out, seed after seed; arms that go on in float, once for all bits."""
    where, bits, arms = task_of(task), list(bits), [checks.choice("arm", arm, tuple(ARMS)) for arm in arms]
    return [
        Job(task, seed, target, arm, each)
        for seed in seeds
        for target in (where.source, *where.targets)
        for arm in arms
        for each in (["float"] if ARMS[arm].get("bits") == "float" else bits)
    ]


def run(jobs: list[Job], out: Path, quick: Mapping[str, Any] | None = None) -> None:
    """Run the jobs whose rows are not there, and write all rows to ``rows.csv``.

    Args:
        quick: settings in the place of every stage's, for a trial.
    """
    for folder in ("rows", "float", "models"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    for job in jobs:
        path = out / "rows" / f"{job.id}.csv"
        if not path.is_file():
            write_atomically(path, csv_text(_rows(job, out, dict(quick or {})), COLUMNS))
    write_atomically(out / "rows.csv", joined(out / "rows", COLUMNS))


def domains_of(task: str, target: str) -> dict[str, Any]:
    """The labelled domains of a task: training images of each, and the test images of the one that is left out."""
    where = task_of(task)
    names = (where.source, *where.targets)
    pairs = {name: where.load(name, "test" if name == target else "train") for name in names}
    return {name: pair if name == target else (pair[0][:SAMPLES], pair[1][:SAMPLES]) for name, pair in pairs.items()}


def _rows(job: Job, out: Path, quick: dict[str, Any]) -> list[dict[str, Any]]:
    began = time.perf_counter()
    domains = domains_of(job.task, job.target)
    start = _float(job, domains, out, quick)
    if job.arm == FOLDED:
        start = fold(start, next(iter(domains.values()))[0][:32]).requires_grad_()
    settings = {**QAT, "bits": job.bits, **ARMS[job.arm], "seed": job.seed, **quick}
    result = train(start, domains, job.target, progress=False, **settings)
    path = out / "models" / f"{job.id}.safetensors"
    if job.bits == "float":
        write_atomically(path, _bytes(result.model))
    else:
        save(result.model, path)
    return [_row(job, result, rule, time.perf_counter() - began) for rule in SELECTIONS]


def _row(job: Job, result: Trained, rule: str, seconds: float) -> dict[str, Any]:
    epoch = selected(result.rows, rule)
    row = result.rows[epoch - 1]
    decided = [len(one["frozen"]) / len(one["disorder"]) for one in result.history]
    return {
        **{name: getattr(job, name) for name in ("task", "seed", "target", "arm", "bits")},
        "selection": rule,
        "epoch": epoch,
        "in_domain": row["validation"],
        "out_of_domain": row["target"],
        "frozen": sum(decided) / len(decided) if decided else 0.0,  # share of quantizers or layers, over decisions
        "seconds": f"{seconds:.1f}",
        "hdrq": __version__,
        "torch": torch.__version__,
    }


def _float(job: Job, domains: Mapping[str, Any], out: Path, quick: dict[str, Any]) -> nn.Module:
    """The network that all arms of a seed and a target start from."""
    path = out / "float" / f"{job.start}.safetensors"
    with torch.random.fork_rng([]):
        torch.manual_seed(job.seed)
        model = task_of(job.task).network().eval()
    if not path.is_file():
        found = train(model, domains, job.target, progress=False, **{**FLOAT, "seed": job.seed, **quick}).model
        write_atomically(path, _bytes(found))
    model.load_state_dict(load_file(path))
    return model


def _bytes(model: nn.Module) -> bytes:
    return to_bytes({name: value.clone() for name, value in model.state_dict().items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("leave-one-out"), help="folder of rows and models")
    parser.add_argument("--task", default="digits")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--bits", default="W4A4,W3A3")
    parser.add_argument("--arms", default=";".join(ARMS), help="with semicolons")
    parser.add_argument("--shard", default="0/1", help="i/n: every n-th job from the i-th on")
    given = parser.parse_args()
    part, count = shard_of(given.shard)
    jobs = grid(given.task, range(given.seeds), given.bits.split(","), given.arms.split(";"))
    torch.set_num_threads(1)  # one order of sums on any machine
    run(jobs[part::count], given.out)


if __name__ == "__main__":
    main()
