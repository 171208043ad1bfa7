"""Quantized ONNX models as files of hdrq, so that they can be merged on their integers."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hdrq import checks, ops
from hdrq._version import __version__
from hdrq.checkpoint.format import Spec, Writer, codes_spec, packs, scales_shape
from hdrq.export.foreign import naming
from hdrq.export.onnx_qdq import require

if TYPE_CHECKING:
    from hdrq.export.onnx_graph import Bias, Graph, Grid, Weight
    from hdrq.export.onnx_like import OnnxWriter

STRUCTURE = "onnx."  # before the names of hashes of the graph


def read_onnx(path: str | os.PathLike, out: str | os.PathLike) -> dict[str, Any]:
    """Write a quantized ONNX model as a file of hdrq, to be merged and written back (:func:`hdrq.export.write_like`).

    Weights that ``DequantizeLinear`` reads become codes with ``(codes − zero_point)·scale``: per tensor, along an
    axis, or in blocks, which lie along the last axis of the file's codes. Unsigned codes and zero points of b bits are
    those less ``2^(b−1)``; those of our own files are what hdrq had. Quantizers of activations have the range
    ``[low − zero_point, high − zero_point]``. A bias in int32 becomes ``(q − zero_point)·scale`` in float64. All other
    constants are stored as they are: floats are averaged by a merge, integers must agree, and so must the graph, of
    which hashes are stored.

    Args:
        path: QuantizeLinear and DequantizeLinear with constant scales, of 4, 8 or 16 bits, as
            ``onnxruntime.quantization.quantize_static(quant_format=QDQ)`` and :func:`hdrq.export.to_onnx` write them;
            external data is read. No code in it is run.
        out: the file, which appears whole or not at all.

    Returns:
        The manifest; ``origin`` says what the file was, ``parent`` what it says of how it was made, if hdrq wrote it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is damaged, or quantized in another form; the message names the file and the node.
        MissingExtra: onnx; ``pip install "hdrq[export]"``.
    """
    with OnnxModel(path) as model, Writer(out, model.specs, model.manifest) as file:
        for name in model.specs:
            file.write(name, model.tensor(name))
    return model.manifest


def is_onnx(path: str | os.PathLike) -> bool:
    """Whether a path has the name of an ONNX model."""
    return os.fspath(path).endswith(".onnx")


class OnnxModel:
    """A quantized ONNX model as the file of hdrq that :func:`read_onnx` would write: a source of a merge.

    ``manifest``, ``specs`` and ``tensor`` are those of :class:`hdrq.checkpoint.format.Reader`.

    Raises:
        FileNotFoundError, ValueError, MissingExtra: see :func:`read_onnx`.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        require("onnx")
        from hdrq.export.onnx_graph import Graph

        self.path = os.fspath(path)
        self.graph = graph = Graph(path)
        self._held: tuple[str, tuple] = "", ()  # the layer that was read last: its parts are asked for one by one
        with naming(self.path):
            weights = {name: weight_facts(graph, forms[0]) for name, forms in graph.weights.items()}
            inputs = {name: list(grid_range(graph, grid)) for name, grid in graph.grids.items()}
            tables = {"weights": weights, "inputs": inputs, "tied": {}, "shared": {}, "folded": {}}
            self.manifest: dict[str, Any] = {"hdrq": __version__, **tables, "origin": origin_of(graph)}
            if history := graph.note("hdrq.origin"):
                self.manifest["parent"] = history
            self.specs: dict[str, Spec] = {}
            self._read: dict[str, Callable[[], torch.Tensor]] = {}
            for name, facts in weights.items():
                self._add_weight(name, facts)
            for name, grid in graph.grids.items():
                self._add(f"{name}.input.scale", torch.float32, (1,), partial(self._step, grid))
            for name, bias in graph.biases.items():
                self._add(name, torch.float64, graph.dims(bias.codes), partial(bias_values, graph, bias))
            for name in graph.stored:
                self._add(name, KINDS[graph.kind(name)], graph.dims(name), partial(self._plain, name))
            for kind, digest in graph.structure.items():
                self._add(f"{STRUCTURE}{kind}", torch.uint8, (32,), partial(_bytes, digest))

    def __enter__(self) -> OnnxModel:
        return self

    def __exit__(self, *error) -> None:
        pass

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, in memory of its own.

        Raises:
            ValueError: the file does not hold what it says; it is named.
        """
        with naming(self.path):
            return self._read[name]()

    def sha256(self) -> str | dict[str, str]:
        """The SHA-256 of the file, or of each, where constants lie in others."""
        beside = self.manifest["origin"].get("data", {})
        return {os.path.basename(self.path): self.graph.sha256, **beside} if beside else self.graph.sha256

    def writer(self, out: str | os.PathLike, manifest: dict[str, Any]) -> OnnxWriter:
        """What writes a merge into this graph, which is of no more use afterwards."""
        from hdrq.export.onnx_like import OnnxWriter

        return OnnxWriter(out, self, manifest)

    def _add(self, name: str, dtype: torch.dtype, shape: tuple[int, ...], read: Callable[[], torch.Tensor]) -> None:
        if name in self.specs or name in RESERVED:
            raise ValueError(f"constants must not have the names of quantizers' tensors, got {name}")
        self.specs[name], self._read[name] = (dtype, shape), read

    def _add_weight(self, name: str, facts: dict[str, Any]) -> None:
        low, high = facts["range"]
        specs = {"codes": codes_spec(low, high, tuple(facts["shape"]))}
        specs["scale"] = torch.float32, scales_shape(name, facts)
        if facts.get("affine"):
            specs["zero_point"] = torch.int32, specs["scale"][1]
        for place, (part, spec) in enumerate(specs.items()):
            self._add(f"{name}.weight.{part}", *spec, partial(self._part, name, place))

    def _part(self, name: str, place: int) -> torch.Tensor:
        if self._held[0] != name:
            codes, *rest = same_codes(self.graph, name, self.graph.weights[name])
            packed = packs(*self.manifest["weights"][name]["range"])
            self._held = name, (ops.pack(codes) if packed else codes, *rest)
        return self._held[1][place]

    def _step(self, grid: Grid) -> torch.Tensor:
        return _owned(self.graph.scale(grid.scale).reshape(1))

    def _plain(self, name: str) -> torch.Tensor:
        value = self.graph.array(name)
        return _owned(value.view(np.int16)).view(torch.bfloat16) if value.dtype.name == "bfloat16" else _owned(value)


RESERVED = ("__metadata__",)  # of safetensors
KINDS = {
    "FLOAT": torch.float32,
    "FLOAT16": torch.float16,
    "BFLOAT16": torch.bfloat16,
    "DOUBLE": torch.float64,
    "BOOL": torch.bool,
} | {f"{sign}{bits}".upper(): getattr(torch, f"{sign}{bits}") for sign in ("int", "uint") for bits in (8, 16, 32, 64)}


def weight_facts(graph: Graph, weight: Weight) -> dict[str, Any]:
    """A weight's range, axis and shape as a manifest has them."""
    order = axes_of(graph, weight)
    axis = None if weight.axis is None or weight.block else order.index(weight.axis)
    facts = {"range": range_of(weight), "axis": axis, "shape": [graph.dims(weight.codes)[i] for i in order]}
    if is_affine(graph, weight):
        facts["affine"] = True
    if weight.block:
        facts["group_size"] = weight.block
    return facts


