"""What is in a checkpoint: layers, bits, bytes, and how it was made."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import torch

from hdrq import checks
from hdrq.checkpoint.format import Reader, packs
from hdrq.checkpoint.history import Step, history
from hdrq.ops.packing import unpack
from hdrq.prepare.coverage import Coverage


@dataclass(frozen=True)
class LayerContents:
    """A quantized weight in the file, and what its layer reads."""

    name: str
    shape: tuple[int, ...]
    bits: int
    input_bits: int | None  # None: its input is not quantized there
    scales: int  # 1, or one for each channel
    stored: int  # bytes of codes and scales
    full: int  # bytes of the weight in float32


@dataclass(frozen=True)
class Contents:
    """A file, every tensor of which has the hash it was written with."""

    layers: tuple[LayerContents, ...]
    size: int  # bytes of the file
    other: int  # bytes of what is not quantized: biases, norms, buffers
    facts: dict[str, Any]  # how it was made
    history: Step
    problems: tuple[str, ...]  # what loading or merging it would refuse: broken scales, codes out of range, NaN

    @property
    def full(self) -> int:
        """Bytes of the same model with float32 weights."""
        return self.other + sum(layer.full for layer in self.layers)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "full": self.full, "ratio": self.full / self.size}


def contents(path: str | os.PathLike) -> Contents:
    """Read a file, one tensor at a time, and say what it holds.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is not a file that :func:`hdrq.save` wrote, or an altered one.
    """
    with Reader(path) as file:
        sizes = {name: prod(shape) * dtype.itemsize for name, (dtype, shape) in file.specs.items()}
        manifest = file.manifest
        kept = {name: prod(shape) * dtype.itemsize for name, (dtype, shape) in file.statistics_specs.items()}
        problems = tuple(filter(None, (_problem(manifest, name, file.tensor(name)) for name in [*file.specs, *kept])))
        inputs = {**manifest["inputs"], **{n: manifest["inputs"][o] for n, o in manifest["shared"].items()}}
        layers = []
        for name, facts in manifest["weights"].items():
            layers.append(
                LayerContents(
                    name,
                    tuple(facts["shape"]),
                    _bits(facts["range"]),
                    _bits(inputs[name]) if name in inputs else None,
                    prod(file.specs[f"{name}.weight.scale"][1]),
                    sum(sizes.pop(f"{name}.weight.{part}", 0) for part in ("codes", "scale", "zero_point")),
                    4 * prod(facts["shape"]),
                )
            )
        found = Contents(tuple(layers), file.size, sum(sizes.values()), _facts(manifest), history(manifest), problems)
        if kept:
            found.facts["statistics"] = f"of {len(manifest['statistics'])} layers, {sum(kept.values()):,} bytes"
        found.facts["size"] = f"{found.size:,} bytes, {found.size / max(found.full, 1):.1%} of float32"
        return found


def _problem(manifest: dict[str, Any], name: str, value: torch.Tensor) -> str:
    """What is wrong with the values of a tensor, whose hash is right; empty if nothing is."""
    layer, _, kind = name.rpartition(".weight.")
    module = name.removesuffix(".input.scale")
    try:
        if layer in manifest["weights"] and kind == "codes":
            facts = manifest["weights"][layer]
            low, high = facts["range"]
            codes = unpack(value, facts["shape"], signed=low < 0) if packs(low, high) else value
            checks.code_values(f"codes of {layer}", codes, low, high)
        elif layer in manifest["weights"] and kind == "zero_point":
            checks.code_values(f"zero points of {layer}", value, *manifest["weights"][layer]["range"])
        elif (layer in manifest["weights"] and kind == "scale") or (module != name and module in manifest["inputs"]):
            checks.scale_values(name, value)
        elif value.is_floating_point() and (wrong := int(value.float().isnan().sum())):
            raise ValueError(f"{name} must hold no NaN, got {wrong} in {value.numel()} elements")
    except ValueError as error:
        return str(error)
    return ""


def _bits(bounds: list[int]) -> int:
    return (bounds[1] - bounds[0]).bit_length()


def _facts(manifest: dict[str, Any]) -> dict[str, Any]:
    """How the model was made: the lines under the table."""
    facts = {"format": manifest["format"], "hdrq": manifest.get("hdrq"), "contract": manifest.get("contract")}
    if "architecture" in manifest:
        facts["architecture"] = manifest["architecture"]["factory"]
    recipe, fingerprints = manifest.get("recipe"), manifest.get("fingerprints")
    if isinstance(recipe, dict):
        facts |= {"recipe": recipe.get("name"), "bits": manifest.get("bits"), "seed": manifest.get("seed")}
    if isinstance(fingerprints, dict):
        facts |= {f"{name} (SHA-256)": value for name, value in fingerprints.items()}
    if manifest["tied"]:
        facts["tied"] = ", ".join(f"{name} to {owner}" for name, owner in manifest["tied"].items())
    if share := Coverage.of_dict(manifest.get("coverage")):
        facts["quantized"] = str(share)
    return facts
