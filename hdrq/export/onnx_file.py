"""An ONNX model in a file: its constants, and its nodes. Nothing of it is run."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto, numpy_helper

from hdrq.export.foreign import naming

DOMAINS = ("", "ai.onnx", "com.microsoft")  # whose QuantizeLinear and DequantizeLinear are ONNX's
LONGEST = 2**48  # of a side of a tensor
SCALES = ("FLOAT", "FLOAT16", "BFLOAT16")


class Model:
    """A model in a file.

    Attributes:
        constants: tensors of initializers and of Constant nodes, by name.
        nodes: of the graph; held, since they are known by identity.
        metadata: texts by key.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is damaged; the message names it.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = os.fspath(path)
        if os.path.exists(path) and not os.path.isfile(path):  # opening a pipe would wait
            raise ValueError(f"path must be an ONNX file, got {self.path!r}, a folder, a device or a pipe")
        data = Path(path).read_bytes()
        with naming(self.path):
            self.sha256 = hashlib.sha256(data).hexdigest()
            self.proto = _parsed(data)
            self.nodes = list(self.proto.graph.node)
            self.metadata = {entry.key: entry.value for entry in self.proto.metadata_props}
            self.constants = _constants(self.proto.graph)
            self._aliases: dict[str, str] = {}
            for node in self.nodes:
                if node.op_type == "Identity" and node.domain in DOMAINS and (source := self.resolve(node.input[0])):
                    self._aliases[node.output[0]] = source

    def resolve(self, name: str) -> str:
        """The constant that a name stands for; empty for none."""
        name = self._aliases.get(name, name)
        return name if name in self.constants else ""

    @property
    def external(self) -> set[str]:
        """The constants whose bytes lie in other files."""
        return {name for name, tensor in self.constants.items() if tensor.data_location == TensorProto.EXTERNAL}

    def beside(self) -> dict[str, str]:
        """The SHA-256 of every file that constants lie in, by its name.

        Raises:
            ValueError: it is not in the model's folder.
        """
        folder, found = Path(self.path).absolute().parent, {}
        for name in sorted(self.external):
            facts = {entry.key: entry.value for entry in self.constants[name].external_data}
            location = facts.get("location", "")
            if Path(location).name != location or not (folder / location).is_file():
                raise ValueError(f"external data must lie in files beside the model, got {location!r} for {name}")
            if location not in found:
                digest = hashlib.sha256()
                with open(folder / location, "rb") as file:
                    while part := file.read(2**20):
                        digest.update(part)
                found[location] = digest.hexdigest()
        return found

    def kind(self, name: str) -> str:
        """The element type of a constant."""
        return TensorProto.DataType.Name(self.constants[name].data_type)

    def dims(self, name: str) -> tuple[int, ...]:
        """The shape of a constant."""
        return tuple(self.constants[name].dims)

    def array(self, name: str) -> np.ndarray:
        """The elements of a constant, read at each call; 4 bits as int8."""
        tensor = self.constants[name]
        if tensor.data_location == TensorProto.EXTERNAL:  # older versions of onnx would keep what they read in it
            tensor = TensorProto.FromString(tensor.SerializeToString())
        value = numpy_helper.to_array(tensor, os.path.dirname(os.path.abspath(self.path)))
        if value.shape != tuple(tensor.dims):
            raise ValueError(f"{name} must have the shape {tuple(tensor.dims)}, got {value.shape}")
        return value.astype(np.int8) if self.kind(name) in ("INT4", "UINT4") else value

    def scale(self, name: str, *, signed: bool = False) -> np.ndarray:
        """A scale as float32: finite, and positive, or where ``signed`` not 0."""
        if self.kind(name) not in SCALES:
            raise ValueError(f"scale {name} must be of {', '.join(SCALES)}, got {self.kind(name)}")
        value = self.array(name).astype(np.float32)
        wrong = value[~np.isfinite(value) | (value == 0 if signed else value <= 0)]
        if wrong.size:
            raise ValueError(f"scale {name} must be finite and {'not 0' if signed else 'positive'}, got {wrong[0]}")
        return value

    def digest(self, name: str) -> str:
        """A hash of a constant of any type."""
        value = self.array(name)
        data = json.dumps(value.tolist()).encode() if value.dtype == object else value.tobytes()
        return hashlib.sha256(data).hexdigest()

    def note(self, key: str) -> dict[str, Any]:
        """What the metadata says under a key, in JSON."""
        text = self.metadata.get(key, "{}")
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise ValueError(f"metadata {key} must be a table in JSON, got {text[:40]!r}")
        return value


def all_nodes(graph: Any, *, inner: bool = False) -> Iterator[Any]:
    """Every node of a graph, and of the graphs in their attributes; of those alone, where ``inner``."""
    graphs = [(graph, not inner)]
    while graphs:
        part, wanted = graphs.pop()
        for node in part.node:
            if wanted:
                yield node
            for held in node.attribute:
                graphs += [(each, True) for each in (*held.graphs, *([held.g] if held.HasField("g") else []))]


def attribute(node: Any, name: str, default: int) -> int:
    """An integer attribute of a node."""
    return next((held.i for held in node.attribute if held.name == name), default)


def shown(node: Any) -> str:
    """A node for messages."""
    return f"{node.op_type} {node.name or ', '.join(node.output)}"


def free(taken: Collection[str], name: str) -> str:
    """The name, or that with a number, that is not taken."""
    return next(n for n in (name if i == 0 else f"{name}.{i}" for i in range(len(taken) + 1)) if n not in taken)


def _parsed(data: bytes) -> Any:
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
    except DecodeError as error:
        raise ValueError("file must be a whole ONNX model, got bytes that are none") from error
    if not proto.graph.node or not proto.opset_import:
        raise ValueError("file must be a whole ONNX model, got one without nodes or opset")
    if proto.graph.sparse_initializer:
        raise ValueError(f"initializers must be dense, got {len(proto.graph.sparse_initializer)} sparse ones")
    return proto


def _constants(graph: Any) -> dict[str, Any]:
    held = [(tensor.name, tensor) for tensor in graph.initializer]
    for node in graph.node:
        if node.op_type == "Constant" and node.domain in DOMAINS:
            held += [(node.output[0], value.t) for value in node.attribute if value.name == "value"]
    constants = dict(held)
    if "" in constants or len(constants) < len(held):
        raise ValueError("initializers must have names, each its own, got one without or two of one name")
    for name, tensor in constants.items():
        if not all(0 <= side < LONGEST for side in tensor.dims):
            raise ValueError(f"{name} must have sides in [0, {LONGEST}), got the shape {tuple(tensor.dims)}")
    return constants
