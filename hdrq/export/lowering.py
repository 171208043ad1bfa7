"""Quantizer nodes of our own, replaced by QuantizeLinear, Clip and DequantizeLinear."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from hdrq.export.graph import DOMAIN
from hdrq.export.profiles import TYPES, WIDENED, ActivationForm, Profile, activation_form

DTYPES = {name: getattr(ir.DataType, name) for name in TYPES}


@dataclass(frozen=True)
class WeightForm:
    """A weight's integers in an ONNX type, for ``(codes − zero_point)·scale``; multiplied by ``2^shift``."""

    type: str
    codes: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray | None
    axis: int | None
    shift: int = 0
    block: int = 0  # neighbours along the axis that share a scale; scales then have as many axes as codes


def lower(model: ir.Model, profile: Profile) -> None:
    """Replace every quantizer node, in place; a graph of ONNX's own operators is left.

    Its metadata ``hdrq.weights`` has the layer, range and zero points that codes had before they took their form here.
    """
    graph = model.graph
    _drop_single_splits(graph)
    for node in list(graph):
        if node.op_type == "Gemm":
            _product_and_sum(graph, node)
    made: dict[tuple, ir.Value] = {}
    facts: dict[str, dict[str, Any]] = {}
    for node in list(graph):
        if node.domain == DOMAIN and node.op_type == "Weight":
            _lower_weight(graph, node, profile, facts)
    model.metadata_props["hdrq.weights"] = json.dumps(facts, sort_keys=True)
    for node in list(graph):
        if node.domain == DOMAIN and node.op_type == "Grid":
            _lower_grid(graph, node, profile, made)
    for node in list(graph):
        if node.op_type == "Clip":
            drop_superfluous_clip(graph, node)
    if profile.name == "onnxruntime":
        for node in list(graph):
            if node.op_type == "Add":
                _difference(graph, node)
    model.opset_imports.pop(DOMAIN, None)
    RemoveUnusedNodesPass()(model)


def weight_form(
    profile: Profile, codes: np.ndarray, scale: np.ndarray, zero_point, qmin: int, qmax: int, axis, block=0
):
    """The type that holds a weight's codes; without a zero point, where a signed type of it holds the difference."""
    codes = codes.astype(np.int32)
    if zero_point is not None:
        shape = [-1 if i == axis else 1 for i in range(codes.ndim)]
        zeros = zero_point.astype(np.int32)
        shifted = codes - (zeros.repeat(block, axis) if block else zeros.reshape(shape))
        if np.abs(shifted).max(initial=0) <= (127 if qmax - qmin <= 255 else TYPES["INT16"].high):
            codes, zero_point = shifted, None
    if zero_point is not None:  # unsigned, wherever the range lies
        kind, dtype = ("UINT8", np.uint8) if qmax - qmin <= 255 else ("UINT16", np.uint16)
        return WeightForm(kind, (codes - qmin).astype(dtype), scale, (zero_point - qmin).astype(dtype), axis, 0, block)
    largest = int(np.abs(codes).max(initial=0))
    if largest > 128 or codes.max(initial=0) > 127:
        return WeightForm("INT16", codes.astype(np.int16), scale, None, axis, 0, block)
    if profile.smallest_types and codes.min(initial=0) >= -8 and codes.max(initial=0) <= 7:
        return WeightForm("INT4", codes.astype(np.int8), scale, None, axis, 0, block)
    shift = 0
    if profile.weights_widened and largest:
        while largest << (shift + 1) <= WIDENED:
            shift += 1
    return WeightForm(
        "INT8", (codes << shift).astype(np.int8), scale * np.float32(2.0**-shift), None, axis, shift, block
    )


