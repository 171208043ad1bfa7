"""Runs as jobs: each quantizes a task's networks in one way, merges them in every way, and writes its rows at once.

A job's rows lie in a file of its own, so that runs stop, go on, and are spread over processes and machines; files of
several machines in one folder are one run.
"""

from __future__ import annotations

import csv
import hashlib
import json
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import combinations
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from hdrq._version import __version__
from hdrq.calibrate.report import report_of
from hdrq.checkpoint.files import csv_text, write_atomically
from hdrq.evaluate.averaging import average
from hdrq.evaluate.metrics import harmonic_mean
from hdrq.merging.files import readiness
from hdrq.merging.models import merge
from hdrq.methods.post_training import fold, quantize
from hdrq.methods.reconstruct.memory import keep_freed_memory
from hdrq.recipes import recipe
from hdrq.reproduce.measures import contributions, encoded, score
from hdrq.reproduce.networks import hash_of, networks
from hdrq.reproduce.protocol import (
    FACTORS,
    HELD_OUT,
    ITERATIONS,
    METHODS,
    RATE_BITS,
    RATE_SEED,
    RULE_SETS,
    RULES,
    STUDIES,
    Method,
    Study,
)
from hdrq.reproduce.tasks import CALIBRATION, Task, files, remember, task_of
from hdrq.rng import CONTRACT

COLUMNS = (
    *("task", "network", "method", "bits", "iterations", "knobs", "weight_lr", "rule", "domains", "accuracies"),
    *("harmonic_mean", "distance", "correct", "seconds", "networks", "hdrq", "torch", "contract", "processor"),
)
MOST_RATES = 6  # that are tried of a method


@dataclass(frozen=True)
class Job:
    """One way to quantize the networks of one seed.

    Args:
        knobs: beside those of the method.
        rules: that merge the models: a name in :data:`hdrq.reproduce.protocol.RULE_SETS`.
    """

    task: str
    network: int
    method: str
    bits: str
    iterations: int = ITERATIONS
    knobs: dict[str, Any] = field(default_factory=dict)
    rules: str = "table"

    @property
    def id(self) -> str:
        """A name for files: what can be read of it, and a hash of all."""
        facts = asdict(self)
        if self.rules == "table":
            del facts["rules"]  # as in names of files from before there were others
        text = json.dumps(facts, sort_keys=True)
        plain = file_name(self.method, self.bits, self.network)
        return f"{self.task}-{plain}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"


Work = Callable[[Job, dict[str, nn.Module], Path, Path, bool], tuple[dict[str, Any], list[dict[str, Any]]]]


@dataclass(frozen=True)
class Kind:
    """A kind of rows, and what makes those of a job.

    Args:
        name: of the folder that has them, a file for each job, and of the CSV of all.
        columns: of the CSV.
        work: of a job, its networks, the folder of the run, that of networks, and whether rates are chosen: its knobs,
            and its rows but for what all rows of a job have alike.
    """

    name: str
    columns: Sequence[str]
    work: Work


def grid(task: str, seeds: Iterable[int], study: Study = STUDIES["table"]) -> list[Job]:
    """The jobs of a study, seed after seed. Where its bits are ``"float"`` alone, those of full precision are all."""
    found = []
    for seed in seeds:
        for method in study.methods:
            widths = ("float",) if method == "full precision" else tuple(b for b in study.bits if b != "float")
            found += [
                Job(task, seed, method, each, study.iterations, knobs, study.rules)
                for each in widths
                for knobs in study.knobs
            ]
    return found


def run(
    jobs: Sequence[Job],
    folder: Path,
    cache: Path,
    *,
    processes: int = 1,
    shard: tuple[int, int] = (0, 1),
    choose: bool = True,
    kind: Kind | None = None,
) -> None:
    """Carry out every job whose rows are not there yet.

    Args:
        folder: of the rows, and of the rates chosen.
        cache: of networks in full precision.
        shard: (i, n): every n-th job from the i-th on.
        choose: whether each method's rate is chosen first; else it is the recipe's own.
        kind: of the rows; those of the tables (:data:`TABLES`) without.

    Raises:
        ValueError: the folder has rows whose rates were chosen otherwise.
    """
    kind = kind or TABLES
    for name in ("rates", kind.name):
        (folder / name).mkdir(parents=True, exist_ok=True)
    _same_protocol(folder, {"rates": "chosen" if choose else "the recipes' own"})
    mine = [job for job in list(jobs)[shard[0] :: shard[1]] if not _rows_path(folder, job, kind).is_file()]
    ways = dict.fromkeys(
        (job.task, job.method, job.iterations)
        for job in mine
        if choose and job.method in METHODS and METHODS[job.method].learned
    )
    choices = [(*way, folder, cache) for way in ways if not _rate_path(folder, *way).is_file()]
    choices.sort(key=lambda choice: choice[2] != ITERATIONS)  # others begin from what is chosen for so many
    for task in map(task_of, dict.fromkeys(job.task for job in mine)):
        if task.check is not None:
            _same_protocol(folder, {"facts": hashlib.sha256(task.facts.encode()).hexdigest()}, f"{task.name}.json")
            task.check(cache)
    seeds = dict.fromkeys([(task, RATE_SEED) for task, *_ in choices] + [(job.task, job.network) for job in mine])
    in_processes(prepared, [(task, seed, cache) for task, seed in seeds], processes)
    in_processes(choose_rate, choices, processes)
    in_processes(carry_out, [(job, folder, cache, choose, kind) for job in mine], processes)


