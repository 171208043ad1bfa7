"""The loss between and around quantized models, and what becomes of their merges: measures beside the tables.

A job of the tables is quantized once more, measured, and its numbers are written as rows of another kind: one number a
row. What is drawn as a surface, and merges by many draws, are measured on the first network alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hdrq.checkpoint.loading import load
from hdrq.checkpoint.saving import save
from hdrq.checkpoint.states import plain_state
from hdrq.evaluate import (
    Surface,
    accuracy,
    average,
    direction_surface,
    distances,
    error_barrier,
    harmonic_mean,
    hessian_top_eigenvalue,
    hessian_trace,
    loss_surface,
    mean_iou,
    noisy_error_barrier,
)
from hdrq.evaluate.distances import ALL
from hdrq.evaluate.segmentation import UNLABELLED
from hdrq.evaluate.weights import weights_of
from hdrq.merging.models import merge
from hdrq.methods.post_training import fold
from hdrq.reproduce.jobs import Job, Kind, knobs_of, merges, quantized_one
from hdrq.reproduce.protocol import METHODS, RULES, Method
from hdrq.reproduce.tasks import Task, task_of

COLUMNS = (
    *("task", "network", "method", "bits", "iterations", "knobs", "weight_lr", "measure", "domains", "x", "y"),
    *("value", "error", "seconds", "networks", "hdrq", "torch", "contract", "processor"),
)
IMAGES = 500  # test images of each domain that a loss is taken of
BATCH = 250
POINTS = 11  # λ of a barrier
NOISE_DRAWS = 4
PROBES = 16
GRID = 15  # points of a surface along each side
REACH = {"weights": 0.5, "scales": 0.5}
DRAWS = 30  # merges by each rule
DRAWN = {name: RULES[name] for name in ("noise, first", "noise, best of 30", "systematic")}

Images = tuple[Tensor, Tensor]
Row = dict[str, Any]


def measures(keep: bool = False) -> Kind:
    """The rows of measures.

    Args:
        keep: whether the quantized models are saved in ``models`` in the folder of the run, from where they are read if
            they are there.
    """
    return Kind("landscape", COLUMNS, partial(measured, keep=keep))


def measured(
    job: Job, models: dict[str, nn.Module], folder: Path, cache: Path, choose: bool, keep: bool
) -> tuple[dict[str, Any], list[Row]]:
    """Quantize a job's networks, and measure them."""
    task, method = task_of(job.task), METHODS[job.method]
    knobs = knobs_of(job, folder, cache, choose)
    quantized = {
        domain: _quantized(task, models, domain, job, knobs, folder if keep else None) for domain in task.targets
    }
    tests = {domain: task.load(domain, "test") for domain in task.targets}
    few = {domain: (x[:IMAGES], y[:IMAGES]) for domain, (x, y) in tests.items()}
    rows = [row for domain in task.targets for row in _alone(quantized[domain], domain, few[domain])]
    for pair in combinations(task.targets, 2):
        rows += _between([quantized[domain] for domain in pair], method, pair, [few[domain] for domain in pair])
    for count in range(2, len(task.targets) + 1):
        for domains in combinations(task.targets, count):
            chosen = [quantized[domain] for domain in domains]
            for rule, merged in merges(chosen, method, job.network).items():
                if rule in ("nearest", "systematic", "average"):
                    rows.append(_row(f"accuracy, {rule}", domains, _score(merged, tests, domains)))
    if job.network == 0:
        example = task.load(task.source, "train")[0][:32]
        rows += _surfaces(quantized, fold(models[task.source], example), task.source, task.targets[:2], few)
        if method.recipe != "full precision":
            rows += _draws([quantized[domain] for domain in task.targets[:2]], task.targets[:2], tests)
    return knobs, rows


def _quantized(
    task: Task, models: dict[str, nn.Module], domain: str, job: Job, knobs: dict[str, Any], folder: Path | None
) -> nn.Module:
    """A target's quantized network: one that is kept, or one that is made, and kept where ``folder`` is given."""
    path = folder / "models" / f"{job.id}-{domain}.safetensors" if folder else None
    if path and path.is_file():
        return load(path, task.network())
    made = quantized_one(task, models, domain, METHODS[job.method], job.bits, job.iterations, knobs, job.network)
    if path and job.method != "full precision":
        path.parent.mkdir(exist_ok=True)
        save(made, path)
    return made


def _row(measure: str, domains: Sequence[str], value: float, error: float | str = "", x: Any = "", y: Any = "") -> Row:
    numbers = {"x": x, "y": y, "value": value, "error": error}
    rounded = {name: f"{n:.6g}" if isinstance(n, float) else n for name, n in numbers.items()}
    return {"measure": measure, "domains": "+".join(domains), **rounded}


# --- what is measured of one model


