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

Domains whose pixels are labelled have ``layouts`` (and ``size``, ``label_size``), and checkpoints:

    data: streets                        # with a folder for each target
    source: gta
    targets: [cityscapes, idd]
    layouts: {cityscapes: cityscapes, idd: idd}

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
from hdrq.calibrate.images import image_reader
from hdrq.calibrate.labelmaps import LAYOUTS, checked_size
from hdrq.checkpoint.architecture import build
from hdrq.checkpoint.files import file_hash, write_atomically
from hdrq.checkpoint.float_states import load_float, read_state
from hdrq.checkpoint.states import state_differences, tensors_of
from hdrq.evaluate.metrics import logits_of
from hdrq.methods.job import read_settings
from hdrq.reproduce.classifier import PART, Classifier, last_linear
from hdrq.reproduce.folders import Folders, Pictures
from hdrq.reproduce.label_maps import LabelMaps
from hdrq.reproduce.tasks.task import CALIBRATION, Task

TEXTS = ("data", "source", "model", "weights", "head")
TRAINED = ("weights", "head", "source_epochs", "source_rate", "epochs", "rate")  # settings of training
PICTURES = ("resize", "crop", "test_share")  # settings of images of classes, and of images with label maps
MAPS = ("layouts", "size", "label_size")
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
    resize: int = Folders.resize
    crop: int = Folders.crop
    mean: tuple[float, ...] = Folders.mean
    std: tuple[float, ...] = Folders.std
    test_share: float = Folders.test_share
    split_seed: int = Folders.split_seed
    layouts: dict = field(default_factory=dict)  # of targets with label maps: names of hdrq.calibrate.labelmaps.LAYOUTS
    size: tuple[int, int] = (512, 1024)  # height and width of their images
    label_size: tuple[int, int] | None = None  # of their label maps, on which mIoU is told; None for that of images

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
        for name in ("model_args", "checkpoints", "layouts"):
            if not isinstance(found.get(name, {}), dict) or not all(isinstance(k, str) for k in found.get(name, {})):
                raise TypeError(f"{name} must be a mapping from names, got {found[name]!r:.100}")
        for name in ("source_epochs", "epochs"):
            checks.integer(name, found.get(name, 1), 1, 10**6)
        checks.integer("split_seed", found.get("split_seed", 0), 0, 2**63 - 1)
        for name, high in (("source_rate", 1.0), ("rate", 1.0), ("test_share", 0.99)):
            found[name] = checks.real(name, found.get(name, known[name].default), 1e-12, high)
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
        layouts = found.get("layouts", {})
        for domain in targets if layouts else ():
            checks.choice(f"layout of {domain}", layouts.get(domain), tuple(LAYOUTS))
        if layouts and not states:
            raise ValueError(
                "checkpoints must be given with layouts, since no network for label maps is trained, got none"
            )
        unused = ("with checkpoints, of which nothing is trained", TRAINED) if states else ("", ())
        for why, names in (unused, ("with layouts", PICTURES) if layouts else ("without layouts", MAPS)):
            if wrong := [name for name in names if name in settings]:
                raise ValueError(f"{checks.listed(wrong)} must be left out {why}")
        for name in ("size", "label_size"):
            if name in found:
                found[name] = checked_size(name, found[name])
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
    read = settings.targets if settings.checkpoints else domains  # where nothing is trained, no image of the source is
    data = _data(settings, path.parent / settings.data, read)
    for domain in read:
        count = len(data(domain, "train")[0])
        if count < LEAST:
            raise ValueError(f"data must have {LEAST} training images of a domain at least, got {count} of {domain}")
    states = {domain: path.parent / file for domain, file in settings.checkpoints.items()}

    def load(domain: str, split: str) -> tuple[Pictures, Any]:
        return data(domain, split)

    def network() -> Classifier:
        return trainable(settings, path.parent)

    def adapted(domain: str) -> nn.Module:
        return load_float(settings.model, states[domain], settings.model_args)

    image = load(read[-1], "train")[0][:1]
    for model in map(adapted, domains) if states else [network()]:
        check_outputs(model, image, data.classes, 4 if settings.layouts else 2)
    files = [*states.values(), *([path.parent / settings.weights] if settings.weights else [])]
    made = model.network if isinstance(model, Classifier) else model
    code = inspect.getsource(sys.modules[type(made).__module__])
    facts = " ".join((data.facts, settings.model, str(settings.model_args), *map(file_hash, files), code))
    parts = [data(domain, "train")[0].first(CALIBRATION if states else None) for domain in read]
    for domain in settings.targets:
        parts += [part for part in data(domain, "test") if isinstance(part, Pictures)]
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
        check=partial(read_all, parts, f"{path.stem}-{hashlib.sha256(facts.encode()).hexdigest()[:12]}"),
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


def _data(settings: Given, path: Path, domains: tuple[str, ...]) -> Folders | LabelMaps:
    normalization = (settings.mean, settings.std)
    if not settings.layouts:
        preparation = (settings.resize, settings.crop, *normalization)
        return Folders(path, domains, *preparation, settings.test_share, settings.split_seed)
    layouts = {domain: settings.layouts[domain] for domain in domains}
    size = settings.size
    return LabelMaps(path, layouts, size, settings.label_size or size, *normalization, settings.split_seed)


@torch.no_grad()
def check_outputs(model: nn.Module, image: Tensor, classes: int | None, ndim: int) -> None:
    """That a network makes a logit for each class of an image, or of its pixels; a trained one, in its head."""
    model.eval()
    try:
        logits = logits_of(model(image), "output of the model")
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the model's code may raise anything
        raise ValueError(f"model must run on images {tuple(image.shape)}, as data is prepared, got {error}") from error
    if logits.ndim != ndim or classes not in (None, logits.shape[1]):
        wanted = f"(N, {classes or 'classes'}{', H, W' * (ndim == 4)}), a logit for each class of data"
        got = f"{tuple(logits.shape)} of one image; model_args may give the factory another number"
        raise ValueError(f"model must return {wanted}, got {got}")
    if isinstance(model, Classifier) and not torch.equal(model.head(model.features(image)), logits):
        raise ValueError(f"head must be the layer that makes the logits, got {model.head_name!r}; set head")


def read_all(parts: Sequence[Pictures], name: str, cache: Path) -> None:
    """Read all files once, and note in a folder that it was done.

    Raises:
        ValueError: one cannot be read; it is named.
    """
    done = cache / f"{name}.checked"
    if done.is_file():
        return
    for pictures in parts:
        for _ in pictures.split(PART):
            pass
    cache.mkdir(parents=True, exist_ok=True)
    write_atomically(done, "")
