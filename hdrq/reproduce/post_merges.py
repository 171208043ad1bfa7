"""Experts in full precision, merged and quantized in one step: ways to do so, side by side, as jobs.

What a way is free to choose is chosen as the rates of the tables are: on calibration images that nothing is learned
from, of networks that no table has. Test images choose nothing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hdrq.calibrate.report import report_of
from hdrq.checkpoint.files import write_atomically
from hdrq.evaluate.averaging import average
from hdrq.methods.calibrated_merge import merge_calibrated
from hdrq.methods.post_merge import post_merge
from hdrq.methods.post_training import quantize
from hdrq.reproduce.jobs import COLUMNS, Job, Kind, choose_rate, file_name, in_processes, judged, run, software
from hdrq.reproduce.measures import contributions
from hdrq.reproduce.networks import networks
from hdrq.reproduce.protocol import ITERATIONS, RATE_SEED
from hdrq.reproduce.statistics import Found, estimate, holm, read
from hdrq.reproduce.tasks import Task, task_of

OBJECTIVE = ("nearest", "best", "error")  # what those of layers came to, where a way has one
SAMPLES, HELD_OUT = 256, 64  # calibration images of each task, and how many of them choose
BITS = ("W4A16", "W4A4", "W3A3")
CHOSEN_AT = "W4A4"
BLOCKS: dict[str, Any] = {"method": "hdrq", "iterations": ITERATIONS}


@dataclass(frozen=True)
class Merging:
    """A way to make one quantized model of experts.

    Args:
        options: of :func:`hdrq.post_merge`, or of :func:`hdrq.methods.calibrated_merge.merge_calibrated`.
        follows: the way whose choice it takes, as a control does.
        choices: sets of further options, of which one is chosen.
        integers: whether the experts are known as integers only, each rounded to nearest.
    """

    options: dict[str, Any]
    follows: str = ""
    choices: tuple[dict[str, Any], ...] = ({},)
    integers: bool = False


LAMBDAS = tuple({"lam": lam} for lam in (0.0, 1e-3, 1e-2, 1e-1, 1.0, 10.0))
LEARNED = tuple({"distance": d, "bias_lr": rate} for d, rate in ((0.0, 0.0), (0.0, 1e-3), (5e-2, 1e-3)))
WAYS = {
    "nearest": Merging({"method": "rtn"}),
    "GPTQ": Merging({"method": "gptq"}),
    "E-PMQ-style": Merging({"method": "epmq"}, choices=LAMBDAS),
    "its rounding alone": Merging({"method": "gptq", "bias": "solve"}, follows="E-PMQ-style"),
    "its repair alone": Merging(
        {"method": "regmean", "stream": "merged", "bias": "solve"}, follows="E-PMQ-style"
    ),  # not quantized
    "blocks, experts' targets": Merging(BLOCKS, choices=LEARNED),
    "blocks, the merge's targets": Merging(BLOCKS, follows="blocks, experts' targets"),
    "integers, E-PMQ-style": Merging({"target": "experts"}, integers=True),
    "integers, GPTQ": Merging({"target": "mean"}, integers=True),
    "integers, blocks": Merging(BLOCKS, choices=LEARNED, integers=True),
}
FLOAT, BASELINE = "average, full precision", "GPTQ"


def plan(task: str, seeds: Sequence[int], bits: Sequence[str] = BITS) -> list[Job]:
    """The jobs of a table: every way at every bit width, seed after seed."""
    return [
        Job(task, seed, way, each)
        for seed in seeds
        for way in (FLOAT, *WAYS)
        for each in (("float",) if way == FLOAT else bits)
    ]


def run_all(jobs: Sequence[Job], folder: Path, cache: Path, *, processes: int = 1, **options: Any) -> None:
    """Carry out every job whose row is not there yet, as :func:`hdrq.reproduce.jobs.run`."""
    free = [name for name, way in WAYS.items() if len(way.choices) > 1]
    if options.get("choose", True):
        tasks = dict.fromkeys(job.task for job in jobs)
        (folder / "rates").mkdir(parents=True, exist_ok=True)
        in_processes(chosen, [(task, name, folder, cache) for task in tasks for name in free], processes)
    run(jobs, folder, cache, kind=MERGES, processes=processes, **options)


def judged_merge(
    job: Job, models: dict[str, nn.Module], folder: Path, cache: Path, choose: bool
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Merge, quantize, and judge on test images."""
    task = task_of(job.task)
    experts, images = [models[domain] for domain in task.targets], calibration(task)
    knobs: dict[str, Any] = {}
    objective: dict[str, str] = {}
    if job.method == FLOAT:
        merged = average(experts)
    else:
        knobs = chosen(job.task, job.method, folder, cache) if choose else {}
        experts = known(job.method, experts, images, job.bits, job.network)
        merged = made(job.method, experts, images, job.bits, knobs, job.network)
        if layers := [layer for block in report_of(merged).blocks for layer in block.layers]:
            objective = {kind: f"{sum(getattr(layer, kind) for layer in layers):.6g}" for kind in OBJECTIVE}
    found = {domain: contributions(merged, *task.load(domain, "test")) for domain in task.targets}
    row = {"knobs": json.dumps(knobs, sort_keys=True), "rule": "", "domains": "+".join(task.targets)}
    return knobs, [row | judged(found) | objective]


MERGES = Kind("post-merge", (*COLUMNS, *OBJECTIVE), judged_merge)


def calibration(task: Task) -> list[Tensor]:
    """The images of each target that a merge is calibrated on, without their labels."""
    return [task.load(domain, "train")[0][:SAMPLES] for domain in task.targets]