def _lower_weight(graph: ir.Graph, node: ir.Node, profile: Profile, noted: dict[str, dict[str, Any]]) -> None:
    facts = _facts(node)
    codes, scale, *rest = (_constant(value) for value in node.inputs)
    axis, block = None if facts["axis"] == -1 or scale.size == 1 else facts["axis"], facts["block"]
    zero_point = rest[0] if rest else None
    if block:
        axis, grid = codes.ndim - 1, (*codes.shape[:-1], codes.shape[-1] // block)
        scale, zero_point = scale.reshape(grid), None if zero_point is None else zero_point.reshape(grid)
    bounds = (facts["qmin"], facts["qmax"])
    form = weight_form(profile, codes, scale.astype(np.float32), zero_point, *bounds, axis, block)
    original = {"layer": facts["layer"], "range": [facts["qmin"], facts["qmax"]], "shift": form.shift}
    if zero_point is not None:
        original["zero_point"] = [int(z) for z in zero_point.reshape(-1)]
    (out,) = node.outputs
    for consumer in {use.node for use in out.uses()}:
        if consumer.op_type == "Transpose" and list(consumer.attributes["perm"].as_ints()) == [1, 0]:
            turned = _turned(form)
            value = _dequantized(graph, consumer, f"{facts['layer']}.weight_t", turned)
            noted[value.producer().inputs[0].name] = {**original, "turned": True}
            ir.convenience.replace_all_uses_with(consumer.outputs[0], value)
            graph.remove(consumer, safe=True)
    if out.uses():
        value = _dequantized(graph, node, f"{facts['layer']}.weight", form)
        noted[value.producer().inputs[0].name] = {**original, "turned": False}
        ir.convenience.replace_all_uses_with(out, value)
    graph.remove(node, safe=True)


def _turned(form: WeightForm) -> WeightForm:
    """A matrix with its axes exchanged."""
    scale, zero_point = form.scale, form.zero_point
    if form.block:
        scale, zero_point = scale.T, None if zero_point is None else zero_point.T
    axis = None if form.axis is None else 1 - form.axis
    return replace(form, codes=form.codes.T, scale=scale, zero_point=zero_point, axis=axis)


def _dequantized(graph: ir.Graph, before: ir.Node, name: str, form: WeightForm) -> ir.Value:
    codes = _initializer(graph, f"{name}.codes", form.codes, form.type)
    scale = _initializer(graph, f"{name}.scale", _rank(form.scale, form), "FLOAT")
    inputs = [codes, scale]
    if form.zero_point is not None:
        inputs.append(_initializer(graph, f"{name}.zero_point", _rank(form.zero_point, form), form.type))
    attributes = {} if form.axis is None else {"axis": form.axis}
    attributes |= {"block_size": form.block} if form.block else {}
    value = ir.Value(name=_free(graph, f"{name}.values"), type=ir.TensorType(ir.DataType.FLOAT))
    value.shape = ir.Shape(form.codes.shape)
    graph.insert_before(before, ir.node("DequantizeLinear", inputs, attributes, outputs=[value], name=_name(value)))
    return value


def _lower_grid(graph: ir.Graph, node: ir.Node, profile: Profile, made: dict[tuple, ir.Value]) -> None:
    facts = _facts(node)
    x, scale = node.inputs
    step = _constant(scale).astype(np.float32)
    if step.size != 1:
        raise ValueError(f"inputs must have one scale each to be exported, got {step.size} for {facts['layer']}")
    (out,) = node.outputs
    key = (x, float(step.reshape(())), facts["qmin"], facts["qmax"])
    if key not in made:  # a tensor that several read on one grid is quantized once
        made[key] = _quantized(graph, node, facts, profile, step.reshape(()))
    ir.convenience.replace_all_uses_with(out, made[key])
    graph.remove(node, safe=True)


def _quantized(graph: ir.Graph, node: ir.Node, facts: dict, profile: Profile, step: np.ndarray) -> ir.Value:
    form = activation_form(profile, facts["layer"], facts["qmin"], facts["qmax"])
    nodes = _grid_nodes(graph, node.inputs[0], f"{facts['layer']}.input", step, form)
    graph.insert_before(node, nodes)
    return nodes[-1].outputs[0]


def insert_grid(graph: ir.Graph, x: ir.Value, name: str, step: np.ndarray, form: ActivationForm) -> None:
    """Quantize a value for all who read it."""
    readers = list(x.uses())
    nodes = _grid_nodes(graph, x, name, step, form)
    graph.insert_after(x.producer(), nodes)
    for reader in readers:
        reader.node.replace_input_with(reader.idx, nodes[-1].outputs[0])


def _grid_nodes(graph: ir.Graph, x: ir.Value, name: str, step: np.ndarray, form: ActivationForm) -> list[ir.Node]:
    kind = form.type.name
    scale = _initializer(graph, f"{name}.scale", step, "FLOAT")
    zero = _initializer(graph, f"{name}.zero_point", np.array(form.zero_point), kind)
    codes = ir.Value(name=_free(graph, f"{name}.codes"), type=ir.TensorType(DTYPES[kind]), shape=x.shape)
    nodes = [ir.node("QuantizeLinear", [x, scale, zero], outputs=[codes], name=_name(codes))]
    if form.clipped:
        low = _initializer(graph, f"{name}.low", np.array(form.low), kind)
        high = _initializer(graph, f"{name}.high", np.array(form.high), kind)
        clipped = ir.Value(name=_free(graph, f"{name}.clipped"), type=codes.type, shape=x.shape)
        nodes.append(ir.node("Clip", [codes, low, high], outputs=[clipped], name=_name(clipped)))
        codes = clipped
    y = ir.Value(name=_free(graph, f"{name}.values"), type=ir.TensorType(ir.DataType.FLOAT), shape=x.shape)
    nodes.append(ir.node("DequantizeLinear", [codes, scale, zero], outputs=[y], name=_name(y)))
    return nodes


def _product_and_sum(graph: ir.Graph, node: ir.Node) -> None:
    """A linear layer's Gemm as MatMul and Add, for which runtimes have integer kernels."""
    a, b, *c = node.inputs
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    producer = b.producer()
    ours = producer is not None and (producer.domain, producer.op_type) == (DOMAIN, "Weight")
    if not ours or attributes.get("transA") or (attributes.get("alpha", 1.0), attributes.get("beta", 1.0)) != (1, 1):
        return
    nodes = []
    if attributes.get("transB"):
        nodes.append(ir.node("Transpose", [b], {"perm": [1, 0]}, name=f"{node.name}.turned"))
        b = nodes[-1].outputs[0]
    nodes.append(ir.node("MatMul", [a, b], name=f"{node.name}.product"))
    if c:
        nodes.append(ir.node("Add", [nodes[-1].outputs[0], c[0]], name=f"{node.name}.sum"))
    _replace(graph, node, nodes)


def _difference(graph: ir.Graph, node: ir.Node) -> None:
    """A product's bias subtracted with its sign turned, which is the same number.

    ONNX Runtime fuses MatMul and Add to a Gemm, which it computes in float.
    """
    product, bias = node.inputs
    if product.producer() is None:
        product, bias = bias, product
    producer = product.producer()
    constant = bias.const_value
    if producer is None or producer.op_type != "MatMul" or constant is None:
        return
    source = producer.inputs[1].producer()
    if source is None or source.op_type != "DequantizeLinear":
        return
    turned = _initializer(graph, f"{bias.name}.negative", -constant.numpy(), "FLOAT")
    new = ir.node("Sub", [product, turned], name=node.name)
    _replace(graph, node, [new])


def drop_superfluous_clip(graph: ir.Graph, node: ir.Node) -> None:
    """A ReLU6 before quantizers whose range ends no later: they clip to the same integers."""
    low, high = (None if v is None or v.const_value is None else float(v.const_value.numpy()) for v in node.inputs[1:3])
    (out,) = node.outputs
    uses = list(out.uses())
    if low != 0 or high is None or not uses or out.is_graph_output():
        return
    for use in uses:
        if use.node.op_type != "QuantizeLinear" or use.idx != 0:
            return
        scale, zero = (value.const_value.numpy() for value in use.node.inputs[1:3])
        largest = TYPES[use.node.inputs[2].dtype.name].high
        codes = use.node.outputs[0]
        bounds = [u.node for u in codes.uses() if u.node.op_type == "Clip"]
        if bounds:
            largest = int(bounds[0].inputs[2].const_value.numpy())
        if int(zero) != 0 or np.rint(np.float32(high) / np.float32(scale)) < largest:
            return
    ir.convenience.replace_all_uses_with(out, node.inputs[0])
    graph.remove(node, safe=True)


def _replace(graph: ir.Graph, node: ir.Node, nodes: list[ir.Node]) -> None:
    """Nodes in the place of one, whose output keeps its name."""
    (old,), (new,) = node.outputs, nodes[-1].outputs
    for made in nodes[:-1]:
        made.outputs[0].name = _free(graph, f"{made.name}.values")
    graph.insert_before(node, nodes)
    new.type, new.shape = old.type, old.shape
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    name = old.name
    graph.remove(node, safe=True)
    new.name = name


def _drop_single_splits(graph: ir.Graph) -> None:
    """A split into one part, which operands of an attention leave."""
    for node in list(graph):
        if node.op_type == "Split" and len(node.outputs) == 1:
            ir.convenience.replace_all_uses_with(node.outputs[0], node.inputs[0])
            graph.remove(node, safe=True)


def _facts(node: ir.Node) -> dict[str, Any]:
    return {name: attribute.value for name, attribute in node.attributes.items()}


def _constant(value: ir.Value | None) -> np.ndarray:
    if value is None or value.const_value is None:
        raise ValueError(f"a quantizer's numbers must be constants of the graph, got {value}")
    return value.const_value.numpy()


def _rank(values: np.ndarray, form: WeightForm) -> np.ndarray:
    """One value as a scalar, which per-tensor kernels ask for; else a vector, or for blocks what it is."""
    if form.block:
        return values
    return values.reshape(()) if form.axis is None else values.reshape(-1)


def _initializer(graph: ir.Graph, name: str, values: np.ndarray, kind: str) -> ir.Value:
    dtype = getattr(ir.DataType, kind)
    numpy = np.ascontiguousarray(values).reshape(np.shape(values)).astype(dtype.numpy())
    tensor = ir.Tensor(numpy, dtype=dtype, name=_free(graph, name))
    value = ir.Value(name=tensor.name, type=ir.TensorType(dtype), shape=tensor.shape, const_value=tensor)
    graph.register_initializer(value)
    return value


def _free(graph: ir.Graph, name: str) -> str:
    """The name, or that with a number that no value of the graph has: a layer may be called more than once."""
    taken = {v.name for node in graph for v in node.outputs} | set(graph.initializers)
    candidates = (name if i == 0 else f"{name}.{i}" for i in range(len(taken) + 1))
    return next(c for c in candidates if c not in taken)


def _name(value: ir.Value) -> str:
    return f"node.{value.name}"
