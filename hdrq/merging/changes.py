"""Changes of a model's weights: what may be added to it, and how that is read."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hdrq import checks
from hdrq.checkpoint.files import file_hash
from hdrq.checkpoint.float_states import IN_FOLDER, read_state
from hdrq.checkpoint.library import SafetensorError, safe_open
from hdrq.checkpoint.workdir import state_hash
from hdrq.export.folders import Folder, is_folder
from hdrq.export.folders.reading import read_json
from hdrq.merging.adapters import adapter_changes, adapter_files, is_adapter
from hdrq.merging.sources import hash_of
from hdrq.merging.sources import opened as open_source
from hdrq.merging.weights import Difference, Named, Rows, Tensors, Weights

Place = str | os.PathLike | Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Change:
    """A change δ of a model's weights, to be added ``scale`` times.

    Args:
        add: a LoRA adapter as peft writes them, a folder or a file of tensors; or, with ``minus``, the weights B of
            ``δ = B − C``: a state dict in full precision (a file, a folder of shards), a file of :func:`hdrq.save`, or
            a quantized folder of transformers. Tensors by name serve in place of any file; without ``minus`` those that
            are no adapter are δ itself.
        minus: the weights C, of the same names and shapes.
        scale: a factor on δ; −1 takes it away again.
        alpha: of an adapter that has no ``adapter_config.json`` beside it: its product is multiplied by alpha/r.
    """

    add: Place
    minus: Place | None = None
    scale: float = 1.0
    alpha: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("add", self.add), ("minus", self.minus)):
            if not isinstance(value, str | os.PathLike | Mapping) and not (name == "minus" and value is None):
                raise TypeError(f"{name} must be a path, or tensors by name, got {type(value).__name__}")
        checks.real("scale", self.scale)


@dataclass(frozen=True)
class Opened:
    """A change as it is read.

    ``parts`` gives for the name of each changed weight what it changes by; ``whole`` says that the names are those of
    a whole model, in which one name of a shared weight stands for all of them.
    """

    label: str
    parts: Mapping[str, Callable[[], Rows]]
    whole: bool
    facts: dict[str, Any]  # for the manifest


def changes_of(changes: Any) -> list[Change]:
    """One change or several, as such; a path or tensors by name are one without more.

    Raises:
        TypeError, ValueError: it is none, or there are none.
    """
    if isinstance(changes, Change | str | os.PathLike | Mapping):
        changes = [changes]
    if not isinstance(changes, Iterable):
        raise TypeError(f"changes must be a hdrq.Change, a path or tensors by name, got {type(changes).__name__}")
    found = [change if isinstance(change, Change) else Change(change) for change in changes]
    if not found:
        raise ValueError("changes must be one or more, got none")
    return found


def listed_changes(
    add: Sequence[str | os.PathLike],
    minus: Sequence[str] | None = None,
    scale: Sequence[float] | None = None,
    alpha: float | None = None,
) -> list[Change]:
    """Changes from lists, as a command line gives them: ``minus`` and ``scale`` go with ``add`` in its order.

    Args:
        minus: a path, or ``"-"`` for none; None or empty for none at all.
        alpha: of every adapter.

    Raises:
        ValueError: they are not as many as ``add``.
    """
    for name, values in (("minus", minus), ("scale", scale)):
        if values and len(values) != len(add):
            more = ', "-" for an adapter' if name == "minus" else ""
            raise ValueError(f"{name} must be given once for each of {len(add)} changes{more}, got {len(values)}")
    minuses = [None if text == "-" else text for text in minus or ["-"] * len(add)]
    each = zip(add, minuses, scale or [1.0] * len(add), strict=True)
    if alpha is not None and None not in minuses:
        raise ValueError(f"alpha must be left out but for adapters, got {alpha} for differences of weights alone")
    return [Change(a, m, s, alpha if m is None else None) for a, m, s in each]


def opened(change: Change, base: Weights, stack: ExitStack, number: int) -> Opened:
    """A change of the weights of ``base``, whose files are open while ``stack`` is.

    Raises:
        FileNotFoundError: no such file.
        TypeError, ValueError: it cannot be read, or it is not of this model; names are given, and the way out.
    """
    if "awq" in _kinds(base.source.manifest) and (not isinstance(change.add, Mapping) or is_adapter(change.add)):
        raise ValueError(
            "the model must have its weights as they were trained, got one made by AWQ, which scales their inputs: "
            "changes of other models do not fit it; give what its own weights change by, as tensors by name"
        )
    if isinstance(change.add, Mapping):
        label, config, hashes = f"change {number}", None, {"add": state_hash(change.add)}
        adapter = dict(change.add) if is_adapter(change.add) else None
    else:
        label = os.fspath(change.add)
        adapter, config, hashes = _adapter(Path(change.add))
    facts: dict[str, Any] = {"scale": float(change.scale), "sha256": hashes}
    if adapter is not None:
        if change.minus is not None:
            raise ValueError(f"minus must be left out for an adapter, got one for {label}; scale=-1 takes it away")
        rows = adapter_changes(adapter, config, change.alpha, base, label)
        _check_parts(rows, base, label, shared=False)
        _check_untied(adapter, base, label)
        _check_unfolded(rows, base, label)
        parts = {n: _scaled(lambda r=r: r, None, change.scale) for n, r in rows.items()}  # type: ignore[misc]
        return Opened(
            label,
            parts,
            False,
            {"kind": "adapter", "alpha": None if change.alpha is None else float(change.alpha), **facts},
        )
    if change.alpha is not None:
        raise ValueError(f"alpha must be left out but for an adapter, got {change.alpha} for {label}")
    if change.minus is None and not isinstance(change.add, Mapping):
        raise ValueError(
            f"minus must be given for {label}, which is no adapter of peft's: a change is the difference of two "
            "models' weights; got none"
        )
    added, hashes["add"] = _weights(change.add, stack, label)
    taken: Named | None = None
    if change.minus is not None:
        other = os.fspath(change.minus) if not isinstance(change.minus, Mapping) else f"minus of {label}"
        taken, hashes["minus"] = _weights(change.minus, stack, other)
        _check_alike(added, taken, label, other)
    names = [name for name, (dtype, _) in added.specs.items() if dtype.is_floating_point]
    _check_folds([added] if taken is None else [added, taken], base, label)
    _check_parts(names, base, label, shared=True)
    wrong = [n for n in names if added.specs[n][1] != base.specs[n][1]]
    if wrong:
        shapes = (f"{name} {added.specs[name][1]}, not {base.specs[name][1]}" for name in wrong)
        raise ValueError(f"{label} must have weights of the model's shapes, got {checks.listed(shapes)}")

    def part(name: str) -> Callable[[], Rows]:
        minus = None if taken is None else lambda: taken.read(name)
        return _scaled(lambda: added.read(name), minus, change.scale)

    return Opened(label, {name: part(name) for name in names}, True, {"kind": "difference", **facts})


def _kinds(facts: Any) -> set[str]:
    """How a model, or one that it was made of, was quantized elsewhere."""
    if not isinstance(facts, Mapping):
        return set()
    parents = [facts.get("parent"), *(m if isinstance(m := facts.get("models"), list) else [])]
    origin = facts.get("origin")
    own = {str(origin.get("kind"))} if isinstance(origin, Mapping) else set()
    return own.union(*map(_kinds, parents))


def _scaled(add: Callable[[], Rows], minus: Callable[[], Rows] | None, scale: float) -> Callable[[], Rows]:
    return lambda: Difference(add(), None if minus is None else minus(), scale)


def _adapter(path: Path) -> tuple[dict[str, torch.Tensor] | None, dict[str, Any] | None, dict[str, Any]]:
    """The tensors of an adapter, its config, and the hashes of both files; None for what is no adapter."""
    if not path.exists():
        raise FileNotFoundError(f"add must be a file or a folder that exists, got {path}")
    files = adapter_files(path)
    if files is None or (path.is_file() and _is_quantized(path)):
        return None, None, {}
    tensors = read_state(files[0])
    if path.is_file() and not is_adapter(tensors):
        return None, None, {}
    config = None if files[1] is None else read_json(files[1], "a table of settings")
    return tensors, config, {"add": [file_hash(file) for file in files if file is not None]}


def _weights(place: Place, stack: ExitStack, label: str) -> tuple[Named, Any]:
    """The weights at a place, and a hash of each file that is read."""
    if isinstance(place, Mapping):
        for name, value in place.items():
            if not isinstance(value, torch.Tensor):
                raise TypeError(f"{label} must be tensors by name, got {type(value).__name__} for {name!r}")
        return Tensors.of(place), state_hash(place)
    path = Path(place)
    if _is_quantized(path):
        source = open_source(path, stack)
        return Weights(source), hash_of(source)
    state = read_state(path)  # safetensors are mapped: a tensor is read when its values are
    return Tensors.of(state), [file_hash(file) for file in _state_files(path)]


def _is_quantized(path: Path) -> bool:
    """Whether a path is a file that :func:`hdrq.save` wrote, or a folder with quantized weights."""
    if path.is_dir():
        config = read_json(path / "config.json") if is_folder(path) else {}
        sections = ("quantization_config", "compression_config")
        return any(config.get(key) for key in sections) or (path / "quantize_config.json").is_file()
    if not path.is_file() or path.suffix in (".json", ".bin", ".pt", ".pth"):
        return False
    try:
        with safe_open(path, framework="pt") as file:
            return "hdrq" in (file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise ValueError(f"add and minus must be files of safetensors, got {path}: {error}") from error


def _state_files(path: Path) -> list[Path]:
    """The files that :func:`hdrq.checkpoint.float_states.read_state` reads of a path."""
    if path.is_dir():
        path = next(path / name for name in IN_FOLDER if (path / name).is_file())
    if path.suffix != ".json":
        return [path]
    shards = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
    return [path, *(path.parent / shard for shard in sorted(shards))]


def _check_alike(a: Named, b: Named, label: str, other: str) -> None:
    """Two models whose difference is taken have the same names, shapes and integers."""
    differences = [f"{name} is in one alone" for name in sorted(a.specs.keys() ^ b.specs.keys())]
    for name in a.specs.keys() & b.specs.keys():
        (kind, shape), (other_kind, other_shape) = a.specs[name], b.specs[name]
        if shape != other_shape or kind.is_floating_point != other_kind.is_floating_point:
            differences.append(f"{name} is {shape} {checks.short(kind)} and {other_shape} {checks.short(other_kind)}")
        elif not kind.is_floating_point and not name.endswith("num_batches_tracked"):
            whole = slice(None)
            if not torch.equal(a.read(name).rows(whole), b.read(name).rows(whole)):
                differences.append(f"{name} has other integers, which have no difference to add")
    if differences:
        raise ValueError(f"{label} and {other} must be alike, got {checks.listed(sorted(differences))}")


def _check_untied(adapter: Mapping[str, torch.Tensor], base: Weights, label: str) -> None:
    """A folder whose embedding is its head too, as its configuration alone says, has no place for a change of one."""
    config = base.source.config if isinstance(base.source, Folder) else {}
    tied = config.get("tie_word_embeddings", (config.get("text_config") or {}).get("tie_word_embeddings"))
    found = [name for name in adapter if ".lora_embedding_A" in name]
    if tied and found:
        raise ValueError(
            f"{label} must be for weights of one layer each, got {checks.listed(found)}, an embedding that is the "
            "head too (tie_word_embeddings); a change of one of them alone has no place"
        )


def _check_folds(models: Sequence[Named], base: Weights, label: str) -> None:
    """Models whose difference is taken have the BatchNorms folded that the model has."""
    folded = base.source.manifest["folded"]
    for model in models:
        if isinstance(model, Weights):
            same = model.source.manifest["folded"] == folded and folded_in_place(model) == folded_in_place(base)
            found = [] if same else ["others"]
        else:
            found = [name for name in folded if any(tensor.startswith(f"{name}.") for tensor in model.specs)]
            found += [name for name in folded_in_place(base) if f"{name}.running_var" in model.specs]
        if found:
            raise ValueError(
                f"{label} must be of weights with the BatchNorms folded that the model has folded, got "
                f"{checks.listed(found)}; give states that are folded, or files that hdrq.save wrote of such models"
            )


def _check_unfolded(names: Iterable[str], base: Weights, label: str) -> None:
    """An adapter is for weights as they were trained, into which no BatchNorm is folded."""
    norms = {layer: norm for norm, layer in base.source.manifest["folded"].items()}
    found = [f"{n} (of {norms[n.rpartition('.')[0]]})" for n in names if n.rpartition(".")[0] in norms]
    for norm, channels in folded_in_place(base).items():
        shapes = {name: base.specs[name][1] for name in names}
        found += [
            f"{n} (it may be of {norm})" for n, shape in shapes.items() if len(shape) > 1 and channels in shape[:2]
        ]
    if found:
        raise ValueError(
            f"{label} must be for weights as they were trained, got {checks.listed(found)}, into which BatchNorm is "
            "folded; merge it into the float model, and quantize that"
        )


def folded_in_place(weights: Weights) -> dict[str, int]:
    """The norms of which nothing is left but an activation, each with its channels: they normalize by 1 and shift by 0.

    One that was never trained has a variance of 1; with eps a folded one adds up to 1.
    """
    found = {}
    for name in weights.plain:
        norm, _, part = name.rpartition(".")
        if part == "running_var":
            variance = weights.source.tensor(name)
            gain = weights.source.tensor(f"{norm}.weight") if f"{norm}.weight" in weights.plain else torch.ones(1)
            if (
                len(variance)
                and variance.amin() == variance.amax()
                and 0.9 < variance[0] < 1
                and bool((gain == 1).all())
            ):
                found[norm] = len(variance)
    return found


def _check_parts(names: Iterable[str], base: Weights, label: str, shared: bool) -> None:
    """The names are those of tensors that can be changed."""
    names = list(names)
    missing = [name for name in names if name not in base.specs]
    if missing:
        raise ValueError(
            f"{label} must be for tensors of the model, got {checks.listed(missing)}, which it does not have; it has "
            f"{checks.listed(list(base.specs)[:4])}"
        )
    integers = [name for name in names if not base.specs[name][0].is_floating_point]
    if integers:
        raise ValueError(f"{label} must be for numbers in floating point, got integers in {checks.listed(integers)}")
    if not shared:
        tied = [f"{name} ({', '.join(base.same(name)[:3])})" for name in names if len(base.same(name)) > 1]
        if tied:
            raise ValueError(
                f"{label} must be for weights of one layer each, got {checks.listed(tied)}, which are one: a change of "
                "one of them alone has no place; quantize a model that does not tie them"
            )
