"""The file of a quantized model: safetensors, with a manifest, read and written one tensor at a time. Never a pickle.

What a header claims is checked against the file before anything is read or allocated; a hash of each tensor, in the
manifest, and a hash of the manifest reveal an altered file. The same content gives the same file, byte for byte.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from math import prod
from typing import Any

import torch

from hdrq import checks
from hdrq.checkpoint.files import disk_with_room, replacing
from hdrq.checkpoint.library import SafetensorError
from hdrq.checkpoint.tensors import (
    DTYPES,
    LONGEST_HEADER,
    NAMES,
    Spec,
    TensorFile,
    as_bytes,
    header,
    places_of,
)
from hdrq.prepare.attention import OPERANDS

FORMAT = 3
FORMATS = {2: {"contract": 1}, FORMAT: {}}  # that are read, and what a manifest of each leaves unsaid
# The keys of a manifest that say what the file holds; the rest says how the model was made. A model that is made of
# this one has its structure, and neither what its layers read nor its hashes.
STRUCTURE = ("format", "hdrq", "weights", "tied", "inputs", "shared", "attention")
TABLES = (*STRUCTURE, "statistics", "sha256")


def packs(qmin: int, qmax: int) -> bool:
    """Whether codes of a range are stored two to a byte (:func:`hdrq.ops.pack`)."""
    return qmin >= -8 and qmax <= (7 if qmin < 0 else 15)


def codes_spec(qmin: int, qmax: int, shape: tuple[int, ...]) -> Spec:
    """How the file holds codes of a range and a shape."""
    return (torch.uint8, ((prod(shape) + 1) // 2,)) if packs(qmin, qmax) else (checks.code_range(qmin, qmax), shape)


def scales_shape(name: str, facts: Mapping[str, Any]) -> tuple[int, ...]:
    """The shape of the scales, and zero points, of a weight that a manifest describes.

    Raises:
        TypeError, ValueError: an axis that there is not, or groups that do not divide the weight.
    """
    shape, axis = tuple(facts["shape"]), facts["axis"]
    if facts.get("group_size") is not None:
        return checks.groups(f"weight of {name}", shape, axis, facts["group_size"])
    return (1 if axis is None else shape[checks.integer(f"axis of {name}", axis, -len(shape), len(shape) - 1)],)


def statistics_specs(manifest: Mapping[str, Any]) -> dict[str, Spec]:
    """The dtype and shape of every tensor of a manifest's ``statistics``: what layers read, no part of the model."""
    specs: dict[str, Spec] = {}
    for name, facts in manifest.get("statistics", {}).items():
        groups, inputs, rank = facts["groups"], facts["inputs"], facts.get("rank")
        shapes: dict[str, tuple[int, ...]] = {"sums": (groups, inputs)}
        if rank is None:
            shapes["scatter"] = (groups, inputs * (inputs + 1) // 2)
        else:
            shapes |= {"factor": (groups, inputs, rank), "diagonal": (groups, inputs)}
        specs |= {f"{name}.statistics.{part}": (torch.float32, shape) for part, shape in shapes.items()}
    return specs


class Reader:
    """A file to read from, in a ``with`` block.

    ``manifest`` has tables ``weights`` (by layer: range, axis, shape, ``affine`` where it has zero points, and
    ``group_size`` where neighbours along the last axis share a scale: scales then have the shape
    ``(…, last / group_size)``),
    ``tied`` (layers whose weight is another's; files of older versions lack it, and hold that weight under both names),
    ``inputs`` (by module: range), ``shared`` (modules whose input quantizer is another's), ``folded``, ``attention``
    (:func:`hdrq.prepare.attention.operand_table`) and ``sha256``, and says how the model was made: ``recipe``,
    ``bits``, ``seed``, ``fingerprints``, ``architecture`` and ``coverage`` (:class:`hdrq.prepare.coverage.Coverage`:
    what share of parameters and multiply-adds is quantized), or ``merge`` and ``models``. Files of earlier versions
    lack some of these. ``specs`` has the dtype and shape of every tensor of the model, ``statistics_specs`` those of
    what its layers read, where the table ``statistics`` (by layer: rows, groups, inputs, transposed, and the rank of a
    sketch) names any: :class:`hdrq.quantizers.provenance.Statistics`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a file that :class:`Writer` wrote, or an altered one.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = os.fspath(path)
        if os.path.isdir(path):
            raise ValueError(f"path must be a file that hdrq.save wrote, got the folder {self.path!r}")
        if os.path.exists(path) and not os.path.isfile(path):  # opening a pipe would wait
            raise ValueError(
                f"path must be a file that hdrq.save wrote, got {self.path!r}, a device, a pipe or a socket"
            )
        if not os.path.exists(path):
            raise FileNotFoundError(
                f"path must be a file that hdrq.save wrote, got {self.path!r}, which does not exist"
            )
        with ExitStack() as stack, _refusing(self.path):
            self._file = TensorFile(path)
            stack.callback(self._file.close)
            self.manifest = _manifest(self._file.metadata.get("hdrq"), self._file.metadata.get("sha256"))
            _check(self.manifest, self._file.specs)
            self.statistics_specs = statistics_specs(self.manifest)
            self.specs = {n: spec for n, spec in self._file.specs.items() if n not in self.statistics_specs}
            self._stack = stack.pop_all()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *error) -> None:
        self._stack.close()

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return os.path.getsize(self.path)

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, in memory of its own.

        Raises:
            ValueError: it is not what was written.
        """
        with _refusing(self.path):
            value = self._file.read(name)
            if _hash(value) != self.manifest["sha256"][name]:
                raise ValueError(f"tensor {name} has another hash than it was written with")
            return value


class Writer:
    """A file to write to, in a ``with`` block, at whose end it appears, whole.

    Args:
        path: of the file; what is there is replaced.
        specs: the dtype and shape of every tensor.
        manifest: as :class:`Reader` has it, without ``sha256``.

    Raises:
        OSError: it cannot be written; what was there stays.
        ValueError: the manifest does not fit the tensors, or a tensor its spec, or one is missing at the end.
    """

    def __init__(self, path: str | os.PathLike, specs: Mapping[str, Spec], manifest: Mapping[str, Any]) -> None:
        for name, (dtype, _) in specs.items():
            if dtype not in NAMES:
                raise ValueError(f"{name} must be of {', '.join(DTYPES)}, got {dtype}")
        # Wider types first: a reader maps each tensor where it lies, so it must be aligned.
        self.specs = dict(sorted(specs.items(), key=lambda item: (-item[1][0].itemsize, item[0])))
        self._path, self._manifest = path, {**manifest, "format": FORMAT}
        self._hashes = dict.fromkeys(specs, "0" * 64)
        self._places = places_of(self.specs)
        _check(json.loads(self._text()), self.specs)
        if len(self._header()) > LONGEST_HEADER:
            raise ValueError(
                f"header must be of at most {LONGEST_HEADER:,} bytes to be read, got {len(self._header()):,}"
            )

    def __enter__(self) -> Writer:
        with ExitStack() as stack:
            self._file = stack.enter_context(replacing(self._path))
            self._write(0, self._header())
            self._start = self._file.tell()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error) -> bool | None:
        if error[0] is None:
            missing = [name for name, digest in self._hashes.items() if digest == "0" * 64]
            try:
                if missing:
                    raise ValueError(f"every tensor must be written, got none for {checks.listed(missing)}")
                self._write(0, self._header())
            except BaseException as problem:
                self._stack.__exit__(type(problem), problem, problem.__traceback__)
                raise
        return self._stack.__exit__(*error)

    def write(self, name: str, value: torch.Tensor) -> None:
        """Write one tensor, in any order."""
        value = value.detach().cpu().contiguous()
        if (value.dtype, tuple(value.shape)) != self.specs[name]:
            raise ValueError(f"{name} must be {self.specs[name]}, got {value.dtype} of shape {tuple(value.shape)}")
        self._hashes[name] = _hash(value)
        self._write(self._start + self._places[name][0], as_bytes(value))

    def _write(self, place: int, data) -> None:
        with disk_with_room(self._path):
            self._file.seek(place)
            self._file.write(data)

    def _text(self) -> str:
        manifest = {**self._manifest, "sha256": self._hashes}
        return json.dumps(manifest, sort_keys=True, default=_plain)

    def _header(self) -> bytes:
        """The header, whose length does not depend on the hashes."""
        text = self._text()
        return header(self.specs, self._places, {"hdrq": text, "sha256": _text_hash(text)})


