"""What ``hdrq qat`` and its YAML file say, carried out: folders of images in, quantized models and tables out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from hdrq import checks
from hdrq.calibrate.images import MEAN, STD, class_names, image_files, image_reader
from hdrq.calibrate.progress import Step
from hdrq.checkpoint.files import csv_text, output_folder, write_atomically
from hdrq.checkpoint.float_states import load_float
from hdrq.checkpoint.library import save as to_bytes
from hdrq.checkpoint.saving import save
from hdrq.qat.settings import SELECTIONS, Training
from hdrq.qat.training import Trained, selected, train
from hdrq.quantizers.provenance import origin, set_origin

KEPT = 2**30  # bytes of a domain's images that are kept once they are read
COLUMNS = ("target", "selection", "saved", "epoch", "in_domain", "out_of_domain")


class ImageDomain:
    """A domain: a folder with a folder of images for each class, each read when it is asked for.

    Images are made as :func:`hdrq.calibrate.images.load_data` makes them; they are kept where all of them are few.

    Args:
        path: of the domain.
        classes: the names of the classes; a label is the place of one among them.
    """

    def __init__(self, path: Path, classes: Sequence[str], resize: int, crop: int, mean: Any, std: Any) -> None:
        self._read = image_reader(resize, crop, mean, std)
        self.files = image_files(path)
        owners = [file.relative_to(path).parts[0] for file in self.files]
        if unknown := sorted({*owners} - {*classes}):
            known = ", ".join(classes)[:300]
            raise ValueError(
                f"data must have the same classes in every domain, got {unknown[0]!r} in {path}; of {known}"
            )
        self.labels = torch.tensor([list(classes).index(owner) for owner in owners])
        self._kept: dict[int, torch.Tensor] | None = {} if len(self.files) * 12 * crop**2 <= KEPT else None
        facts = [(str(file.relative_to(path)), file.stat().st_size) for file in self.files]
        text = repr((facts, list(classes), resize, crop, tuple(mean), tuple(std)))
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = self.batch([index])
        return x[0], y[0]

    def batch(self, index: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (N, 3, crop, crop) and labels (N,)."""
        if self._kept is None:
            return self._read([self.files[i] for i in index]), self.labels[list(index)]
        for i in index:
            if i not in self._kept:
                self._kept[i] = self._read([self.files[i]])[0]
        return torch.stack([self._kept[i] for i in index]), self.labels[list(index)]


@dataclass(frozen=True)
class Run:
    """Every setting of ``hdrq qat``, with its default. Those that are not here are fields of :class:`Training`."""

    model: str  # "module:factory"; the factory takes model_args and returns the architecture
    data: str | dict  # a folder with a folder for each domain, or {domain: folder}; in each a folder for each class
    out: str  # a folder: a folder for each target, and results.csv
    weights: str | None = None  # the model's state; "{target}" in it stands for the domain that is left out
    model_args: dict = field(default_factory=dict)
    targets: tuple[str, ...] | None = None  # domains that are left out in turn; None for each
    resize: int = 256
    crop: int = 224
    mean: tuple = MEAN
    std: tuple = STD
    device: str = "cpu"
    resume: bool = False
    training: Training = field(default_factory=Training)

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Run:
        """From names and values, those of :class:`Training` among them.

        Raises:
            TypeError, ValueError: a name that is none, a value that it cannot have; no model, data or out.
        """
        own = {f.name for f in fields(cls)} - {"training"}
        learned = {f.name for f in fields(Training)}
        given = {str(name).replace("-", "_"): value for name, value in settings.items()}
        for name in given:
            checks.choice("setting", name, tuple(sorted(own | learned)))
        for name in ("model", "data", "out"):
            if not given.get(name):
                raise ValueError(f"{name} must be given, got none")
        for name in ("model", "out", "weights", "device"):
            if not isinstance(given.get(name), str | None.__class__):
                raise TypeError(f"{name} must be a string, got {type(given[name]).__name__}")
        if not isinstance(given["data"], str | dict):
            raise TypeError(f"data must be a folder or a mapping from domains, got {type(given['data']).__name__}")
        for name in {"model_args", "rule", "placement"} & given.keys():
            if not isinstance(given[name], dict):
                raise TypeError(f"{name} must be a mapping from names, got {given[name]!r:.100}")
        targets = given.get("targets")
        if targets is not None:
            targets = (targets,) if isinstance(targets, str) else targets
            if not isinstance(targets, list | tuple) or not targets:
                raise TypeError(f"targets must be a list of domains, got {targets!r:.100}")
            given["targets"] = tuple(map(str, targets))
        checks.choice("resume", given.get("resume", False), (False, True))
        chosen = {name: given.pop(name) for name in learned & given.keys()}
        return cls(**given, training=Training(**chosen))