def range_of(weight: Weight) -> list[int]:
    """The range of a weight's codes in a file of hdrq, where those of all types are signed."""
    if weight.own is not None:
        return list(weight.own["range"])
    return [bound - middle(weight) for bound in (weight.type.low, weight.type.high)]


def middle(weight: Weight) -> int:
    """What codes of a weight's type are more than those of a file of hdrq: 0 for signed types."""
    return (weight.type.low + weight.type.high + 1) // 2


def is_affine(graph: Graph, weight: Weight) -> bool:
    """Whether a weight has zero points in a file of hdrq; no layer's values alone decide it."""
    if weight.own is not None:
        return "zero_point" in weight.own
    return weight.type.low == 0 or graph.affine


def axes_of(graph: Graph, weight: Weight) -> list[int]:
    """The axes of the graph's codes in the order that a file of hdrq has them in: blocks lie along the last."""
    axes = list(range(len(graph.dims(weight.codes))))
    if weight.own is not None:
        return axes[::-1] if weight.own["turned"] else axes
    if weight.block and weight.axis is not None:
        axes.append(axes.pop(weight.axis))
    return axes


def codes_of(graph: Graph, weight: Weight) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Codes, scales and zero points of a weight, as a file of hdrq has them.

    A negative scale, as block quantizers of ONNX Runtime choose it, is that of ``−1 − codes`` and ``−1 − zero_point``
    with its sign turned: the same values, in the same range.

    Raises:
        ValueError: codes of a file of ours are not what its metadata says.
    """
    order, (low, high) = axes_of(graph, weight), range_of(weight)
    values, scale = graph.array(weight.codes).transpose(order), graph.scale(weight.scale, signed=True)
    zero = graph.array(weight.zero_point).astype(np.int32) if weight.zero_point else np.zeros(scale.shape, np.int32)
    scale, zero = (each.transpose(order) if weight.block else each.reshape(-1) for each in (scale, zero))
    if weight.own is not None:
        values, scale, zero = _restored(weight, values.astype(np.int32), scale, zero, order)
    else:
        zero, turned = mirrored(zero - middle(weight), scale < 0), spread(scale < 0, weight, order)
        scale = np.abs(scale)
    if weight.rounded:
        shifts = torch.from_numpy(np.ascontiguousarray(zero)).float()
        where: Any = {"axis": weight_facts(graph, weight)["axis"], "group_size": weight.block}
        codes = ops.quantize(_owned(values), _owned(scale), low, high, zero_point=shifts, **where)
    else:
        if weight.own is None:
            values = mirrored(values.astype(np.int32) - middle(weight), turned)
        codes = _owned(values)
        checks.code_values(f"codes {weight.codes}", codes, low, high)
    codes = codes.to(torch.int8 if packs(low, high) else codes_spec(low, high, ())[0])
    return codes, _owned(scale), _owned(zero) if is_affine(graph, weight) else None


def mirrored(values: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Codes or zero points in a signed range from its other end, where so: ``−1 − values``."""
    return np.where(where, ~values, values)