def known(name: str, experts: Sequence[nn.Module], images: Sequence[Tensor], bits: str, seed: int) -> list[nn.Module]:
    """The experts as a way knows them: in full precision, or quantized."""
    if not WAYS[name].integers:
        return list(experts)
    own = zip(experts, images, strict=True)
    return [quantize(m, x, "rtn", bits=bits, per_channel=True, seed=seed, progress=False) for m, x in own]


def made(
    name: str, experts: Sequence[nn.Module], images: Sequence[Tensor], bits: str, knobs: dict[str, Any], seed: int
) -> nn.Module:
    """One model of experts, by a way, which knows them as they are given."""
    options = {**WAYS[name].options, **knobs}
    if name == "blocks, the merge's targets":
        recipe = options.pop("method")
        merged = average(experts)
        order = torch.randperm(len(images) * len(images[0]), generator=torch.Generator().manual_seed(seed))
        how = {"source": merged, "per_channel": True, "seed": seed, "progress": False, **options}
        return quantize(merged, torch.cat(list(images))[order], recipe, bits=bits, **how)
    if WAYS[name].integers:
        return merge_calibrated(experts, images, seed=seed, progress=False, **options)
    return post_merge(experts, images, bits=bits, group_size=None, seed=seed, progress=False, **options)


def chosen(task_name: str, name: str, folder: Path, cache: Path) -> dict[str, Any]:
    """The options that a way is free to choose: those whose outputs are nearest to each expert's on images kept apart.

    The experts are those that it knows. A file has all that were tried.
    """
    way = WAYS[name]
    if way.follows:
        return chosen(task_name, way.follows, folder, cache)
    if len(way.choices) == 1:
        return dict(way.choices[0])
    path = folder / "rates" / f"{task_name}-post-merge-{file_name(name)}.json"
    if path.is_file():
        return json.loads(path.read_text())["chosen"]
    task = task_of(task_name)
    models = networks(task, RATE_SEED, cache)
    experts, images = [models[domain] for domain in task.targets], calibration(task)
    fixed: dict[str, Any] = {}
    if way.options.get("method") == "hdrq":
        fixed["weight_lr"] = choose_rate(task_name, "HDRQ, paper", ITERATIONS, folder, cache)
    learned_from = [x[:-HELD_OUT] for x in images]
    experts = known(name, experts, learned_from, CHOSEN_AT, RATE_SEED)
    tried = []
    for choice in way.choices:
        merged = made(name, experts, learned_from, CHOSEN_AT, {**fixed, **choice}, RATE_SEED)
        tried.append(error(merged, experts, [x[-HELD_OUT:] for x in images]))
    best = {**fixed, **way.choices[tried.index(min(tried))]}
    facts = {"task": task_name, "way": name, "bits": CHOSEN_AT, "chosen": best, **software()}
    facts |= {"tried": [[choice, value] for choice, value in zip(way.choices, tried, strict=True)]}
    write_atomically(path, json.dumps(facts, indent=1, sort_keys=True) + "\n")
    return best


@torch.no_grad()
def error(merged: nn.Module, experts: Sequence[nn.Module], images: Sequence[Tensor]) -> float:
    """How far a model is from each expert on its own task: ``‖y − y_t‖² / ‖y_t‖²``, the mean over tasks."""
    found = []
    for expert, x in zip(experts, images, strict=True):
        want = expert(x)
        found.append(float((merged(x) - want).square().sum() / want.square().sum()))
    return sum(found) / len(found)


def render(rows: Path, folder: Path) -> str:
    """Write ``post-merge.md`` from the rows of a CSV, and return it.

    Raises:
        ValueError: the CSV is not one of ``hdrq reproduce post-merge``.
    """
    results = read(rows)
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for task in dict.fromkeys(way.task for way in results):
        own = {(way.method, way.bits): found for way, found in results.items() if way.task == task}
        parts.append(f"## {task}\n\n" + "\n".join(_table(own)))
    text = "\n\n".join(parts) + "\n"
    write_atomically(folder / "post-merge.md", text)
    return text


def _table(found: dict[tuple[str, str], dict[int, Found]]) -> list[str]:
    """A row for each way: its score at each bit width, and what it gains over GPTQ of the merge; p by Holm."""
    bits = [each for each in BITS if any(width == each for _, width in found)]
    seeds = sorted(set.intersection(*(set(rows) for rows in found.values())))
    cut = {key: {seed: rows[seed] for seed in seeds} for key, rows in found.items()}
    less = {
        (way, width): estimate([cut[way, width]], [cut[BASELINE, width]])
        for way, width in cut
        if way not in (BASELINE, FLOAT) and (BASELINE, width) in cut
    }
    p = dict(zip(less, holm(one.p for one in less.values()), strict=True))
    heads = [*bits, *(f"{each}, less {BASELINE}" for each in bits)]
    lines = [f"| seeds: {', '.join(map(str, seeds))} | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    if (FLOAT, "float") in cut:
        lines.append(f"| {FLOAT} | {estimate([cut[FLOAT, 'float']])} |" + " |" * (len(heads) - 1))
    for way in WAYS:
        scores = [str(estimate([cut[way, each]])) if (way, each) in cut else "" for each in bits]
        gains = [f"{less[way, each]}, p {p[way, each]:.3f}" if (way, each) in less else "" for each in bits]
        if any(scores):
            lines.append(f"| {way} | {' | '.join([*scores, *gains])} |")
    return lines
