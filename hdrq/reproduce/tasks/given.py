"""A task of a user's own folders and networks, from a file of settings:

    data: OfficeHome                     # a folder of domains of classes
    source: Art
    targets: [Clipart, Product, Real World]
    model: torchvision:resnet50          # or timm:NAME, or module:factory
    model_args: {num_classes: 65}
    checkpoints:                         # states in full precision, adapted already; without them all are trained here
      Art: art.pth
      Clipart: clipart.pth
      Product: product.pth
      Real World: real-world.pth

Paths are relative to the file's own folder. All settings, and their defaults, are those of :class:`Given`.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hdrq import checks
from hdrq.calibrate.images import MEAN, STD, image_reader
from hdrq.checkpoint.architecture import build
from hdrq.checkpoint.files import file_hash, write_atomically
from hdrq.checkpoint.loading import load_float, read_state
from hdrq.checkpoint.states import state_differences, tensors_of
from hdrq.methods.job import number, read_settings
from hdrq.reproduce.classifier import PART, Classifier, last_linear
from hdrq.reproduce.folders import Folders, Pictures
from hdrq.reproduce.tasks.task import CALIBRATION, Task

TEXTS = ("data", "source", "model", "weights", "head")
TRAINED = ("weights", "head", "source_epochs", "source_rate", "epochs", "rate")  # settings of training
LEAST = 200  # training images of a domain: batches are of 64, and rates are chosen on 100 that are held out


@dataclass(frozen=True)
class Given:
    """Settings of a task, and their defaults."""

    data: str  # a folder that hdrq.reproduce.folders.Folders reads
    source: str
    targets: tuple[str, ...]
    model: str
    model_args: dict = field(default_factory=dict)
    checkpoints: dict = field(default_factory=dict)  # by domain, source and targets: states in full precision
    weights: str | None = None  # without checkpoints: a state to begin from; the head's may have another shape
    head: str | None = None  # without checkpoints: the last linear layer; None for the one registered last
    source_epochs: int = 8
    source_rate: float = 1e-3
    epochs: int = 30
    rate: float = 1e-4
    resize: int = 256
    crop: int = 224
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    test_share: float = 0.2
    split_seed: int = 0

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Given:
        """From names and values, all of which are checked; nothing is read.

        Raises:
            TypeError, ValueError: "X must be …, got …".
        """
        known = {f.name: f for f in fields(cls)}
        for name in settings:
            checks.choice("setting", name, tuple(known))
        for name in ("data", "source", "targets", "model"):
            if not settings.get(name):
                raise ValueError(f"{name} must be given, got none")
        found = {name: value for name, value in settings.items() if value is not None}
        for name in TEXTS:
            if not isinstance(found.get(name, ""), str):
                raise TypeError(f"{name} must be a string, got {found[name]!r:.100}")
        for name in ("model_args", "checkpoints"):
            if not isinstance(found.get(name, {}), dict) or not all(isinstance(k, str) for k in found.get(name, {})):
                raise TypeError(f"{name} must be a mapping from names, got {found[name]!r:.100}")
        for name in ("source_epochs", "epochs"):
            checks.integer(name, found.get(name, 1), 1, 10**6)
        checks.integer("split_seed", found.get("split_seed", 0), 0, 2**63 - 1)
        for name, high in (("source_rate", 1.0), ("rate", 1.0), ("test_share", 0.99)):
            found[name] = checks.real(name, number(found.get(name, known[name].default)), 1e-12, high)
        image_reader(*(found.get(name, known[name].default) for name in ("resize", "crop", "mean", "std")))
        targets = found["targets"]
        if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets) or len(targets) < 2:
            raise TypeError(f"targets must be a list of two domains or more, got {targets!r:.100}")
        domains = [found["source"], *targets]
        if len({*domains}) < len(domains) or any("+" in d or "/" in d or d.startswith(".") for d in domains):
            raise ValueError(f"source and targets must be different folders without + and /, got {domains!r:.200}")
        states = found.get("checkpoints", {})
        if states and {*states} != {*domains}:
            raise ValueError(
                f"checkpoints must be of every domain, {checks.listed(domains)}, got {checks.listed(states) or 'none'}"
            )
        if not all(isinstance(path, str) for path in states.values()):
            raise TypeError(f"checkpoints must be paths, got {states!r:.200}")
        unused = [name for name in TRAINED if name in settings]
        if states and unused:
            raise ValueError(f"{checks.listed(unused)} must be left out with checkpoints, of which nothing is trained")
        found["targets"] = tuple(targets)
        for name in ("mean", "std"):
            found[name] = tuple(float(v) for v in found.get(name, known[name].default))
        return cls(**found)


@cache
def given(path: Path) -> Task:
    """The task of a file of settings; its name is the file's, without the ending.

    Every setting is checked before anything is read. Then the folders are listed, and each network is made, and run on
    one image.

    Raises:
        FileNotFoundError, TypeError, ValueError: "X must be …, got …".
    """
    settings = Given.of(read_settings(path))
    domains = (settings.source, *settings.targets)
    preparation = (settings.resize, settings.crop, settings.mean, settings.std)
    folders = Folders(path.parent / settings.data, domains, *preparation, settings.test_share, settings.split_seed)
    for domain in domains:
        count = len(folders.listing[domain, "train"][0])
        if count < LEAST:
            raise ValueError(f"data must have {LEAST} training images of a domain at least, got {count} of {domain}")
    states = {domain: path.parent / file for domain, file in settings.checkpoints.items()}

    def load(domain: str, split: str) -> tuple[Pictures, Tensor]:
        return folders(domain, split)

    def network() -> Classifier:
        return trainable(settings, path.parent)

    def adapted(domain: str) -> nn.Module:
        return load_float(settings.model, settings.model_args, str(states[domain]))

    image = load(settings.source, "train")[0][:1]
    for model in map(adapted, domains) if states else [network()]:
        check_classes(model, image, len(folders.classes))
    files = [*states.values(), *([path.parent / settings.weights] if settings.weights else [])]
    made = model.network if isinstance(model, Classifier) else model
    code = inspect.getsource(sys.modules[type(made).__module__])
    facts = " ".join((folders.facts, settings.model, str(settings.model_args), *map(file_hash, files), code))
    trained = settings.targets if states else domains
    parts = [(domain, "train", CALIBRATION if states else None) for domain in trained]
    parts += [(domain, "test", None) for domain in settings.targets]
    return Task(
        path.stem,
        settings.source,
        settings.targets,
        load,
        network,
        settings.source_epochs,
        settings.source_rate,
        settings.epochs,
        settings.rate,
        facts=facts,
        given=adapted if states else None,
        check=partial(read_all, folders, parts, f"{path.stem}-{hashlib.sha256(facts.encode()).hexdigest()[:12]}"),
    )


def trainable(settings: Given, folder: Path) -> Classifier:
    """The network that is trained, as it begins."""
    model = build(settings.model, **settings.model_args)
    head = settings.head or last_linear(model)
    if not isinstance(dict(model.named_modules()).get(head), nn.Linear):
        raise ValueError(f"head must be the name of a linear layer of {settings.model}, got {head!r}")
    if settings.weights is not None:
        path, wanted = folder / settings.weights, tensors_of(model)
        state = read_state(path)
        for name in (f"{head}.weight", f"{head}.bias"):
            if name in state and name in wanted and state[name].shape != wanted[name].shape:
                state[name] = wanted[name]  # of other classes
        if differences := state_differences(state, wanted, dtypes=False):
            raise ValueError(f"{path} must have the tensors of {settings.model}, got {checks.listed(differences)}")
        model.load_state_dict(state)
    return Classifier(model, head)


@torch.no_grad()
def check_classes(model: nn.Module, image: Tensor, count: int) -> None:
    """That a network makes one logit for each class of an image, and, if it is trained, its head the logits."""
    model.eval()
    try:
        logits = model(image)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the model's code may raise anything
        raise ValueError(f"model must run on {tuple(image.shape)}, what resize and crop make, got {error}") from error
    shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if shape != (1, count):
        wanted = f"(N, {count}), a logit for each class of data"
        raise ValueError(f"model must return {wanted}, got {shape}; model_args may give the factory another number")
    if isinstance(model, Classifier) and not torch.equal(model.head(model.features(image)), logits):
        raise ValueError(f"head must be the layer that makes the logits, got {model.head_name!r}; set head")


def read_all(folders: Folders, parts: Sequence[tuple[str, str, int | None]], name: str, cache: Path) -> None:
    """Read each image of the parts (domain, split, how many) once, and note in a folder that it was done.

    Raises:
        ValueError: one cannot be read; it is named.
    """
    done = cache / f"{name}.checked"
    if done.is_file():
        return
    for domain, split, count in parts:
        for _ in folders(domain, split)[0].first(count).split(PART):
            pass
    cache.mkdir(parents=True, exist_ok=True)
    write_atomically(done, "")