def _plain(value: Any) -> Any:
    """A NumPy number as a number of Python, which JSON has: options may be NumPy's."""
    if not hasattr(value, "item"):
        raise ValueError(f"manifest must be of what JSON has, got {type(value).__name__}: {value}")
    return value.item()


@contextmanager
def _refusing(path: str) -> Iterator[None]:
    """Raise any error about a file's content as a ValueError that names the file."""
    try:
        yield
    except (SafetensorError, ValueError, TypeError, RuntimeError, RecursionError, OverflowError) as error:
        raise ValueError(f"path must be a file that hdrq.save wrote, got {path!r}: {error}") from error


def _manifest(text: str | None, digest: str | None) -> dict[str, Any]:
    if text is None:
        raise ValueError("it has no manifest")
    try:
        manifest = json.loads(text, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        raise ValueError(f"manifest must be JSON, got {text[:40]!r}: {error}") from error
    version = manifest.get("format") if isinstance(manifest, dict) else None
    if version not in FORMATS:
        raise ValueError(f"manifest must be of format {' or '.join(map(str, FORMATS))}, got {version!r}")
    if digest != _text_hash(text):
        raise ValueError("manifest has another hash than it was written with")
    return {**FORMATS[version], **manifest}


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; one that has a name twice says two things, of which readers would take one or the other."""
    found = dict(pairs)
    if len(found) < len(pairs):
        ((name, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"manifest must have each name once, got {name!r:.100} more often")
    return found


def _check(manifest: dict[str, Any], specs: Mapping[str, Spec]) -> None:
    """Check that the tables of a manifest fit each other and the tensors."""
    for key in ("folded", "weights", "inputs", "shared", "sha256"):
        if not isinstance(manifest.get(key), dict):
            raise ValueError(f"manifest must have a table of {key}, got {manifest.get(key)!r}")
    for key, kind in {"models": list, "run": dict, "origin": dict, "parent": dict}.items():
        if not isinstance(manifest.get(key), kind | None):
            raise ValueError(f"manifest must have a {kind.__name__} for {key}, got {manifest[key]!r:.100}")
    if manifest["sha256"].keys() != specs.keys():
        raise ValueError(
            f"manifest must hash all tensors, got others: {sorted(manifest['sha256'].keys() ^ specs.keys())}"
        )
    for key in ("folded", "shared"):
        if not all(isinstance(value, str) for value in manifest[key].values()):
            raise ValueError(f"manifest must name modules in {key}, got {manifest[key]!r}")
    tied = manifest.setdefault("tied", {})
    if not isinstance(tied, dict) or any(
        not isinstance(owner, str) or owner not in manifest["weights"] or name in manifest["weights"]
        for name, owner in tied.items()
    ):
        raise ValueError(f"manifest must name one layer with a weight for every layer tied to it, got {tied!r}")
    attention = manifest.get("attention", {})
    labels = [attention.values()] if isinstance(attention, dict) else [[attention]]
    if not all(isinstance(row, list) and row and {*row} <= {*OPERANDS, None} for rows in labels for row in rows):
        raise ValueError(f"manifest must have lists of operands for attention, got {attention!r}")
    inputs = manifest["inputs"]
    orphans = [name for name, owner in manifest["shared"].items() if owner not in inputs or name in inputs]
    if orphans:
        raise ValueError(f"manifest must have one input quantizer for every module that shares one, got {orphans}")
    architecture = manifest.get("architecture", {"factory": "", "arguments": {}})
    if not (
        isinstance(architecture, dict) and [type(architecture.get(k)) for k in ("factory", "arguments")] == [str, dict]
    ):
        raise ValueError(f"manifest must have factory and arguments of the architecture, got {architecture!r}")
    for name, facts in manifest["weights"].items():
        if not (isinstance(facts, dict) and facts.keys() - {"affine", "group_size"} == {"range", "axis", "shape"}):
            raise ValueError(f"manifest must have range, axis and shape of weight {name!r}, got {facts!r}")
        low, high = _range(name, facts["range"])
        shape = tuple(checks.integer(f"shape of {name}", side, 0, 2**48) for side in facts["shape"])
        _expect(specs, f"{name}.weight.codes", *codes_spec(low, high, shape))
        scales = scales_shape(name, facts)
        _expect(specs, f"{name}.weight.scale", torch.float32, scales)
        if facts.get("affine"):
            _expect(specs, f"{name}.weight.zero_point", torch.int32, scales)
    for name, bounds in inputs.items():
        _range(name, bounds)
        _expect(specs, f"{name}.input.scale", torch.float32, (1,))
    _check_statistics(manifest, specs)


def _check_statistics(manifest: dict[str, Any], specs: Mapping[str, Spec]) -> None:
    table = manifest.get("statistics", {})
    if not isinstance(table, dict) or not table.keys() <= manifest["weights"].keys():
        raise ValueError(f"manifest must have statistics of layers with a weight, got {str(table)[:200]}")
    for name, facts in table.items():
        known = {"rows", "groups", "inputs", "transposed"}
        if not (isinstance(facts, dict) and facts.keys() - {"rank"} == known and type(facts["transposed"]) is bool):
            raise ValueError(f"statistics of {name} must have {', '.join(sorted(known))}, got {facts!r}")
        for key in facts.keys() - {"transposed"}:
            checks.integer(f"{key} of the statistics of {name}", facts[key], 1, 2**48)
        if facts["groups"] * facts["inputs"] * _outputs(manifest["weights"][name], facts) != prod(
            manifest["weights"][name]["shape"]
        ):
            raise ValueError(f"statistics of {name} must fit its weight, got {facts!r}")
    for name, (dtype, shape) in statistics_specs(manifest).items():
        _expect(specs, name, dtype, shape)


def _outputs(weight: Mapping[str, Any], facts: Mapping[str, Any]) -> int:
    """The outputs of each group of a weight."""
    return weight["shape"][-1 if facts["transposed"] else 0] // facts["groups"]


def _range(name: str, bounds: Any) -> tuple[int, int]:
    if not (isinstance(bounds, list) and len(bounds) == 2):
        raise ValueError(f"range of {name} must be two integers, got {bounds!r}")
    checks.quant_range(*bounds)
    return bounds[0], bounds[1]


def _expect(specs: Mapping[str, Spec], name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if name not in specs:
        raise ValueError(f"checkpoint must hold {name!r}, got none")
    if specs[name] != (dtype, shape):
        raise ValueError(f"{name} must be {dtype} of shape {shape}, got {specs[name][0]} of shape {specs[name][1]}")


def _hash(value: torch.Tensor) -> str:
    digest = hashlib.sha256(f"{NAMES[value.dtype]} {tuple(value.shape)} ".encode())
    digest.update(as_bytes(value))
    return digest.hexdigest()


def _text_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
