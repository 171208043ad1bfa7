"""A quantized model as a program of ``torch.export`` in ``quantized_decomposed`` ops, for inductor's integer kernels.

A quantizer is exported as ``quantize_per_tensor`` and ``dequantize_per_tensor`` of uint8, a weight as
``dequantize_per_channel`` of its codes. :func:`_lower` then puts both where inductor's patterns look for them.
"""

from __future__ import annotations

import operator
import os
import warnings
from collections.abc import Iterator
from typing import Any, TypeAlias

import torch
import torch.ao.quantization.fx._decomposed  # defines the ops
from torch import nn
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import has_free_symbols

from hdrq import checks
from hdrq.calibrate.data import Call
from hdrq.checkpoint.files import output_path, replacing
from hdrq.export.deployed import hold_weights
from hdrq.export.exported import Exported, Layer, check_floats
from hdrq.export.graph import check_exportable, first_call, free_batch
from hdrq.export.onnx_qdq import check_bits, provenance, saturation
from hdrq.export.profiles import PROFILES, activation_form
from hdrq.prepare.copying import copy_model
from hdrq.quantizers.layers import QuantizedLayer, input_readers, output_axis
from hdrq.quantizers.modules import Quantizer

Node: TypeAlias = Any  # torch.fx.Node, any of whose arguments may be anything
RUNTIME = "inductor"
CODES = "quantized_weight.codes"  # the end of the names of codes
aten, decomposed = torch.ops.aten, torch.ops.quantized_decomposed
QUANTIZE = decomposed.quantize_per_tensor.default
DEQUANTIZE = decomposed.dequantize_per_tensor.default
WEIGHT = decomposed.dequantize_per_channel.default
LINEAR, CONVOLUTIONS = (aten.linear.default,), (aten.conv1d.default, aten.conv2d.default)
SAME = (aten.conv1d.padding, aten.conv2d.padding)
TURNED = {aten.mm.default: (0, 1), aten.matmul.default: (0, 1), aten.addmm.default: (1, 2)}  # of a transposed weight
WITHOUT_KERNEL = (
    aten.conv3d.default,
    aten.conv3d.padding,
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
)
OPERANDS = (
    dict.fromkeys((*LINEAR, *CONVOLUTIONS, *SAME, *WITHOUT_KERNEL), (0, 1)) | TURNED
)  # where input and weight are
PADS = (aten.pad.default, aten.constant_pad_nd.default)
TURNS = (aten.t.default, aten.transpose.int, aten.permute.default)
MOVES = (  # what changes no element
    *TURNS,
    *PADS,
    aten.view.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.expand.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.roll.default,
)
POOLS = (aten.max_pool2d.default, aten.max_pool2d_with_indices.default)
CLIPS: dict[Any, tuple] = {  # with their bounds, or the names of these
    aten.relu.default: (0.0, None),
    aten.relu6.default: (0.0, 6.0),
    aten.hardtanh.default: ("min_val", "max_val"),
    aten.clamp.default: ("min", "max"),
    aten.clamp_min.default: ("min", None),
}


def pt2(model: nn.Module, example: Any, *, allow_float: bool = False) -> ExportedProgram:
    """A quantized model as a ``torch.export`` program, which :func:`compile_pt2` makes integer kernels of.

    Weights are int8 codes with a scale for each output channel, inputs pass through a clamp where they have fewer than
    8 bits, ``quantize_per_tensor`` to uint8 and ``dequantize_per_tensor``. Integers are hdrq's but at ties: the op
    multiplies by 1/s, where hdrq divides by s. Biases and all that is not quantized stay float. The first axis of every
    input that has the samples along it is a batch of any size.

    Args:
        model: by :func:`hdrq.quantize`, :func:`hdrq.merge` or :func:`hdrq.load`; float32.
        example: data as for :func:`hdrq.quantize`, of which the first call is traced.
        allow_float: let products be computed in float that cannot be computed in integers; a warning names them.

    Raises:
        TypeError, ValueError: "X must be …, got …": the model is not quantized or cannot be traced, or a product would
            silently be one of floats: more than 8 bits, an input that is not quantized, a transposed or
            three-dimensional convolution, scales that do not lie along output channels.

    Source: PyTorch 2 Export Quantization with the x86 backend of inductor.
    """
    program, layers = _exported(model, example, allow_float)
    if floats := [layer for layer in layers if layer.why_float is not None]:
        warnings.warn(f"computed in float: {checks.listed(map(str, floats))}", stacklevel=2)
    return program


