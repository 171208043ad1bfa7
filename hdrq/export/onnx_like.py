"""A file of hdrq written back into the graph of an ONNX model: other numbers, the same graph."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import onnx
import torch
from onnx import TensorProto

from hdrq import checks, ops
from hdrq._version import __version__
from hdrq.checkpoint.files import disk_with_room, output_path, replacing
from hdrq.checkpoint.format import TABLES, Reader, Spec, packs
from hdrq.export.lowering import WeightForm, weight_form
from hdrq.export.onnx_file import free
from hdrq.export.onnx_graph import FLOATS, Bias, Graph, Grid, Weight
from hdrq.export.onnx_import import (
    STRUCTURE,
    OnnxModel,
    along,
    axes_of,
    codes_of,
    middle,
    mirrored,
    same,
    spread,
    weight_facts,
)
from hdrq.export.profiles import profile

ALIGNMENT = 64  # bytes, of tensors in a file beside the graph
INT32 = (-(2**31), 2**31 - 1)
DATA = ("raw_data", "float_data", "double_data", "int32_data", "int64_data", "uint64_data")  # where a tensor has it


def write_onnx(file: str | os.PathLike, template: str | os.PathLike, out: str | os.PathLike) -> None:
    """Write a file's numbers into the graph of an ONNX model; see :func:`hdrq.export.write_like`."""
    output_path(out)
    with Reader(file) as source, OnnxModel(template) as model:
        _write(source, model, out)


class OnnxWriter:
    """An ONNX model like ``template`` to write to, in a ``with`` block, at whose end it appears, whole.

    Tensors are those of a file of hdrq, in any order, as :class:`hdrq.checkpoint.format.Writer` takes them; all are
    held until then.

    Args:
        path: of the model; what is there is replaced.
        template: whose graph it has; of no more use afterwards.
        manifest: how the numbers were made, which goes into the metadata; and the ranges.

    Raises:
        OSError, ValueError: see :func:`hdrq.export.write_like`.
    """

    def __init__(self, path: str | os.PathLike, template: OnnxModel, manifest: dict[str, Any]) -> None:
        self.path, self.template, self.manifest = os.fspath(output_path(path)), template, manifest
        self._tensors: dict[str, torch.Tensor] = {}

    def __enter__(self) -> OnnxWriter:
        return self

    def __exit__(self, *error) -> None:
        if error[0] is None:
            _write(self, self.template, self.path)

    @property
    def specs(self) -> dict[str, Spec]:
        """The dtype and shape of every tensor."""
        return {name: (value.dtype, tuple(value.shape)) for name, value in self._tensors.items()}

    def write(self, name: str, value: torch.Tensor) -> None:
        """Take one tensor."""
        self._tensors[name] = value.detach().cpu().contiguous()

    def tensor(self, name: str) -> torch.Tensor:
        return self._tensors[name]


def _write(source: Reader | OnnxWriter, template: OnnxModel, out: str | os.PathLike) -> None:
    _check_fits(source, template)
    path, graph = output_path(out), template.graph
    with ExitStack() as stack:
        model = stack.enter_context(replacing(path))  # takes its place last, when what it refers to is there
        beside = stack.enter_context(replacing(f"{path}.data")) if graph.external else None
        filled = _Filled(graph, beside, out)
        filled.fill(source)
        filled.note(source.manifest)
        filled.apply(f"{path.name}.data")
        data = graph.proto.SerializeToString()
        with disk_with_room(out):
            model.write(data)


def _check_fits(source: Reader | OnnxWriter, template: OnnxModel) -> None:
    """Refuse a file that is not of the template's graph."""
    graph, wanted = template.graph, template.specs
    codes = {f"{name}.weight.codes" for name in graph.weights}  # their range may be another
    differences = [
        f"{name} ({_shown(wanted.get(name))} in the graph, {_shown(source.specs.get(name))} in the file)"
        for name in dict.fromkeys((*wanted, *source.specs))
        if wanted.get(name) != source.specs.get(name) and not (name in codes and name in source.specs)
    ]
    for table in ("weights", "inputs", "tied", "shared"):
        own, other = (_without_ranges(manifest[table]) for manifest in (template.manifest, source.manifest))
        differences += [
            f"{table} of {name}" for name in dict.fromkeys((*own, *other)) if own.get(name) != other.get(name)
        ]
    if not differences:
        exact = [name for name in graph.stored if graph.kind(name) not in FLOATS]
        for name in (*exact, *(f"{STRUCTURE}{kind}" for kind in graph.structure)):
            same_there = torch.equal(template.tensor(name), source.tensor(name))
            differences += [] if same_there else [f"{name} (other integers)"]
    if differences:
        raise ValueError(
            f"file must be what was imported from {graph.path}, or a merge of such files, got {source.path} with "
            f"another {checks.listed(differences)}"
        )


