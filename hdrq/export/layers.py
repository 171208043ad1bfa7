"""What each quantized layer of an ONNX graph will be computed in, by the rules of a runtime."""

from __future__ import annotations

import onnx_ir as ir

from hdrq.export.exported import Layer
from hdrq.export.profiles import Profile

PRODUCTS = ("Conv", "ConvTranspose", "MatMul", "Gemm")
EIGHT_BITS = (ir.DataType.INT8, ir.DataType.UINT8)
RELU = ("Relu", "Clip")


def layers_of(graph: ir.Graph, profile: Profile) -> list[Layer]:
    """The layers whose weights are quantized, in order, each product once."""
    found = []
    for node in graph:
        if node.op_type not in PRODUCTS:
            continue
        weight = next((v for v in node.inputs if v is not None and _is_weight(v)), None)
        if weight is not None:
            found.append(Layer(_layer(weight), node.op_type, _why_float(node, weight, profile)))
    return found


def unquantized_outputs(graph: ir.Graph) -> list[tuple[str, ir.Value]]:
    """Convolutions of quantized operands whose output, after a ReLU, nobody quantizes: the layer's name and the output.

    That of the graph itself stays.
    """
    found = []
    for node in graph:
        if node.op_type != "Conv":
            continue
        weight = node.inputs[1]
        if weight is None or not _is_weight(weight) or _operand_why(node.inputs[0], "input") is not None:
            continue
        out = _after_relu(node.outputs[0])
        quantized = bool(out.uses()) and all(use.node.op_type == "QuantizeLinear" for use in out.uses())
        if not quantized and not out.is_graph_output():
            found.append((_layer(weight), out))
    return found


def _layer(weight: ir.Value) -> str:
    """The name of the layer whose weight it is."""
    return weight.name.removesuffix(".values").removesuffix("_t").removesuffix(".weight")


def _is_weight(value: ir.Value) -> bool:
    node = value.producer()
    return node is not None and node.op_type == "DequantizeLinear" and node.inputs[0].const_value is not None


def _why_float(node: ir.Node, weight: ir.Value, profile: Profile) -> str | None:
    other = node.inputs[0] if node.inputs[1] is weight else node.inputs[1]
    why = _operand_why(other, "its input") or _operand_why(weight, "its weight")
    if why or profile.name != "onnxruntime":
        return why
    if node.op_type == "ConvTranspose":
        return "ONNX Runtime has no integer kernel of it"
    if node.op_type == "Conv":
        out = _after_relu(node.outputs[0])
        if not (out.uses() and all(use.node.op_type == "QuantizeLinear" for use in out.uses())):
            return "its output is not quantized"
        if out is not node.outputs[0] and out.producer().op_type == "Clip":
            return "its output is clipped before it is quantized"
    return None


def _operand_why(value: ir.Value | None, what: str) -> str | None:
    """Why a product of this operand is one of floats."""
    node = None if value is None else value.producer()
    while node is not None and node.op_type in ("Reshape", "Transpose", "Flatten", "MaxPool", "Unsqueeze", "Squeeze"):
        value = node.inputs[0]  # these pass integers on
        node = None if value is None else value.producer()
    if node is None or node.op_type != "DequantizeLinear":
        return f"{what} is not quantized"
    if "block_size" in node.attributes:
        return f"{what} has a scale for each group"
    kind = node.inputs[0].dtype
    return None if kind in EIGHT_BITS else f"{what} has {kind.name.lower()}"


def _after_relu(value: ir.Value) -> ir.Value:
    uses = list(value.uses())
    if len(uses) == 1 and uses[0].node.op_type in RELU and not value.is_graph_output():
        return uses[0].node.outputs[0]
    return value