def execute(run: Run, progress: Callable[[Step], None] | bool = True) -> dict[str, Trained]:
    """Train once for each target; write models, epochs and ``results.csv``.

    A target's folder has ``model.safetensors``, ``epochs.csv``, and the state that a run is resumed from. With
    ``bits="float"`` the model is a state in full precision, which ``weights`` of another run may be.

    Raises:
        TypeError, ValueError, FileNotFoundError: "X must be …, got …".
        FloatingPointError: a run diverged (:func:`hdrq.qat.train`).
    """
    checks.device(run.device)
    out = output_folder(run.out)
    folders = domain_folders(run.data)
    classes = sorted({name for folder in folders.values() for name in class_names(folder)})
    targets = run.targets or tuple(folders)
    for target in targets:
        checks.choice("target", target, tuple(folders))
    preparation = (run.resize, run.crop, run.mean, run.std)
    domains = {name: ImageDomain(folder, classes, *preparation) for name, folder in folders.items()}
    results: dict[str, Trained] = {}
    for target in targets:
        weights = None if run.weights is None else run.weights.replace("{target}", target)
        model = load_float(run.model, weights, run.model_args).to(run.device)
        folder = out / target
        result = train(model, domains, target, run.training, workdir=folder, resume=run.resume, progress=progress)
        if run.training.quantizes:
            architecture = {"factory": run.model, "arguments": run.model_args}
            set_origin(result.model, {**origin(result.model), "architecture": architecture})
            save(result.model, folder / "model.safetensors")
        else:
            state = {name: value.cpu().clone() for name, value in result.model.state_dict().items()}
            write_atomically(folder / "model.safetensors", to_bytes(state))
        results[target] = result
        write_atomically(out / "results.csv", csv_text(results_of(results), COLUMNS))
    return results


def domain_folders(data: str | Mapping[str, str]) -> dict[str, Path]:
    """The folder of each domain, by name."""
    if isinstance(data, str):
        root = Path(data)
        if not root.is_dir():
            raise FileNotFoundError(f"data must be a folder with a folder for each domain, got {root}, which is none")
        return {name: root / name for name in class_names(root)}
    found = {str(name): Path(str(folder)) for name, folder in data.items()}
    for name, folder in found.items():
        if not folder.is_dir():
            raise FileNotFoundError(f"data[{name!r}] must be a folder with a folder for each class, got {folder}")
        if Path(name).name != name:
            raise ValueError(f"data must have names of domains that a folder can have, got {name!r}")
    return found


def results_of(results: Mapping[str, Trained]) -> list[dict[str, Any]]:
    """What each rule of selection would have given for each target; ``saved`` is the one that the model is of."""
    rows = []
    for target, one in results.items():
        for rule in SELECTIONS:
            epoch = selected(one.rows, rule)
            row = one.rows[epoch - 1]
            numbers = {"epoch": epoch, "in_domain": row["validation"], "out_of_domain": row["target"]}
            rows.append({"target": target, "selection": rule, "saved": rule == one.settings.select, **numbers})
    return rows
