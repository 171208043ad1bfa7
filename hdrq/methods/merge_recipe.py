"""Merges written down: a YAML file of models and their weights, as mergekit has it, and a sweep over the weight."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from glob import escape
from pathlib import Path
from typing import Any

from hdrq import checks
from hdrq.checkpoint.files import output_folder
from hdrq.checks import listed
from hdrq.merging.files import merge_files
from hdrq.merging.settings import MergeSettings
from hdrq.merging.sources import opened
from hdrq.merging.tensors import Progress, no_progress
from hdrq.methods.job import read_settings
from hdrq.methods.read_yaml import path_of

PARTS = (".weight.codes", ".weight.scale", ".weight.zero_point", ".input.scale")  # of what a module has in a file
OWN = {field.name for field in fields(MergeSettings)} - {"weights"} | {"preset"}


@dataclass(frozen=True)
class MergeRecipe:
    """The files to merge, and the options of :func:`hdrq.merge` that a recipe gives."""

    files: tuple[str, ...]
    options: dict[str, Any]


def read_recipe(path: str | os.PathLike) -> MergeRecipe:
    """A merge from a YAML file::

        models:
          - model: a.safetensors
            parameters:
              weight:
                - {filter: stem, value: 0.8}
                - value: 0.5
          - model: b.safetensors
            parameters: {weight: 0.5}
        parameters: {normalize: true, rule: systematic, seed: 0}

    The first ``filter`` that is part of a module's name, or matches it as a pattern of a shell, decides its weight; one
    without a filter is for the rest. Modules are those that have tensors in the file: in an ONNX file, what a layer
    reads is a tensor with a name of its own. ``weight`` is 1 where none is given. With ``normalize``, true by itself,
    weights are divided by their sum; false keeps them, as ``extrapolate`` with ``rule: requantize`` may want. Other
    ``parameters`` are options of :func:`hdrq.merge`. ``merge_method`` may be ``linear``.

    Raises:
        FileNotFoundError: the recipe, or a model of it, is not there.
        TypeError, ValueError: "X must be …, got …".
    """
    given = read_settings(path)
    _known("recipe", given, {"models", "merge_method", "parameters"})
    if given.get("merge_method", "linear") != "linear":
        raise ValueError(
            f"merge_method must be linear for integers, got {given['merge_method']!r:.100}; hdrq post-merge has "
            "task-arithmetic and ties of models in full precision"
        )
    models = given.get("models")
    if not isinstance(models, list) or not models:
        raise ValueError(f"models must be a list of model and parameters, got {models!r:.100}")
    files, weights = zip(*map(_model, models), strict=True)
    options = _mapping("parameters", given.get("parameters"))
    _known("parameters", options, OWN | {"normalize"})
    normalize = options.pop("normalize", True)
    if not isinstance(normalize, bool):
        raise TypeError(f"normalize must be true or false, got {normalize!r:.100}")
    with ExitStack() as stack:
        names = opened(files[0], stack).specs
        for file in files[1:]:
            opened(file, stack)
    return MergeRecipe(tuple(files), {**options, "weights": _mixed(weights, names, normalize)})


def sweep(
    files: Sequence[str | os.PathLike],
    folder: str | os.PathLike,
    values: Sequence[float],
    *,
    unready: str = "warn",
    device: str = "cpu",
    progress: Progress = no_progress,
    **options: Any,
) -> list[Path]:
    """Merges of two models with λ of the first at each of ``values`` and 1 − λ of the second, a file for each.

    Args:
        folder: of ``lambda-0.25.safetensors`` and its like; made where it is not there.
        unready, device, progress: of :func:`hdrq.merging.files.merge_files`.
        options: of :func:`hdrq.merge`, but ``weights``.

    Raises:
        ValueError: not two models; λ outside [0, 1], or twice.
    """
    if len(files) != 2:
        raise ValueError(f"a sweep must be of two models, got {len(files)}")
    shares = [checks.real("sweep", value, 0.0, 1.0) for value in values]
    if not shares or len(set(shares)) < len(shares):
        raise ValueError(f"sweep must be one λ or more, each once, got {shares}")
    MergeSettings.of(2, **options)  # refuses what is wrong before anything is written
    with ExitStack() as stack:
        for file in files:
            opened(file, stack)
    output_folder(folder).mkdir(parents=True, exist_ok=True)
    written = []
    for share in shares:
        out = Path(folder) / f"lambda-{repr(share).removesuffix('.0')}.safetensors"
        how: dict[str, Any] = {"unready": unready, "device": device, "progress": progress}
        merge_files(files, out, weights=(share, 1 - share), **how, **options)
        written.append(out)
    return written


def _model(entry: Any) -> tuple[str, Any]:
    """The file and the weight of an entry."""
    entry = _mapping("an entry of models", entry)
    _known("an entry of models", entry, {"model", "parameters"})
    parameters = _mapping("parameters", entry.get("parameters"))
    _known(f"parameters of {entry.get('model')}", parameters, {"weight"})
    if not isinstance(entry.get("model"), str):
        raise TypeError(f"model must be the name of a file, got {entry.get('model')!r:.100}")
    return path_of(entry["model"]), _rules(parameters.get("weight", 1.0), entry["model"])


def _rules(weight: Any, model: str) -> list[tuple[str | None, float]]:
    """Filters, each with its value, the last of them None."""
    if not isinstance(weight, list):
        return [(None, checks.real(f"weight of {model}", weight))]
    if not all(isinstance(one, Mapping) for one in weight):
        raise TypeError(f"weight of {model} must be a number, or a list of filter and value, got {weight!r:.100}")
    rules = []
    for one in weight:
        _known(f"weight of {model}", one, {"filter", "value"})
        if not isinstance(one.get("filter"), str | None):
            raise TypeError(f"filter must be part of a module's name, got {one['filter']!r:.100}")
        rules.append((one.get("filter"), checks.real(f"weight of {model}", one.get("value"))))
    if not rules or rules[-1][0] is not None or any(pattern is None for pattern, _ in rules[:-1]):
        raise ValueError(f"weight of {model} must end with a value that has no filter, got {weight!r:.200}")
    return rules


def _mixed(rules: Sequence[list], names, normalize: bool) -> Any:
    """Weights for all, or by module: the names of deeper ones first, since a name is a pattern for all inside it."""
    used: set[str] = set()

    def of(module: str) -> tuple[float, ...]:
        own = []
        for each in rules:
            pattern, value = next((p, v) for p, v in each if p is None or p in module or fnmatchcase(module, p))
            used.add(pattern)
            own.append(value)
        total = sum(own)
        if normalize and abs(total) <= 1e-6 * sum(map(abs, own)):
            raise ValueError(f"weights must have a sum to divide by, got {own} for {module or 'the model itself'}")
        return tuple(value / total for value in own) if normalize else tuple(own)

    modules = dict.fromkeys(_module(name) for name in names)
    weights = {module: of(module) for module in modules}
    filters = dict.fromkeys(pattern for each in rules for pattern, _ in each if pattern is not None)
    if unused := [pattern for pattern in filters if pattern not in used]:
        raise ValueError(
            f"filter must be part of the name of a module that none before it decides, got {listed(map(repr, unused))}"
        )
    if len(set(weights.values())) == 1:
        return next(iter(weights.values()))
    deepest = sorted((module for module in weights if module), key=lambda module: -module.count("."))
    rest = {"*": weights[""]} if "" in weights else {}
    return {escape(module): weights[module] for module in deepest} | rest


def _module(name: str) -> str:
    """The module that has a tensor of a file."""
    part = next((part for part in PARTS if name.endswith(part)), None)
    return name.rpartition(".")[0] if part is None else name.removesuffix(part)


def _mapping(name: str, value: Any) -> dict[str, Any]:
    if value is not None and not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a mapping, got {type(value).__name__}")
    return dict(value or {})


def _known(name: str, given: Mapping[str, Any], known: set[str]) -> None:
    if unknown := sorted(map(repr, given.keys() - known)):
        raise ValueError(f"{name} must have {listed(sorted(known))}, got {listed(unknown)}")