def _shown(spec: Any) -> str:
    return "none" if spec is None else f"{checks.short(spec[0])} {tuple(spec[1])}"


def _without_ranges(table: dict[str, Any]) -> dict[str, Any]:
    return {n: {k: v for k, v in f.items() if k != "range"} if isinstance(f, dict) else None for n, f in table.items()}


class Raw(NamedTuple):
    """A constant's element type, shape and bytes."""

    kind: str
    dims: tuple[int, ...]
    data: bytes

    @classmethod
    def of(cls, values: np.ndarray, kind: str) -> Raw:
        if kind in ("INT4", "UINT4"):
            return cls(kind, values.shape, ops.pack(torch.from_numpy(values.astype(np.int8))).numpy().tobytes())
        return cls(kind, values.shape, values.astype(_dtype(kind)).tobytes())

    @property
    def digest(self) -> tuple:
        return self.kind, tuple(self.dims), hashlib.sha256(self.data).digest()


def _dtype(kind: str) -> Any:
    return onnx.helper.tensor_dtype_to_np_dtype(TensorProto.DataType.Value(kind))


class _Filled:
    """Other numbers for the constants of a graph, which is left as it is until :meth:`apply`.

    A constant that two roles read, and that is to have two values, keeps the first; the other role gets one of its own.
    """

    def __init__(self, graph: Graph, beside: BinaryIO | None, out: str | os.PathLike) -> None:
        self.graph, self._out = graph, out
        self._beside: Any = beside
        self._external = graph.external
        self._digests: dict[str, tuple] = {}  # of what constants get
        self._data: dict[str, Raw] = {}  # what goes into the graph; bytes that lie beside it are written at once
        self._places: dict[str, tuple[int, int]] = {}  # where, and how many bytes
        self._steps: dict[int, np.ndarray] = {}  # of grids and weights, as the graph has them
        self._names = {*graph.constants, *(v.name for v in graph.proto.graph.input)}
        self._names |= {name for node in graph.nodes for name in node.output}
        self._notes = graph.note("hdrq.weights")

    def fill(self, source: Reader | OnnxWriter) -> None:
        """Take every number from a file that fits."""
        graph = self.graph
        for name in set(graph.plain) - set(graph.stored):  # they stay, and a quantizer that differs gets its own
            self._digests[name] = () if graph.kind(name) == "STRING" else self._now(name).digest
        for name in graph.stored:
            value = source.tensor(name)
            data = value.reshape(-1).view(torch.uint8).numpy().tobytes()
            self._set([], name, Raw(graph.kind(name), tuple(value.shape), data))
        for name, forms in graph.weights.items():
            facts = source.manifest["weights"][name]
            values = _values(source, name, facts)
            for weight in forms:
                self._fill_weight(name, weight, facts["range"], *values)
        for name, grid in graph.grids.items():
            self._fill_grid(name, grid, source.manifest["inputs"][name], source.tensor(f"{name}.input.scale").numpy())
        for name, bias in graph.biases.items():
            self._fill_bias(name, bias, source.tensor(name).numpy())

    def note(self, manifest: dict[str, Any]) -> None:
        """Say in the metadata how the numbers were made."""
        facts = {key: value for key, value in manifest.items() if key not in TABLES}
        said = {**self.graph.metadata, "hdrq": __version__, "hdrq.origin": json.dumps(facts, sort_keys=True)}
        if self._notes:
            said["hdrq.weights"] = json.dumps(self._notes, sort_keys=True)
        onnx.helper.set_model_props(self.graph.proto, said)

    def apply(self, location: str) -> None:
        """Put the numbers into the graph; ``location`` is the name of the file beside it."""
        for name in sorted(self._external - self._places.keys()):
            self._put(name, self._now(name))
        graph = self.graph.proto.graph
        declared = {value.name: value.type.tensor_type for value in (*graph.value_info, *graph.input)}
        for name, raw in self._data.items():
            tensor = self.graph.constants[name]
            for part in DATA:
                tensor.ClearField(part)
            tensor.data_type, tensor.dims[:] = TensorProto.DataType.Value(raw.kind), raw.dims
            if name in declared:
                declared[name].elem_type = tensor.data_type
            if name not in self._places:
                tensor.raw_data = raw.data
                continue
            start, length = self._places[name]
            del tensor.external_data[:]
            for key, value in {"location": location, "offset": str(start), "length": str(length)}.items():
                tensor.external_data.add(key=key, value=value)

    def _fill_weight(self, name: str, weight: Weight, bounds: Sequence[int], codes, scale, zero_point) -> None:
        order = axes_of(self.graph, weight)
        back = np.argsort(order)
        if weight.own is None:
            form = self._foreign_form(name, weight, codes, scale, zero_point, order)
        else:
            form = self._own_form(weight, bounds, codes, scale, zero_point, order)
        zeros = np.zeros_like(form.scale) if form.zero_point is None else form.zero_point
        dims = self.graph.dims(weight.scale)
        steps, zeros = (v.transpose(back) if weight.block else v.reshape(dims) for v in (form.scale, zeros))
        if not weight.rounded:
            self._set([(node, 0) for node in weight.nodes], weight.codes, Raw.of(form.codes.transpose(back), form.type))
        elif not same(codes_of(self.graph, weight), (codes, scale, zero_point)):  # else what rounds to them stays
            where: Any = {"axis": weight_facts(self.graph, weight)["axis"], "group_size": weight.block}
            latent = ops.dequantize(
                codes, scale, zero_point=None if zero_point is None else zero_point.float(), **where
            )
            self._set([], weight.codes, Raw.of(latent.numpy().transpose(back), "FLOAT"))
        self._steps[id(weight)] = self._set_scale(name, weight, steps)
        self._set_zero_point(weight, zeros, form.type)

    def _own_form(
        self, weight: Weight, bounds: Sequence[int], codes, scale, zero_point, order: list[int]
    ) -> WeightForm:
        """The form that :func:`hdrq.export.to_onnx` would give the codes, turned as they are in the graph."""
        axis = None if weight.axis is None else order.index(weight.axis)
        target = profile(self.graph.metadata.get("hdrq.runtime", ""))
        zeros = None if zero_point is None else zero_point.numpy()
        grid = (codes.numpy(), scale.numpy(), zeros, bounds[0], bounds[1], axis, weight.block or 0)
        form = weight_form(target, *grid)
        noted = {**self._notes[weight.codes], "range": list(bounds), "shift": form.shift}
        self._notes[weight.codes] = noted if zeros is None else {**noted, "zero_point": zeros.reshape(-1).tolist()}
        return form

    def _foreign_form(self, name: str, weight: Weight, codes, scale, zero_point, order: list[int]) -> WeightForm:
        """The codes in the type that the graph has them in, with the signs that its scales have."""
        kind, now = weight.type, self.graph.scale(weight.scale, signed=True)
        turned = now.transpose(order) < 0 if weight.block else now.reshape(-1) < 0
        values = mirrored(codes.numpy().astype(np.int32), spread(turned, weight, order)) + middle(weight)
        zeros = np.zeros(turned.shape, np.int32) if zero_point is None else zero_point.numpy()
        zeros = mirrored(zeros, turned) + middle(weight)
        for what, numbers in (("codes", values), ("zero points", zeros)):
            if numbers.size and not kind.low <= numbers.min() <= numbers.max() <= kind.high:
                raise ValueError(
                    f"{what} of {name} must fit {kind.name}, got [{numbers.min()}, {numbers.max()}]; take a model of "
                    "more bits for the graph"
                )
        return WeightForm(kind.name, values, np.where(turned, -scale.numpy(), scale.numpy()), zeros, None)

    def _fill_grid(self, name: str, grid: Grid, bounds: Sequence[int], scale: np.ndarray) -> None:
        """The range in the graph's type: a zero point of 0 stays where it can, else bounds stay where they can."""
        low, high, kind = *bounds, grid.type
        first, last = max(kind.low - low, kind.low), min(kind.high - high, kind.high)  # of the zero points that hold it
        if first > last or (high - low < kind.high - kind.low and not grid.clips):
            levels = "" if grid.clips else f"{kind.high - kind.low + 1} integers and "
            raise ValueError(f"range of {name} must have {levels}a zero point in {kind.name}, got [{low}, {high}]")
        now = int(self.graph.array(grid.zero_point).reshape(())) if grid.zero_point else 0
        zero = min(max(0 if now == 0 else grid.low - low, first), last)
        self._steps[id(grid)] = self._set_scale(name, grid, scale.reshape(self.graph.dims(grid.scale)))
        self._set_zero_point(
            grid, np.full(self.graph.dims(grid.zero_point) if grid.zero_point else (), zero), kind.name
        )
        for index, bound, end in ((1, low + zero, kind.low), (2, high + zero, kind.high)):
            for clip in grid.clips:
                held = self.graph.resolve(clip.input[index]) if len(clip.input) > index else ""
                if held or bound != end:
                    self._set([(clip, index)], held, Raw.of(np.array(bound), kind.name), f"{grid.scale}.bound")

    def _fill_bias(self, name: str, bias: Bias, value: np.ndarray) -> None:
        """The integers of a bias, in the product of the steps of its layer's input and weight."""
        step = self.graph.scale(bias.scale)
        if bias.steps is not None:
            before = [self.graph.scale(role.scale, signed=True) for role in bias.steps]
            after = [self._steps[id(role)] for role in bias.steps]
            if not np.array_equal(after[0] * after[1], before[0] * before[1]):
                step = (after[0] * after[1]).reshape(step.shape)
        zero = self.graph.array(bias.zero_point).astype(np.float64) if bias.zero_point else np.zeros(())
        codes = np.rint(value / along(step.astype(np.float64), bias, value.ndim)) + along(zero, bias, value.ndim)
        if codes.size and not INT32[0] <= codes.min() <= codes.max() <= INT32[1]:
            largest = np.abs(value).max()
            raise ValueError(f"bias {name} must fit int32 in steps of {step.min():.2g}, got {largest:.2g}")
        self._set([(node, 0) for node in bias.nodes], bias.codes, Raw.of(codes, "INT32"))
        self._set_scale(name, bias, step)

    def _set_scale(self, name: str, role: Weight | Grid | Bias, steps: np.ndarray) -> np.ndarray:
        """Set a scale in the type that the graph has it in; returns what it is there."""
        kind = self.graph.kind(role.scale)
        held = steps.astype(_dtype(kind)).astype(np.float32)
        if not (np.isfinite(held) & (held != 0)).all():
            raise ValueError(f"scale of {name} must fit {kind}, got {steps.min():.2g} to {steps.max():.2g}")
        self._set([(node, 1) for node in role.nodes], role.scale, Raw.of(steps, kind))
        return held

    def _set_zero_point(self, role: Weight | Grid, zeros: np.ndarray, kind: str) -> None:
        if role.zero_point or zeros.any():
            uses = [(node, 2) for node in role.nodes]
            self._set(uses, role.zero_point, Raw.of(zeros, kind), f"{role.scale}.zero_point")

    def _set(self, uses: list[tuple[Any, int]], name: str, raw: Raw, new: str = "") -> None:
        """Give a constant its numbers; where it has others already, or there is none, its uses get a new one."""
        if name and self._digests.setdefault(name, raw.digest) == raw.digest:
            self._put(name, raw)
        else:
            name = free(self._names, name or new)
            self._names.add(name)
            self.graph.constants[name] = self.graph.proto.graph.initializer.add(name=name)
            self._data[name] = raw
        for node, index in uses:
            node.input.extend([""] * (index + 1 - len(node.input)))
            if self.graph.resolve(node.input[index]) != name:
                node.input[index] = name

    def _put(self, name: str, raw: Raw) -> None:
        if name in self._data:
            return
        if name in self._external:
            start = -(-self._beside.tell() // ALIGNMENT) * ALIGNMENT
            with disk_with_room(self._out):
                self._beside.seek(start)
                self._beside.write(raw.data)
            self._places[name] = start, len(raw.data)
            self._data[name] = raw._replace(data=b"")
        elif raw.digest != self._now(name).digest:
            self._data[name] = raw

    def _now(self, name: str) -> Raw:
        return Raw.of(self.graph.array(name), self.graph.kind(name))


def _values(source: Reader | OnnxWriter, name: str, facts: dict[str, Any]) -> tuple:
    """Codes, scales and zero points of a weight in a file."""
    low, high = facts["range"]
    codes, scale = (source.tensor(f"{name}.weight.{part}") for part in ("codes", "scale"))
    if packs(low, high):
        codes = ops.unpack(codes, facts["shape"], signed=low < 0)
    checks.code_values(f"codes of {name}", codes, low, high)
    checks.scale_values(f"{name}.weight.scale", scale)
    return codes, scale, source.tensor(f"{name}.weight.zero_point") if facts.get("affine") else None