def _same_protocol(folder: Path, protocol: dict[str, str], name: str = "protocol.json") -> None:
    """Note how a folder's rows are made, or refuse one whose are made otherwise."""
    path = folder / name
    text = json.dumps(protocol) + "\n"
    if path.is_file() and path.read_text(encoding="utf-8") != text:
        raise ValueError(f"out must be a folder of runs with {protocol}, got {folder} with {path.read_text().strip()}")
    write_atomically(path, text)


def shard_of(text: str) -> tuple[int, int]:
    """``"i/n"`` as (i, n).

    Raises:
        ValueError: it is not of that form, or i is not below n.
    """
    part, _, count = text.partition("/")
    if not (part.isdigit() and count.isdigit() and int(part) < int(count)):
        raise ValueError(f"shard must be i/n with i < n, like 0/4, got {text!r}")
    return int(part), int(count)


def in_processes(function, arguments: Iterable[tuple], processes: int) -> None:
    if processes == 1:
        for each in arguments:
            function(*each)
        return
    with ProcessPoolExecutor(processes, get_context("spawn"), remember, (files(),)) as pool:
        for future in [pool.submit(function, *each) for each in arguments]:
            future.result()


def prepared(task: str, seed: int, cache: Path) -> None:
    """Train the networks of a seed, unless they are kept: jobs that need the same ones would train them at once."""
    networks(task_of(task), seed, cache)


# --- the rate of each method


def choose_rate(task_name: str, name: str, iterations: int, folder: Path, cache: Path) -> float:
    """The rate of a method by the rule of :mod:`hdrq.reproduce.protocol`, and a file of all that were tried.

    The first that are tried lie around the recipe's own rate, or, for another number of iterations than the
    protocol's, below the rate chosen for that. Where the best is the smallest or the largest that was tried, one more
    is tried beyond it.
    """
    path = _rate_path(folder, task_name, name, iterations)
    if path.is_file():
        return float(json.loads(path.read_text())["chosen"])
    task, method = task_of(task_name), METHODS[name]
    models = networks(task, RATE_SEED, cache)
    if iterations == ITERATIONS:
        start = recipe(method.recipe, method.preset, **method.knobs).weight_lr
    else:
        start = choose_rate(task_name, name, ITERATIONS, folder, cache) / max(FACTORS)
    errors: dict[float, float] = {}
    rates = [start * factor for factor in FACTORS]
    while rates:
        for rate in rates:
            found = [
                quantized_one(
                    task, models, domain, method, RATE_BITS, iterations, {"weight_lr": rate}, RATE_SEED, held_out=True
                )
                for domain in task.targets
            ]
            errors[rate] = float(np.mean([report_of(model).errors["output"] for model in found]))
        best, ends = min(errors, key=errors.__getitem__), (min(errors), max(errors))
        beyond = {ends[0]: ends[0] / 3, ends[1]: ends[1] * 3}
        rates = [beyond[best]] if best in ends and len(errors) < MOST_RATES else []
    facts = {
        **{"task": task_name, "method": name, "bits": RATE_BITS, "iterations": iterations},
        **{"chosen": best, "errors": errors},
        **software(),
    }
    write_atomically(path, json.dumps(facts, indent=1, sort_keys=True) + "\n")
    return best


# --- one job


def carry_out(job: Job, folder: Path, cache: Path, choose: bool, kind: Kind) -> None:
    """Make the rows of a job, and write them; another process or machine may have done so meanwhile."""
    path = _rows_path(folder, job, kind)
    if path.is_file():
        return
    start = time.perf_counter()
    torch.set_num_threads(1)
    with keep_freed_memory():
        models = networks(task_of(job.task), job.network, cache)
        knobs, rows = kind.work(job, models, folder, cache, choose)
    facts = {**facts_of(job, knobs, models), "seconds": round(time.perf_counter() - start, 1)}
    write_atomically(path, csv_text([{**facts, **row} for row in rows], kind.columns))


