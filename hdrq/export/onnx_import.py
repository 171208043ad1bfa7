"""Quantized ONNX models as files of hdrq, so that they can be merged on their integers."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
        The manifest; ``origin`` says what the file was.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is damaged, or quantized in another form; the message names the file and the node.
        MissingExtra: onnx; ``pip install "hdrq[export]"``.
    """
    require("onnx")
    from hdrq.export.onnx_graph import Graph

    graph = Graph(path)
    with naming(graph.path):
        stored = Stored.of(graph)
    with Writer(out, stored.specs, stored.manifest) as file:
        for name, value in stored.tensors():
            file.write(name, value)
    return stored.manifest


@dataclass(frozen=True)
class Stored:
    """An ONNX model as a file of hdrq has it: the manifest, and what tensors there are."""

    graph: Graph
    manifest: dict[str, Any]
    specs: dict[str, Spec]

    @classmethod
    def of(cls, graph: Graph) -> Stored:
        weights = {name: weight_facts(graph, forms[0]) for name, forms in graph.weights.items()}
        specs: list[tuple[str, Spec]] = []
        for name, facts in weights.items():
            low, high = facts["range"]
            scales = scales_shape(name, facts)
            specs.append((f"{name}.weight.codes", codes_spec(low, high, tuple(facts["shape"]))))
            specs.append((f"{name}.weight.scale", (torch.float32, scales)))
            if facts.get("affine"):
                specs.append((f"{name}.weight.zero_point", (torch.int32, scales)))
        inputs = {name: list(grid_range(graph, grid)) for name, grid in graph.grids.items()}
        specs += [(f"{name}.input.scale", (torch.float32, (1,))) for name in inputs]
        specs += [(name, (torch.float64, graph.dims(bias.codes))) for name, bias in graph.biases.items()]
        specs += [(name, (KINDS[graph.kind(name)], graph.dims(name))) for name in graph.stored]
        specs += [(f"{STRUCTURE}{kind}", (torch.uint8, (32,))) for kind in graph.structure]
        count = Counter([name for name, _ in specs] + RESERVED)
        if twice := [name for name, often in count.items() if often > 1]:
            raise ValueError(f"constants must not have the names of quantizers' tensors, got {checks.listed(twice)}")
        tables = {"weights": weights, "inputs": inputs, "tied": {}, "shared": {}, "folded": {}}
        return cls(graph, {"hdrq": __version__, **tables, "origin": origin_of(graph)}, dict(specs))

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor, read when its turn comes."""
        with naming(self.graph.path):
            for name, forms in self.graph.weights.items():
                facts = self.manifest["weights"][name]
                codes, scale, zero_point = same_codes(self.graph, name, forms)
                yield f"{name}.weight.codes", ops.pack(codes) if packs(*facts["range"]) else codes
                yield f"{name}.weight.scale", scale
                if zero_point is not None:
                    yield f"{name}.weight.zero_point", zero_point
            for name, grid in self.graph.grids.items():
                yield f"{name}.input.scale", torch.from_numpy(self.graph.scale(grid.scale).reshape(1))
            for name, bias in self.graph.biases.items():
                yield name, torch.from_numpy(bias_values(self.graph, bias))
            for name in self.graph.stored:
                yield name, as_tensor(self.graph.array(name))
            yield from self.structure()

    def structure(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The hashes of the graph."""
        for kind, digest in self.graph.structure.items():
            yield f"{STRUCTURE}{kind}", torch.frombuffer(bytearray(digest), dtype=torch.uint8)


RESERVED = ["__metadata__"]  # of safetensors
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


def bias_values(graph: Graph, bias: Bias) -> np.ndarray:
    """What a bias's integers stand for, in float64, which holds the product of an int32 and a float32."""
    codes = graph.array(bias.codes).astype(np.float64)
    zero = graph.array(bias.zero_point).astype(np.float64) if bias.zero_point else np.zeros(())
    return (codes - along(zero, bias, codes.ndim)) * along(graph.scale(bias.scale).astype(np.float64), bias, codes.ndim)


def along(values: np.ndarray, bias: Bias, ndim: int) -> np.ndarray:
    """One number, or one for each index of a bias's axis, to broadcast."""
    return values.reshape([-1 if i == bias.axis else 1 for i in range(ndim)]) if values.size > 1 else values.reshape(())


def as_tensor(value: np.ndarray) -> torch.Tensor:
    """A constant as a tensor of its own type."""
    return _owned(value.view(np.int16)).view(torch.bfloat16) if value.dtype.name == "bfloat16" else _owned(value)


def origin_of(graph: Graph) -> dict[str, Any]:
    """What the file was, and what it says of how it was made."""
    model = graph.proto
    facts = {
        "kind": "onnx",
        "sha256": graph.sha256,
        "producer": f"{model.producer_name} {model.producer_version}".strip(),
        "opset": {entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
    }
    if beside := graph.beside():
        facts["data"] = beside
    if history := graph.note("hdrq.origin"):
        facts["hdrq"] = history
    return facts