def spread(values: np.ndarray, weight: Weight, order: list[int]) -> np.ndarray:
    """One number for each scale of a weight, to broadcast over codes as a file of hdrq has them."""
    if weight.block:
        return values.repeat(weight.block, -1)
    return values.reshape([-1 if weight.axis is not None and axis == weight.axis else 1 for axis in order])


def _owned(values: np.ndarray) -> torch.Tensor:
    """A tensor in memory of its own: what was read from a file cannot be written to."""
    return torch.from_numpy(np.array(values, order="C"))


def _bytes(digest: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(digest), dtype=torch.uint8)


def _restored(weight: Weight, codes: np.ndarray, scale: np.ndarray, zero: np.ndarray, order: list[int]) -> tuple:
    """Codes, scales and zero points of a file of ours, as they were before codes were widened and shifted."""
    own: dict[str, Any] = weight.own or {}
    wide = codes - spread(zero, weight, order)
    values = wide >> own["shift"]
    original = np.asarray(own.get("zero_point", [0] * scale.size), np.int32)
    if original.size != scale.size or not np.array_equal(values << own["shift"], wide):
        raise ValueError(f"codes of {own['layer']} must be as metadata hdrq.weights says, got others in {weight.codes}")
    original = original.reshape(scale.shape)
    return values + spread(original, weight, order), scale * np.float32(2.0 ** own["shift"]), original


def same_codes(graph: Graph, name: str, forms: list[Weight]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """:func:`codes_of` a layer that may have its codes in several constants, which must be equal."""
    first = codes_of(graph, forms[0])
    for form in forms[1:]:
        if not same(first, codes_of(graph, form)):
            raise ValueError(f"codes of {name} must be the same in {forms[0].codes} and {form.codes}, got others")
    return first


def same(these: Sequence, those: Sequence) -> bool:
    """Whether tensors are equal, or both missing."""
    return all((a is None and b is None) or torch.equal(a, b) for a, b in zip(these, those, strict=True))


def grid_range(graph: Graph, grid: Grid) -> tuple[int, int]:
    """The range of a quantizer of activations."""
    zero = int(graph.array(grid.zero_point).reshape(())) if grid.zero_point else 0
    checks.quant_range(grid.low - zero, grid.high - zero)
    return grid.low - zero, grid.high - zero


def bias_values(graph: Graph, bias: Bias) -> torch.Tensor:
    """What a bias's integers stand for, in float64, which holds the product of an int32 and a float32."""
    codes = graph.array(bias.codes).astype(np.float64)
    zero = graph.array(bias.zero_point).astype(np.float64) if bias.zero_point else np.zeros(())
    step = graph.scale(bias.scale).astype(np.float64)
    return _owned((codes - along(zero, bias, codes.ndim)) * along(step, bias, codes.ndim))


def along(values: np.ndarray, bias: Bias, ndim: int) -> np.ndarray:
    """One number, or one for each index of a bias's axis, to broadcast."""
    return values.reshape([-1 if i == bias.axis else 1 for i in range(ndim)]) if values.size > 1 else values.reshape(())


def origin_of(graph: Graph) -> dict[str, Any]:
    """What the file was."""
    model = graph.proto
    facts = {
        "kind": "onnx",
        "sha256": graph.sha256,
        "producer": f"{model.producer_name} {model.producer_version}".strip(),
        "opset": {entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
    }
    if beside := graph.beside():
        facts["data"] = beside
    return facts