def judged_merges(
    job: Job, models: dict[str, nn.Module], folder: Path, cache: Path, choose: bool
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Quantize, merge every pair and all by every rule, and judge on test images."""
    task, method = task_of(job.task), METHODS[job.method]
    knobs = knobs_of(job, folder, cache, choose)
    quantized = {
        domain: quantized_one(task, models, domain, method, job.bits, job.iterations, knobs, job.network)
        for domain in task.targets
    }
    tests = {domain: task.load(domain, "test") for domain in task.targets}
    rows = []
    for count in range(1, len(task.targets) + 1):
        for domains in combinations(task.targets, count):
            chosen = [quantized[domain] for domain in domains]
            for rule, model in merges(chosen, method, job.network, RULE_SETS[job.rules]).items():
                found = {domain: contributions(model, *tests[domain]) for domain in domains}
                rows.append({"rule": rule, "domains": "+".join(domains), **judged(found), **_apart(chosen, method)})
    return knobs, rows


TABLES = Kind("rows", COLUMNS, judged_merges)


def knobs_of(job: Job, folder: Path, cache: Path, choose: bool) -> dict[str, Any]:
    """A job's knobs, and the rate chosen for its method."""
    if METHODS[job.method].learned and choose and "weight_lr" not in job.knobs:
        return {**job.knobs, "weight_lr": choose_rate(job.task, job.method, job.iterations, folder, cache)}
    return dict(job.knobs)


def facts_of(job: Job, knobs: Mapping[str, Any], models: Mapping[str, nn.Module]) -> dict[str, Any]:
    """What every row of a job begins with, and what made it."""
    return {
        **{name: value for name, value in asdict(job).items() if name in COLUMNS},
        "knobs": json.dumps(job.knobs, sort_keys=True),
        "weight_lr": knobs.get("weight_lr", ""),
        "networks": hash_of(models),
        **software(),
    }


def quantized_one(
    task: Task,
    models: dict[str, nn.Module],
    domain: str,
    method: Method,
    bits: str,
    iterations: int,
    knobs: dict[str, Any],
    seed: int,
    held_out: bool = False,
) -> nn.Module:
    """A target's network, quantized on its calibration images; for ``held_out`` the last of them are kept apart."""
    images = task.load(domain, "train")[0][:CALIBRATION]
    if method.recipe == "full precision":
        return fold(models[domain], images[:32])
    options: dict[str, Any] = {**method.knobs, **knobs, "preset": method.preset, "bits": bits, "seed": seed}
    if method.learned:
        options["iterations"] = iterations
    if method.recipe == "hdrq":
        options["source"] = models[task.source]
    if held_out:
        images, options["held_out"] = images[:-HELD_OUT], images[-HELD_OUT:]
    return quantize(models[domain], images, method.recipe, progress=False, **options)


def merges(
    models: list[nn.Module], method: Method, seed: int, rules: Mapping[str, Mapping[str, Any]] = RULES
) -> dict[str, nn.Module]:
    """What several models become by each rule; one model is what it is."""
    if len(models) == 1:
        return {"": models[0]}
    if method.recipe == "full precision":
        return {"average": average(models)}
    return {name: merge(models, seed=seed, **options) for name, options in rules.items()}


def judged(found: dict[str, np.ndarray]) -> dict[str, Any]:
    accuracies = {domain: 100 * float(score(values)) for domain, values in found.items()}
    packed = {domain: encoded(values) for domain, values in found.items()}
    rounded = {domain: round(value, 4) for domain, value in accuracies.items()}
    mean = round(harmonic_mean(accuracies.values()), 4)
    return {"accuracies": json.dumps(rounded), "harmonic_mean": mean, "correct": json.dumps(packed)}


def _apart(models: list[nn.Module], method: Method) -> dict[str, Any]:
    """How far quantized models are from each other, over the mean of their norms (of the farthest pair, all layers)."""
    if len(models) == 1 or method.recipe == "full precision":
        return {"distance": ""}
    return {"distance": round(readiness(models, rule="half-even").total.distance, 4)}


def collected(folder: Path, kind: Kind = TABLES) -> str:
    """The rows of all jobs of a folder as one CSV."""
    return joined(folder / kind.name, kind.columns)


def joined(folder: Path, columns: Sequence[str]) -> str:
    """The rows of all CSVs of a folder as one."""
    found: list[dict[str, Any]] = []
    for path in sorted(folder.glob("*.csv")):
        with path.open(newline="", encoding="utf-8") as file:
            found += csv.DictReader(file)
    return csv_text(found, columns)


def rates(folder: Path) -> list[dict[str, Any]]:
    """What was tried to choose each method's rate."""
    return [json.loads(path.read_text()) for path in sorted((folder / "rates").glob("*.json"))]


def file_name(*parts: Any) -> str:
    """A name for files of what can be read: everything but letters and digits becomes a hyphen."""
    return "".join(c if c.isalnum() else "-" for c in " ".join(map(str, parts)))


def _rows_path(folder: Path, job: Job, kind: Kind) -> Path:
    return folder / kind.name / f"{job.id}.csv"


def _rate_path(folder: Path, task: str, method: str, iterations: int) -> Path:
    longer = "" if iterations == ITERATIONS else f"-{iterations}"
    return folder / "rates" / f"{task}-{file_name(method)}{longer}.json"


def software() -> dict[str, Any]:
    """What rows hold of what made them."""
    return {
        "hdrq": __version__,
        "torch": torch.__version__,
        "contract": CONTRACT,
        "processor": platform.processor() or platform.machine(),
    }
