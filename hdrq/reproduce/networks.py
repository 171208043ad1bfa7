"""A task's networks in full precision: trained on the source, adapted to each target, and kept by their fingerprint."""

from __future__ import annotations

import hashlib
import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hdrq.checkpoint.files import write_atomically
from hdrq.checkpoint.library import SafetensorError, load_file, save
from hdrq.checkpoint.workdir import state_hash
from hdrq.reproduce.tasks import Task


def networks(task: Task, seed: int, cache: str | os.PathLike) -> dict[str, nn.Module]:
    """The source's network and one adapted to each target, by domain, in evaluation mode.

    They are trained on one thread, so that the same seed gives the same networks on one kind of processor, and kept in
    ``cache`` under a name that changes with the task, the seed, torch and the code that trains them. Those that a task
    gives are the same for all seeds.
    """
    names = (task.source, *task.targets)
    if task.given is not None:
        return {name: task.given(name) for name in names}
    folder = Path(cache)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{task.name}-{seed}-{_fingerprint(task, seed)}.safetensors"
    if path.is_file():
        try:
            return _from(task, load_file(path), names)
        except SafetensorError:  # cut short by a crash of the machine: trained anew
            pass
    models = _trained(task, seed)
    state = {f"{name}/{key}": value for name, model in models.items() for key, value in model.state_dict().items()}
    write_atomically(path, save({key: value.contiguous() for key, value in state.items()}))
    return models


def hash_of(models: Mapping[str, nn.Module]) -> str:
    """Of networks by domain: the same seed gives others on another processor, whose rows are no pairs."""
    state = {f"{name}/{key}": value for name, model in models.items() for key, value in model.state_dict().items()}
    return state_hash(state)[:12]


def _trained(task: Task, seed: int) -> dict[str, nn.Module]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            images, labels = task.load(task.source, "train")
            source = task.training.train_source(task.network(), images, labels, task.source_epochs, task.source_rate)
            adapted = {}
            for domain in task.targets:
                adapted[domain] = task.training.adapt(source, task.load(domain, "train")[0], task.epochs, task.rate)
        return {task.source: source.eval(), **adapted}
    finally:
        torch.set_num_threads(threads)


def _from(task: Task, state: dict[str, torch.Tensor], names: tuple[str, ...]) -> dict[str, nn.Module]:
    models = {}
    for name in names:
        models[name] = task.network()
        prefix = f"{name}/"
        models[name].load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
        models[name].eval()
    return models


def _fingerprint(task: Task, seed: int) -> str:
    facts = (task.source_epochs, task.source_rate, task.epochs, task.rate, task.targets, seed, torch.__version__)
    parts: tuple[Any, ...] = (task.training, inspect.getmodule(task.network), task.load)
    code = "".join(inspect.getsource(part) for part in parts)
    return hashlib.sha256(f"{facts}{code}{task.facts}".encode()).hexdigest()[:12]