def to_pt2(model: nn.Module, example: Any, path: str | os.PathLike, *, allow_float: bool = False) -> Exported:
    """Write the program of :func:`pt2` as a file of ``torch.export.save``, which appears whole or not at all.

    Its extra files ``hdrq`` and ``hdrq.origin`` say which model it was made from. ``torch.export.load`` reads it once
    :mod:`hdrq.export` is imported, which defines the ops.

    Returns:
        What each layer will be computed in.

    Raises:
        TypeError, ValueError: as :func:`pt2`.
        OSError: the file cannot be written; what was there stays.
    """
    path = output_path(path)
    program, layers = _exported(model, example, allow_float)
    with replacing(path) as file:
        torch.export.save(program, file, extra_files=provenance(model, RUNTIME))
    return Exported(path, RUNTIME, layers, [], saturation(model, RUNTIME))


@torch.no_grad()
def _exported(model: nn.Module, example: Any, allow_float: bool) -> tuple[ExportedProgram, list[Layer]]:
    check_exportable(model)
    if not allow_float:
        check_bits(model, RUNTIME)
    args, kwargs, shapes = free_batch(model, _blank(first_call(example)))
    form = _decomposed(model)
    try:
        program = torch.export.export(form, args, kwargs, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise ValueError(
            f"model must be one that torch.export exports, got {reason[0] if reason else error!r}"
        ) from error
    if any(node.op == "call_function" and _in_place(node.target) for node in program.graph.nodes):
        program = program.run_decompositions({})  # to operations that make new tensors
    layers = _lower(program)
    if not allow_float:
        check_floats(layers, RUNTIME)
    program = program.run_decompositions({})  # new nodes get their types and shapes
    free = [value.shape[0] for value in _inputs(program) if value.ndim and has_free_symbols(value.shape[0])]
    if not free:
        raise ValueError("model must take batches of any size to be exported, got one that holds the example's alone")
    return program, layers


def _blank(call: Call) -> Call:
    """Two samples of zeros: a program keeps its example, and a file of it must hold nobody's data."""

    def blank(value: Any) -> Any:
        return torch.zeros_like(value, device="cpu") if isinstance(value, torch.Tensor) else value

    two = call.at(torch.arange(2))
    return Call(tuple(map(blank, two.args)), {key: blank(value) for key, value in two.kwargs.items()})


def _in_place(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def _inputs(program: ExportedProgram) -> list[torch.Tensor]:
    given = set(program.graph_signature.user_inputs)
    values = (n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder" and n.name in given)
    return [value for value in values if isinstance(value, torch.Tensor)]


def _decomposed(model: nn.Module) -> nn.Module:
    """A copy of a quantized model whose quantizers are ``quantized_decomposed`` ops."""
    copy = copy_model("model", model).eval().requires_grad_(False).cpu()
    hold_weights(copy, Weight)
    grids: dict[int, Grid] = {}
    for name, quantizer in input_readers(copy).items():
        module: Any = copy.get_submodule(name)
        module.input_quantizer = grids.setdefault(id(quantizer), Grid(name, quantizer))
    return copy


class Weight(nn.Module):
    """A weight's codes, less their zero points, in the smallest type, with a scale for each row."""

    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor

    def __init__(self, layer: QuantizedLayer) -> None:
        super().__init__()
        quantizer = layer.weight_quantizer
        codes = quantizer.codes(layer.latent).int()
        if quantizer.zero_point is not None:
            codes = codes - quantizer.broadcast(quantizer.zero_point, codes).int()
        self.shape, axis = tuple(codes.shape), checks.axis_of(codes, quantizer.axis)
        self.turned = quantizer.group_size is None and codes.ndim == 2 and output_axis(layer.module) == 1
        if quantizer.group_size is not None:
            codes = codes.view(-1, quantizer.group_size)
        elif self.turned:  # transformers' Conv1D
            codes, axis = codes.t(), None if axis is None else 1 - axis
        self.axis = axis or 0
        low, high = (int(bound) for bound in codes.aminmax())
        fits = (t for t in (torch.int8, torch.int16) if torch.iinfo(t).min <= low and high <= torch.iinfo(t).max)
        self.register_buffer("codes", codes.to(next(fits, torch.int32)).contiguous())
        self.register_buffer("scale", quantizer.scale.detach().flatten().expand(codes.shape[self.axis]).clone())
        self.register_buffer("zero_point", torch.zeros(codes.shape[self.axis], dtype=torch.int64))

    def forward(self) -> torch.Tensor:
        bounds = torch.iinfo(self.codes.dtype)
        values = WEIGHT(self.codes, self.scale, self.zero_point, self.axis, bounds.min, bounds.max, self.codes.dtype)
        if self.turned:
            return values.t()
        return values if values.shape == self.shape else values.view(self.shape)

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        if self.axis != 0 or self.codes.shape != self.shape:
            return nn.functional.embedding(index, self())
        scale = nn.functional.embedding(index, self.scale[:, None])
        return nn.functional.embedding(index, self.codes).to(torch.float32) * scale


class Grid(nn.Module):
    """In the place of an input's quantizer: uint8 where that holds its range, else float operations."""

    scale: torch.Tensor

    def __init__(self, layer: str, quantizer: Quantizer) -> None:
        super().__init__()
        scale = quantizer.scale.detach().flatten()
        if scale.numel() != 1:
            raise ValueError(f"inputs must have one scale each to be exported, got {scale.numel()} for {layer}")
        form = activation_form(PROFILES["openvino"], layer, quantizer.qmin, quantizer.qmax)
        self.eight, self.narrow, self.zero_point = form.type.name == "UINT8", form.clipped, form.zero_point
        self.range = (quantizer.qmin, quantizer.qmax)
        self.bounds = tuple(float(scale * q) for q in self.range)
        self.register_buffer("scale", None if self.eight else scale.clone())
        self.step = float(scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.eight:
            return (x / self.scale).round().clamp(*self.range) * self.scale
        if self.narrow:  # here, because inductor drops the op's own bounds where it fuses it
            x = x.clamp(*self.bounds)
        grid = (self.step, self.zero_point, 0, 255, torch.uint8)
        return DEQUANTIZE(QUANTIZE(x, *grid), *grid)


def _lower(program: ExportedProgram) -> list[Layer]:
    """Put quantizers where inductor's patterns look for them, in place. Returns the products of quantized weights."""
    graph: Any = program.graph_module.graph
    buffers = program.graph_signature.inputs_to_buffers
    layers: list[Layer] = []
    for weight in list(graph.find_nodes(op="call_function", target=WEIGHT)):
        for reader, operand in list(_readers(weight)):
            why = _why_float(reader, operand, weight)
            if reader.target is not aten.embedding.default:
                layers.append(Layer(_name(reader, buffers[weight.args[0].name]), _op(reader), why))
            with graph.inserting_before(reader):
                if why is None:
                    _read_codes(graph, reader, len(layers))
                own = _in_float(graph, weight) if why else _numbered(graph, weight, weight.args[0], len(layers))
                reader.replace_input_with(operand, _again(graph, operand, weight, own))
                if why is None and reader.target in (aten.conv1d.default, aten.conv1d.padding):
                    _in_two_dimensions(graph, reader)
    for quantize in graph.find_nodes(op="call_function", target=QUANTIZE):
        _drop_superfluous_clip(quantize.args[0])
        _part_from_pooling(graph, quantize)
    graph.eliminate_dead_code()
    program.graph_module.recompile()
    return layers


def float_products(program: ExportedProgram) -> list[str]:
    """The products of quantized weights that a program computes in float, by name."""
    names = program.graph_signature.inputs_to_buffers
    codes = [n for n in program.graph.nodes if n.op == "placeholder" and names.get(n.name, "").endswith(CODES)]
    values = [
        (c, value) for c in codes for user in c.users if user.target is aten._to_copy.default for value in user.users
    ]
    readers = [(c, reader) for c, value in values for reader, _ in _readers(value)]
    return [f"{_name(r, names[c.name])} ({_op(r)})" for c, r in readers if r.target is not aten.embedding.default]


def _readers(node: Node) -> Iterator[tuple[Node, Node]]:
    """Who computes with a value, wherever its elements were moved, and what it reads."""
    for user in node.users:
        if user.target in MOVES and user.target not in PADS:
            yield from _readers(user)
        else:
            yield user, node


def _why_float(reader: Node, operand: Node, weight: Node) -> str | None:
    """Why a product of this weight is one of floats."""
    target = reader.target
    places = OPERANDS.get(target)
    if places is None or reader.args[places[1]] is not operand:
        return f"its weight is read by {_op(reader)}"
    if target in WITHOUT_KERNEL:
        return "inductor has no integer kernel of it"
    if _source(reader.args[places[0]]).target is not DEQUANTIZE:
        return "its input is not quantized to 8 bits"
    if weight.args[-1] is not torch.int8:
        return "int8 cannot hold its weight's codes less their zero points"
    turned = operand.target in TURNS and operand.args[0] is weight
    if weight.args[3] != 0 or not (turned if target in TURNED else operand is weight):
        return "its weight's scales do not lie along output channels"
    if target in SAME and _pads_unequally(reader):
        return "it pads one side more than the other"
    return None


def _pads_unequally(convolution: Node) -> bool:
    """Whether ``padding="same"`` has an odd number of places, for which inductor pads values, not codes."""
    sides, dilation = convolution.args[1].meta["val"].shape[2:], _argument(convolution, "dilation")
    steps = dilation if len(dilation) == len(sides) else dilation * len(sides)
    odd = any(d * (k - 1) % 2 for d, k in zip(steps, sides, strict=True))
    return odd and _argument(convolution, "padding") == "same"


def _name(reader: Node, buffer: str) -> str:
    """The module that computes, else the one that holds the weight."""
    modules = [path for path, _ in reader.meta.get("nn_module_stack", {}).values() if path]
    return modules[-1] if modules else layer_of(buffer)


def layer_of(buffer: str) -> str:
    """The layer that holds a weight, from the name of its codes."""
    return buffer.removesuffix(CODES).rstrip(".")


def _op(node: Node) -> str:
    return str(node.target).removeprefix("aten.").partition(".")[0]


def _source(value: Node) -> Node:
    """What a value was before its elements were moved, and zeros put around them."""
    while value.target in MOVES and (value.target not in PADS or _pads_zeros(value)):
        value = value.args[0]
    return value


def _pads_zeros(pad: Node) -> bool:
    constant = pad.target is aten.constant_pad_nd.default or _argument(pad, "mode") == "constant"
    return constant and not _argument(pad, "value")


def _argument(node: Node, name: str) -> Any:
    """A call's argument of a name, or its default."""
    arguments = node.target._schema.arguments
    place = next(i for i, each in enumerate(arguments) if each.name == name)
    return node.args[place] if place < len(node.args) else node.kwargs.get(name, arguments[place].default_value)


def _again(graph: Any, value: Node, old: Node, new: Node, zero: float = 0.0) -> Node:
    """The moves that made ``value`` of ``old``, of ``new``, where ``zero`` stands for 0."""
    if value is old:
        return new
    x = _again(graph, value.args[0], old, new, zero)
    if value.target in PADS:
        return _call(graph, aten.constant_pad_nd.default, (x, value.args[1], zero), value)
    return _call(graph, value.target, (x, *value.args[1:]), value, **value.kwargs)


def _read_codes(graph: Any, product: Node, number: int) -> None:
    """Move an input's codes in the place of its values, so that the product reads codes that were just dequantized.

    Of a linear layer they lie in a row: where they do not, inductor makes one product for each sample, and its pattern
    for that fails.
    """
    x = product.args[OPERANDS[product.target][0]]
    dequantize = _source(x)
    codes, _, zero_point, *_ = dequantize.args
    moved = _again(graph, x, dequantize, codes, zero_point)
    if product.target not in (*CONVOLUTIONS, *SAME) and not x.meta["val"].is_contiguous():
        moved = _call(graph, aten.clone.default, (moved,), x, memory_format=torch.contiguous_format)
    product.replace_input_with(x, _numbered(graph, dequantize, moved, number))


def _in_two_dimensions(graph: Any, product: Node) -> None:
    """Make a convolution of lines one of images of one row: oneDNN's kernel of lines fails with all but a ReLU."""

    def row(values: Node) -> Node:
        codes = _call(graph, aten.unsqueeze.default, (values.args[0], 2), values)
        return _call(graph, values.target, (codes, *values.args[1:]), values)

    stride, padding, dilation = (_argument(product, name) for name in ("stride", "padding", "dilation"))
    named = isinstance(padding, str)
    target = aten.conv2d.padding if named else aten.conv2d.default
    places = ([1, *stride], padding if named else [0, *padding], [1, *dilation], _argument(product, "groups"))
    x, weight = map(row, product.args[:2])
    image = _call(graph, target, (x, weight, _argument(product, "bias"), *places), product)
    product.target, product.args, product.kwargs = aten.squeeze.dim, (image, 2), {}


def _numbered(graph: Any, dequantize: Node, codes: Node, number: int) -> Node:
    """Values of codes for one reader: inductor's patterns want one node each, and it would see equal ones as one.

    The ops do not compute with ``quant_min``, which therefore tells them apart.
    """
    _, *grid, low, high, dtype = dequantize.args
    return _call(graph, dequantize.target, (codes, *grid, low + number % (high - low), high, dtype), dequantize)


def _in_float(graph: Any, weight: Node) -> Node:
    """A weight's values by operations that are folded into a constant, which inductor never does with the op."""
    codes, scale, _, axis, *_ = weight.args
    shape = [-1 if i == axis else 1 for i in range(codes.meta["val"].ndim)]
    scale = _call(graph, aten.view.default, (scale, shape), weight)
    values = _call(graph, aten._to_copy.default, (codes,), weight, dtype=torch.float32)
    return _call(graph, aten.mul.Tensor, (values, scale), weight)


def _drop_superfluous_clip(clamp: Node) -> None:
    """Skip a ReLU or its like before a clamp to fewer bits that has no wider bounds."""
    if clamp.target is not aten.clamp.default:
        return
    clip, low, high = clamp.args
    if clip.target in CLIPS and len(clip.users) == 1:
        least, most = CLIPS[clip.target]
        least, most = (_argument(clip, bound) if isinstance(bound, str) else bound for bound in (least, most))
        if (least is None or least <= low) and (most is None or high <= most):
            clamp.replace_input_with(clip, clip.args[0])


def _part_from_pooling(graph: Any, quantize: Node) -> None:
    """Put a clamp between a pooling of dequantized values and a quantizer: inductor would pool codes, whatever their
    scales."""
    x, step, zero_point, *_ = quantize.args
    pool = x.args[0] if x.target is operator.getitem else x
    if pool.target in POOLS and pool.args[0].target is DEQUANTIZE:
        with graph.inserting_before(quantize):
            clamped = _call(graph, aten.clamp.default, (x, -zero_point * step, (255 - zero_point) * step), x)
        quantize.replace_input_with(x, clamped)


def _call(graph: Any, target: Any, args: tuple, like: Node, **kwargs: Any) -> Node:
    """A new node, which comes from where ``like`` does."""
    node = graph.call_function(target, args, kwargs)
    node.meta = {key: value for key, value in like.meta.items() if key not in ("val", "tensor_meta")}
    return node
