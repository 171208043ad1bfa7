"""What must agree between models that are merged."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch

from hdrq.checks import listed
from hdrq.merging.sources import Source, label_of

NOTABLE = 0.01  # of a channel's size: more is said


def check_alike(sources: Sequence[Source], bits: str | None = None) -> None:
    """Refuse models that cannot be merged with the first of them.

    Args:
        bits: of the result, where models may differ in theirs; None where they may not.

    Raises:
        ValueError: what differs, and in which model; see :func:`description` and :func:`must_agree`.
    """
    first, specs = description(sources[0], bits is not None), sources[0].specs
    integers = [name for name, (dtype, _) in specs.items() if must_agree(sources[0], name, dtype)]
    for k, source in enumerate(sources[1:], start=1):
        label = label_of(source, k)
        other = description(source, bits is not None)
        differences = [
            f"{name} ({first.get(name, 'missing')} in the first, {other.get(name, 'missing')} in {label})"
            for name in dict.fromkeys((*first, *other))
            if first.get(name) != other.get(name)
        ]
        differences += [
            f"{name} (other integers in {label})"
            for name in integers
            if name in source.specs and not torch.equal(source.tensor(name), sources[0].tensor(name))
        ]
        if differences:
            in_bits = bits is None and any(": weight range" in d or ": input levels" in d for d in differences)
            way_out = "; bits says what the result has where models differ in theirs" if in_bits else ""
            raise ValueError(f"models must be alike to be merged, got {listed(differences)}{way_out}")


def warn_of_moved_scales(sources: Sequence[Source]) -> None:
    """Warn where AWQ moved other scales from norms into weights for one model than for another: they have no mean.

    A channel that was divided by s_k in the norm of model k, and multiplied by s_k in the weights behind it, comes out
    of the mean of two models ``(r + 1/r + 2)/4`` times as large as it should, with ``r = s_1/s_2``; r is seen in the
    norms, which differ little otherwise.
    """
    if not any((source.manifest.get("origin") or {}).get("kind") == "awq" for source in sources):
        return
    errors = {}
    for name, (dtype, shape) in sources[0].specs.items():
        if "norm" in name and len(shape) == 1 and shape[0] and dtype.is_floating_point:
            values = torch.stack([source.tensor(name).double().abs() for source in sources])
            ratio = values.amax(0) / values.amin(0)
            ratio = ratio[ratio.isfinite()]
            errors[name] = float(((ratio + 1 / ratio - 2) / 4).mean()) if len(ratio) else 0.0
    worst = max(errors, key=errors.__getitem__, default=None)
    if worst is not None and errors[worst] > NOTABLE:
        warnings.warn(
            f"AWQ scaled channels of these models otherwise: {worst} differs so much between them that channels behind "
            f"it change by {errors[worst]:.0%} on average when merged; quantize them with the scales of one of them",
            stacklevel=4,
        )


def must_agree(source: Source, name: str, dtype: torch.dtype) -> bool:
    """Whether a tensor must have the same values in all models, since integers that are no codes have no average.

    BatchNorm's count of batches may differ: a merged model does not read it.
    """
    layer, _, part = name.rpartition(".weight.")
    merged = layer in source.manifest["weights"] and part in ("codes", "zero_point")
    return not (merged or dtype.is_floating_point or name.endswith("num_batches_tracked"))


def description(source: Source, any_bits: bool) -> dict[str, Any]:
    """The facts that must agree between models: tensors' shapes and dtypes, ranges, and where quantizers are.

    ``any_bits`` leaves the ranges out, and how codes lie in memory.
    """
    weights = source.manifest["weights"]
    codes = {f"{name}.weight.codes" for name in weights}
    facts: dict[str, Any] = {
        name: f"{shape} {dtype}" for name, (dtype, shape) in source.specs.items() if name not in codes
    }
    for name, weight in weights.items():
        facts[f"{name}: weight shape"] = tuple(weight["shape"])
        facts[f"{name}: weight axis"] = weight["axis"]
        facts[f"{name}: weight group_size"] = weight.get("group_size")
        if not any_bits:
            facts[f"{name}: weight range"] = tuple(weight["range"])
    for name, (qmin, qmax) in source.manifest["inputs"].items():
        facts[f"{name}: input levels"] = "any" if any_bits else qmax - qmin + 1
    for key in ("folded", "shared", "tied"):
        facts |= {f"{name}: {key}": other for name, other in source.manifest[key].items()}
    return facts
