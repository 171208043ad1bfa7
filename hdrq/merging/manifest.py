"""The manifest of a merged model: the tables of its file, and how it was made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from hdrq import checks
from hdrq._version import __version__
from hdrq.checkpoint.format import STRUCTURE, TABLES
from hdrq.merging.inputs import Inputs
from hdrq.merging.settings import MergeSettings
from hdrq.merging.sources import hash_of
from hdrq.quantizers.modules import mean_range
from hdrq.rng import CONTRACT


def merged_manifest(inputs: Inputs, settings: MergeSettings) -> dict[str, Any]:
    """The manifest of the merged model, without the hashes of its tensors. Its ``models`` have those of their files.

    Raises:
        ValueError: scales of activations that have no mean; see :func:`merged_ranges`.
    """
    first = inputs.sources[0].manifest
    origins = [{key: fact for key, fact in source.manifest.items() if key not in TABLES} for source in inputs.sources]
    hashes = [{} if (found := hash_of(source)) is None else {"sha256": found} for source in inputs.sources]
    parents = [digest | facts for digest, facts in zip(hashes, origins, strict=True)]
    merge = {**asdict(settings), "weights": _weights(inputs, settings)}
    origin: dict[str, Any] = {"folded": first["folded"], "contract": CONTRACT, "merge": merge, "models": parents}
    for key in ("architecture", "coverage"):
        if all(key in facts and facts[key] == origins[0][key] for facts in origins):
            origin[key] = origins[0][key]
    tables = {key: first[key] for key in STRUCTURE if key in first} | {"hdrq": __version__}
    tables["weights"] = {
        name: {**facts, "range": list(inputs.ranges[name])} for name, facts in first["weights"].items()
    }
    return {**tables, "inputs": merged_ranges(inputs), **origin}


def _weights(inputs: Inputs, settings: MergeSettings) -> list:
    """λ of each model, or pairs of a pattern and these, in the order that decides: JSON sorts the keys of a mapping."""
    if isinstance(settings.weights, Mapping):
        return [[pattern, [float(weight) for weight in own]] for pattern, own in settings.weights.items()]
    return list(next(iter(inputs.weights.values())))


def merged_ranges(inputs: Inputs) -> dict[str, list[int]]:
    """The range of every quantizer of activations in the merged model.

    Raises:
        ValueError: a scale, or the mean of the scales, is not positive and finite.
    """
    return {name: _merged_range(inputs, name) for name in inputs.sources[0].manifest["inputs"]}


def _merged_range(inputs: Inputs, name: str) -> list[int]:
    scales = inputs.tensor(f"{name}.input.scale")
    for scale in scales:
        checks.scale_values(f"{name}.input.scale", scale)
    ranges = [source.manifest["inputs"][name] for source in inputs.sources]
    return list(
        mean_range(
            inputs.weights[f"{name}.input.scale"], [float(scale) for scale in scales], ranges, inputs.levels[name]
        )
    )