def _alone(model: nn.Module, domain: str, images: Images) -> list[Row]:
    """The loss of a target's model on its own domain, and its curvature there."""
    batches = [*zip(*(part.split(BATCH) for part in images), strict=True)]
    top = hessian_top_eigenvalue(model, _batch_loss, batches, tolerance=1e-2)
    trace = hessian_trace(model, _batch_loss, batches, probes=PROBES)
    return [
        _row("loss", [domain], _loss_on([images])(model)),
        _row("top eigenvalue", [domain], top.value, top.residual),
        _row("trace", [domain], *trace.total),
        *(_row(f"trace of {name}", [domain], *each) for name, each in trace.layers.items()),
    ]


def _batch_loss(model: nn.Module, batch: Images) -> Tensor:
    """The mean cross-entropy over images, or over the pixels that are labelled."""
    x, y = batch
    return F.cross_entropy(model(x), y.long(), ignore_index=UNLABELLED if y.ndim > 1 else -100)


def _loss_on(domains: Sequence[Images]) -> Callable[[nn.Module], float]:
    """The mean over domains of the cross-entropy."""

    @torch.no_grad()
    def loss(model: nn.Module) -> float:
        means = []
        for x, y in domains:
            parts = zip(x.split(BATCH), y.split(BATCH), strict=True)
            means.append(sum(len(b[0]) * float(_batch_loss(model, b)) for b in parts) / len(x))
        return sum(means) / len(means)

    return loss


# --- what is measured of two


def _between(models: list[nn.Module], method: Method, pair: Sequence[str], images: Sequence[Images]) -> list[Row]:
    """Barriers of the mean loss over both domains, and distances."""
    loss, (first, second) = _loss_on(images), models
    barrier = error_barrier(first, second, loss, points=POINTS)
    rows = [_row("barrier", pair, barrier.value)]
    rows += _curve("loss between", pair, barrier.positions, barrier.losses)
    if method.recipe != "full precision":
        noisy = noisy_error_barrier(first, second, loss, points=POINTS, draws=NOISE_DRAWS)
        rows.append(_row("noisy barrier", pair, noisy.value, noisy.standard_error))
        rows += _curve("noisy loss between", pair, noisy.positions, noisy.losses.mean(0))
    whole = next(each for each in distances(models) if each.layer == ALL)
    rows.append(_row("distance", pair, whole.relative))
    if whole.integers is not None and whole.changed is not None:
        rows += [_row("distance of integers", pair, whole.integers), _row("integers changed", pair, whole.changed)]
    return rows


def _curve(measure: str, pair: Sequence[str], positions: Tensor, losses: Tensor) -> list[Row]:
    return [_row(measure, pair, y, x=x) for x, y in zip(positions.tolist(), losses.tolist(), strict=True)]


# --- surfaces and draws, of one network


def _surfaces(
    models: Mapping[str, nn.Module],
    source: nn.Module,
    source_name: str,
    pair: Sequence[str],
    images: Mapping[str, Images],
) -> list[Row]:
    """The loss on the plane of the source and two targets, and around the first target's model."""
    first, second = (models[domain] for domain in pair)
    plane = loss_surface(
        [source_like([first, second], source), first, second], _loss_on([images[d] for d in pair]), points=GRID
    )
    rows = _grid("plane", [source_name, *pair], plane)
    for domain, (x, y) in zip((source_name, *pair), plane.places.tolist(), strict=True):
        rows.append(_row("place", [domain], 0.0, x=x, y=y))
    for move in ("weights", "scales") if any(w.quantizer for w in weights_of(first).values()) else ("weights",):
        around = direction_surface(first, _loss_on([images[pair[0]]]), move=move, points=GRID, reach=REACH[move])
        rows += _grid(f"around, {move}", pair[:1], around)
    return rows


def _grid(measure: str, domains: Sequence[str], surface: Surface) -> list[Row]:
    return [
        _row(measure, domains, float(surface.losses[i, j]), x=x, y=y)
        for i, y in enumerate(surface.y.tolist())
        for j, x in enumerate(surface.x.tolist())
    ]


@torch.no_grad()
def source_like(models: Sequence[nn.Module], source: nn.Module) -> nn.Module:
    """The source as a model like those that are quantized: its weights and biases, and the mean of their scales.

    Its weights are rounded when it is run, as those of every other place on a plane are.

    Args:
        source: in full precision, its BatchNorm folded.
    """
    result = average(models)
    state = source.state_dict()
    for name, value in plain_state(result).items():
        value.copy_(state[name])
    for name, weight in weights_of(result).items():
        weight.value.copy_(state[f"{name}.weight"])
    return result


def _draws(models: list[nn.Module], pair: Sequence[str], tests: Mapping[str, Images]) -> list[Row]:
    """How well merges by each rule are that draws, one after another seed."""
    return [
        _row(f"draw, {rule}", pair, _score(merge(models, seed=seed, **options), tests, pair), x=seed)
        for rule, options in DRAWN.items()
        for seed in range(DRAWS)
    ]


def _score(model: nn.Module, tests: Mapping[str, Images], domains: Sequence[str]) -> float:
    """The harmonic mean over domains of the accuracy, or of the mIoU, in percent."""
    return harmonic_mean((mean_iou if tests[d][1].ndim > 1 else accuracy)(model, *tests[d]) for d in domains)
