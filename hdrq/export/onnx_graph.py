"""What constants of a quantized ONNX model are to its quantizers: codes, scales, zero points, biases, or nothing."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hdrq import checks
from hdrq.export.foreign import naming
from hdrq.export.onnx_file import DOMAINS, Model, all_nodes, attribute, free, shown
from hdrq.export.profiles import TYPES, IntegerType

FLOATS = ("FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE")
INTEGERS = ("INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64", "BOOL")
INTEGER_OPS = (
    "ConvInteger",
    "MatMulInteger",
    "MatMulIntegerToFloat",
    "QGemm",
    "QAttention",
    "QEmbedLayerNormalization",
)
BLOCK_OPS = ("MatMulNBits", "MatMulFpQ4", "MatMulBnb4", "GatherBlockQuantized", "QMoE")
OWN = {"layer": str, "range": list, "shift": int, "turned": bool, "zero_point": list}  # what metadata says of a weight
NEAR = 1e-5  # how near a bias's step is to the product of its layer's steps


@dataclass
class Weight:
    """Codes that DequantizeLinear nodes read; or floats that a QuantizeLinear rounds for them, where ``rounded``.

    Attributes:
        codes, scale, zero_point: constants of the graph; an empty name for no zero point.
        axis: along which scales vary, or that of blocks, in the graph; None for one scale.
        block: neighbours along ``axis`` that share a scale; None for all.
        own: what a file of ours says of it: ``layer``, ``range``, ``shift``, ``turned``, ``zero_point``.
    """

    codes: str
    scale: str
    zero_point: str
    type: IntegerType
    axis: int | None
    block: int | None
    rounded: bool
    own: dict[str, Any] | None
    nodes: list = field(default_factory=list)


@dataclass
class Grid:
    """A quantizer of activations: nodes of one scale and zero point, with the Clip between them, if there is one.

    ``low`` and ``high`` are its bounds in the type.
    """

    scale: str
    zero_point: str
    type: IntegerType
    low: int
    high: int
    nodes: list = field(default_factory=list)
    clips: list = field(default_factory=list)


@dataclass
class Bias:
    """int32 that a DequantizeLinear reads; ``steps`` are those whose product its own are, where that is so."""

    codes: str
    scale: str
    zero_point: str
    axis: int | None
    nodes: list = field(default_factory=list)
    steps: tuple[Grid, Weight] | None = None


class Graph(Model):
    """A quantized model in a file, with its constants by their role.

    Attributes:
        weights: by the layer's name in a file of hdrq; a layer that is called twice may have its codes twice.
        grids, biases: by their name in a file of hdrq.
        plain: constants that anything else reads; ``stored`` are those of them that a file of hdrq has as tensors.
        affine: whether a weight of a signed type has a zero point anywhere, or a negative scale.
        structure: by kind of node, a hash of all that decides the answers beside constants.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is damaged, or quantized in a form that has no integers to merge; the file and node are named.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        super().__init__(path)
        with naming(self.path):
            for node in all_nodes(self.proto.graph):
                _refuse_integer_ops(node)
            self._producers = {name: node for node in self.nodes for name in node.output if name}
            self._readers: dict[str, list] = {}
            for node in self.nodes:
                for name in node.input:
                    self._readers.setdefault(name, []).append(node)
            self.weights: dict[str, list[Weight]] = {}
            self.grids: dict[str, Grid] = {}
            self.biases: dict[str, Bias] = {}
            self._find_quantizers()
            for bias in self.biases.values():
                bias.steps = self._steps(bias)
            self.affine = any(self._is_shifted(weight) for weight in self.each_weight())
            self.plain = self._plain()
            self.stored = [name for name in self.plain if self._is_stored(name)]
            self.structure = self._structure()

    def each_weight(self) -> Iterator[Weight]:
        """Every form of every layer's codes."""
        for forms in self.weights.values():
            yield from forms

    def _is_shifted(self, weight: Weight) -> bool:
        shifted = weight.type.low < 0 and weight.zero_point and self.array(weight.zero_point).any()
        return bool(shifted or (self.scale(weight.scale, signed=True) < 0).any())

    def _find_quantizers(self) -> None:
        own = self._own_facts()
        found: dict[str, Weight | Bias] = {}  # by the constant of codes
        grids: dict[tuple[str, str], Grid] = {}  # by those of scale and zero point
        computed: set[str] = set()  # values made of constants alone
        for node in self.nodes:
            if not quantizes(node):
                if node.input and all(self.resolve(name) or name in computed for name in node.input if name):
                    computed.update(name for name in node.output if not self.resolve(name))
                continue
            scale, zero_point = self._grid_constants(node)
            constant, latent = self.resolve(node.input[0]), self._latent(node)
            if latent:
                self._join(found, self._weight(node, latent, scale, zero_point, rounded=True), node)
            elif constant and self.kind(constant) == "INT32":
                self._join(found, self._bias(node, constant, scale, zero_point), node)
            elif constant:
                self._join(found, self._weight(node, constant, scale, zero_point, own=own.get(constant)), node)
            elif node.op_type == "DequantizeLinear" and node.input[0] in computed:
                raise ValueError(
                    f"weights must be initializers that DequantizeLinear reads, got one that nodes compute for "
                    f"{shown(node)}; fold the constants of the graph first"
                )
            else:
                self._join_grid(grids, node, scale, zero_point)
        for role in found.values():
            stem = re.sub(r"(_quantized|\.codes)$", "", role.codes)
            if isinstance(role, Bias):
                self.biases[free(self.biases, stem)] = role
            elif role.own is not None:
                self.weights.setdefault(role.own["layer"], []).append(role)
            else:
                self.weights[free(self.weights, stem.removesuffix(".weight"))] = [role]
        for grid in grids.values():
            stem = re.sub(r"[._]scale(\.\d+)?$", "", grid.scale).removesuffix(".input")
            self.grids[free(self.grids, stem)] = grid
        if not self.weights:
            raise ValueError(
                "weights must be integers that DequantizeLinear reads, got none; "
                "onnxruntime.quantization.quantize_static(quant_format=QuantFormat.QDQ) writes such a model"
            )

    def _own_facts(self) -> dict[str, dict[str, Any]]:
        """What :func:`hdrq.export.to_onnx` noted of codes, which have another form in the file."""
        table = {name: facts for name, facts in self.note("hdrq.weights").items() if name in self.constants}
        for name, facts in table.items():
            good = isinstance(facts, dict) and OWN.keys() - {"zero_point"} <= facts.keys() <= OWN.keys()
            if not good or any(type(fact) is not OWN[key] for key, fact in facts.items()):
                raise ValueError(f"metadata hdrq.weights must have {', '.join(OWN)} of {name}, got {facts!r:.200}")
            low, high = facts["range"]
            checks.quant_range(low, high)
            checks.integer(f"shift of {name}", facts["shift"], 0, 7)
            for zero in facts.get("zero_point", ()):
                checks.integer(f"zero point of {name}", zero, low, high)
            if facts["turned"] and len(self.dims(name)) != 2:
                raise ValueError(f"{name} must be a matrix to be turned, got the shape {self.dims(name)}")
        return table

    def _latent(self, node: Any) -> str:
        """The floats that a node rounds, if it is a QuantizeLinear of a constant or what reads that; else empty."""
        before = self._producers.get(node.input[0])
        rounds = node if node.op_type == "QuantizeLinear" else before
        if rounds is None or not quantizes(rounds) or rounds.op_type != "QuantizeLinear":
            return ""
        latent = self.resolve(rounds.input[0])
        others = [reader for reader in self._readers.get(rounds.output[0], []) if reader.op_type != "DequantizeLinear"]
        if latent and others:
            raise ValueError(f"{latent}, once quantized, must be read by DequantizeLinear, got {shown(others[0])}")
        return latent

    def _grid_constants(self, node: Any) -> tuple[str, str]:
        """The constants of a quantizer's scale and zero point."""
        scale, zero_point = (self.resolve(name) if name else None for name in (*node.input[1:3], "", "")[:2])
        if not scale or zero_point == "":
            raise ValueError(
                f"scale and zero point must be constants, got others for {shown(node)}: dynamic quantization has none "
                "to merge; onnxruntime.quantization.quantize_static writes them"
            )
        return scale, zero_point or ""

    def _type(self, node: Any, constant: str) -> IntegerType:
        """The integer type of a quantizer, which is that of a constant, if one is given."""
        kind = self.kind(constant) if constant else "UINT8"
        if kind not in TYPES:
            raise ValueError(f"quantizers must be of {', '.join(TYPES)}, got {kind} for {shown(node)}")
        if not constant and node.op_type == "QuantizeLinear" and attribute(node, "output_dtype", 0):
            raise ValueError(f"zero point must be given with a type, got output_dtype alone for {shown(node)}")
        return TYPES[kind]

    def _weight(
        self, node: Any, codes: str, scale: str, zero_point: str, *, rounded: bool = False, own: dict | None = None
    ) -> Weight:
        kind, shape, step = (
            self._type(node, zero_point if rounded else codes),
            self.dims(codes),
            self.scale(scale, signed=True),
        )
        if rounded and self.kind(codes) != "FLOAT":
            raise ValueError(f"{codes} must be FLOAT to be quantized, got {self.kind(codes)}")
        block = checks.integer(f"block_size of {shown(node)}", attribute(node, "block_size", 0), 0, 2**31 - 1) or None
        axis = self._axis(node, shape) if step.size > 1 or block else None
        if axis is None:
            wanted: tuple[int, ...] = step.shape if step.size else (1,)
        elif block is None:
            wanted = (shape[axis],)
        else:
            wanted = tuple(side // block if i == axis else side for i, side in enumerate(shape))
            if shape[axis] % block:
                raise ValueError(f"block_size must divide axis {axis} of {codes}, got {block} for the shape {shape}")
        if step.shape != wanted or (zero_point and self.dims(zero_point) != step.shape):
            raise ValueError(f"scale and zero point of {codes} must have the shape {wanted}, got {step.shape}")
        if zero_point and self.kind(zero_point) != kind.name:
            raise ValueError(f"zero point of {codes} must be {kind.name}, got {self.kind(zero_point)}")
        if own and block and axis != (0 if own["turned"] else len(shape) - 1):
            raise ValueError(f"metadata hdrq.weights must have blocks of {codes} along the last axis, got axis {axis}")
        return Weight(codes, scale, zero_point, kind, axis, block, rounded, own)

    def _bias(self, node: Any, codes: str, scale: str, zero_point: str) -> Bias:
        shape, step = self.dims(codes), self.scale(scale)
        axis = self._axis(node, shape) if step.size > 1 else None
        if axis is not None and step.shape != (shape[axis],):
            raise ValueError(f"scale of {codes} must have the shape {(shape[axis],)}, got {step.shape}")
        return Bias(codes, scale, zero_point, axis)

    def _axis(self, node: Any, shape: tuple[int, ...]) -> int:
        sides = len(shape)
        return checks.integer(f"axis of {shown(node)}", attribute(node, "axis", 1), -sides, sides - 1) % sides

    def _join(self, found: dict[str, Weight | Bias], made: Weight | Bias, node: Any) -> None:
        """A node to a role that several may have, on one grid."""
        kept = found.setdefault(made.codes, made)
        keys = ("scale", "zero_point", "axis", "block", "rounded")
        if any(getattr(kept, key, None) != getattr(made, key, None) for key in keys):
            raise ValueError(f"{made.codes} must be quantized in one way, got another for {shown(node)}")
        kept.nodes.append(node)

    def _join_grid(self, grids: dict[tuple[str, str], Grid], node: Any, scale: str, zero_point: str) -> None:
        for name in filter(None, (scale, zero_point)):
            if self.array(name).size != 1 or attribute(node, "block_size", 0):
                raise ValueError(f"activations must have one scale, got {self.dims(name)} for {shown(node)}")
        self.scale(scale)
        kind, clips = self._type(node, zero_point), self._clips(node)
        bounds = {self._bounds(clip, kind) for clip in clips} or {(kind.low, kind.high)}
        grid = grids.setdefault((scale, zero_point), Grid(scale, zero_point, kind, *min(bounds)))
        if bounds != {(grid.low, grid.high)}:
            raise ValueError(
                f"quantizers with the scale {scale} must have one range, got [{grid.low}, {grid.high}] and "
                f"{sorted(map(list, bounds))} for {shown(node)}"
            )
        grid.nodes.append(node)
        grid.clips += [clip for clip in clips if all(clip is not other for other in grid.clips)]

    def _clips(self, node: Any) -> list:
        """The Clips of a quantizer's integers: all that read them, or none."""
        if node.op_type == "DequantizeLinear":
            before = self._producers.get(node.input[0])
            return [before] if before is not None and before.op_type == "Clip" and before.domain in DOMAINS else []
        after = self._readers.get(node.output[0], [])
        clips = [reader for reader in after if reader.op_type == "Clip" and reader.domain in DOMAINS]
        if clips and len(clips) < len(after):
            raise ValueError(f"integers of {shown(node)} must be clipped for all who read them, got Clip for some")
        return clips

    def _bounds(self, clip: Any, kind: IntegerType) -> tuple[int, int]:
        bounds = [kind.low, kind.high]
        for index, name in enumerate(clip.input[1:3]):
            if name and not self.resolve(name):
                raise ValueError(f"bounds of {shown(clip)} must be constants, got {name}")
            if name:
                bounds[index] = int(self.array(self.resolve(name)).reshape(()))
        return max(bounds[0], kind.low), min(bounds[1], kind.high)

    def _steps(self, bias: Bias) -> tuple[Grid, Weight] | None:
        """The quantizers of input and weight of all layers that read a bias, if its steps are their product."""
        roles: dict[int, Any] = {id(node): role for role in self.grids.values() for node in role.nodes}
        roles |= {id(node): role for role in self.each_weight() for node in role.nodes}
        pairs = [
            [roles.get(id(self._producers.get(name))) for name in layer.input[:2]]
            for node in bias.nodes
            for layer in self._readers.get(node.output[0], [])
        ]
        if not pairs or any(pair[0] is not pairs[0][0] or pair[-1] is not pairs[0][-1] for pair in pairs):
            return None
        grid, weight = pairs[0][0], pairs[0][-1]
        if not (isinstance(grid, Grid) and isinstance(weight, Weight)):
            return None
        product = self.scale(grid.scale) * self.scale(weight.scale, signed=True)
        step = self.scale(bias.scale)
        near = product.size == step.size and np.allclose(product.ravel(), step.ravel(), rtol=NEAR, atol=0)
        return (grid, weight) if near else None

    def _plain(self) -> list[str]:
        """The constants that something reads which is no quantizer."""
        places: set[tuple[int, int]] = set()  # the inputs of nodes that are a quantizer's
        roles: list[Any] = [*self.each_weight(), *self.biases.values()]
        for role in (*roles, *self.grids.values()):
            places |= {(id(node), k) for node in role.nodes for k in range(3)}
            places |= {(id(clip), k) for clip in getattr(role, "clips", ()) for k in (1, 2)}
        read: set[str] = set()
        for node in self.nodes:
            if node.op_type != "Identity" or not self.resolve(node.output[0]):
                read |= {self.resolve(name) for k, name in enumerate(node.input) if (id(node), k) not in places}
        read |= {self.resolve(output.name) for output in self.proto.graph.output}
        read |= {self.resolve(name) for node in all_nodes(self.proto.graph, inner=True) for name in node.input}
        for role in roles:
            if role.codes in read:
                raise ValueError(f"{role.codes} must be read by its quantizer alone, got others that read it as it is")
        return [name for name in self.constants if name in read]

    def _is_stored(self, name: str) -> bool:
        """Whether a constant is a tensor of a file: integers, or floats that are finite but for a mask's −∞."""
        if self.kind(name) not in FLOATS:
            return self.kind(name) in INTEGERS
        value = self.array(name).astype(np.float64)
        return bool((np.isfinite(value) | (value == -np.inf)).all())

    def _structure(self) -> dict[str, bytes]:
        """Names of nodes and texts decide nothing and are left out; so is what quantizers have as constants."""
        inputs: dict[int, list[str]] = {}
        for name, grid in self.grids.items():
            inputs |= {id(node): [node.input[0], name] for node in grid.nodes}
            inputs |= {id(clip): [clip.input[0]] for clip in grid.clips}
        for name, forms in self.weights.items():
            inputs |= {id(node): [name] for weight in forms for node in weight.nodes}
        for name, bias in self.biases.items():
            inputs |= {id(node): [name] for node in bias.nodes}
        parts: dict[str, list] = {}
        for node in self.nodes:
            skipped = "value" if node.op_type == "Constant" else "axis" if id(node) in inputs else ""
            attributes = sorted(
                (held.name, held.SerializeToString(deterministic=True).hex())
                for held in node.attribute
                if held.name != skipped
            )
            facts = [node.domain, inputs.get(id(node), [*node.input]), [*node.output], attributes]
            parts.setdefault(f"nodes.{node.op_type}", []).append(facts)
        graph = self.proto.graph
        ends = [[end.name, end.type.tensor_type.elem_type] for end in (*graph.input, *graph.output)]
        functions = [function.SerializeToString(deterministic=True).hex() for function in self.proto.functions]
        parts["graph"] = [[end for end in ends if end[0] not in self.constants], functions]
        parts["opset"] = sorted([entry.domain, entry.version] for entry in self.proto.opset_import)
        rest = sorted(set(self.plain) - set(self.stored))
        parts["constants"] = [[name, self.kind(name), self.dims(name), self.digest(name)] for name in rest]
        return {kind: hashlib.sha256(json.dumps(part).encode()).digest() for kind, part in parts.items()}


def quantizes(node: Any) -> bool:
    """Whether a node is QuantizeLinear or DequantizeLinear."""
    return node.op_type in ("QuantizeLinear", "DequantizeLinear") and node.domain in DOMAINS


def _refuse_integer_ops(node: Any) -> None:
    """Refuse what computes with integers itself, or whose scales are in no file."""
    if node.op_type.startswith("DynamicQuantize"):
        raise ValueError(
            f"quantization must be static, got {shown(node)}: its scales come with each input and are in no file; "
            "onnxruntime.quantization.quantize_static writes them"
        )
    if node.op_type in BLOCK_OPS:
        raise ValueError(
            f"weights must be read by DequantizeLinear, got {shown(node)}: ONNX Runtime's quantizers write that with "
            "quant_format=QuantFormat.QDQ"
        )
    if node.op_type.startswith(("QLinear", "QOrdered")) or node.op_type in INTEGER_OPS:
        raise ValueError(
            f"products must lie between DequantizeLinear and QuantizeLinear, got {shown(node)}: "
            "quantize_static(quant_format=QuantFormat.QDQ) writes that form, and optimized graphs have it no more"
        )
