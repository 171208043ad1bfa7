"""A quantized model as an ONNX graph in which quantizers are nodes of our own, to be lowered for a runtime.

What runtimes fuse differs, so a quantizer is exported first as ``hdrq.export::Weight`` (codes and scale) or
``hdrq.export::Grid`` (x and scale), with its range and its layer's name as attributes.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from hdrq import checks
from hdrq.calibrate.data import Call, calibration_calls
from hdrq.prepare.copying import copy_model
from hdrq.quantizers.layers import input_readers, quantized_layers
from hdrq.quantizers.modules import Quantizer

DOMAIN = "hdrq.export"


class Weight(nn.Module):
    """In the place of a weight's quantizer: its codes and scale."""

    def __init__(self, layer: str, quantizer: Quantizer, latent: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("codes", quantizer.codes(latent.detach()))
        self.register_buffer("scale", quantizer.scale.detach().flatten().clone())
        zero_point = quantizer.zero_point
        self.register_buffer("zero_point", None if zero_point is None else zero_point.detach().flatten().clone())
        self.attributes = facts(layer, quantizer)

    def forward(self, w: torch.Tensor) -> torch.Tensor:
        inputs = (self.codes, self.scale) if self.zero_point is None else (self.codes, self.scale, self.zero_point)
        return _symbolic("Weight", inputs, self.attributes, w)


class Grid(nn.Module):
    """In the place of an input's quantizer."""

    def __init__(self, layer: str, quantizer: Quantizer) -> None:
        super().__init__()
        self.register_buffer("scale", quantizer.scale.detach().flatten().clone())
        self.attributes = facts(layer, quantizer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _symbolic("Grid", (x, self.scale), self.attributes, x)


def facts(layer: str, quantizer: Quantizer) -> dict[str, Any]:
    """A quantizer's attributes in the graph; axis −1 for one scale, block 0 for no groups."""
    axis, block = -1 if quantizer.axis is None else quantizer.axis, quantizer.group_size or 0
    return {"layer": layer, "qmin": quantizer.qmin, "qmax": quantizer.qmax, "axis": axis, "block": block}


def _symbolic(name: str, inputs: tuple, attributes: dict[str, Any], like: torch.Tensor) -> torch.Tensor:
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::{name}", inputs, attributes, dtype=like.dtype, shape=like.shape, version=1
    )


def check_exportable(model: nn.Module) -> None:
    """Whether a model can leave as it is.

    Raises:
        TypeError: it is not float32, or no module.
        ValueError: it is not quantized, or a quantizer does not round.
    """
    check_finished(model)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise TypeError(
                f"model must be float32 to be exported, got {checks.short(tensor.dtype)} in {name}: .float() it"
            )


def check_finished(model: nn.Module) -> None:
    """Whether a model is quantized, and by quantizers that round.

    Raises:
        TypeError: it is no module.
        ValueError: it is not quantized, or a quantizer does not round.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a quantized torch.nn.Module, got {type(model).__name__}")
    if not quantized_layers(model):
        raise ValueError(f"model must be quantized by hdrq.quantize, got a plain {type(model).__name__}")
    for name, quantizer in named_quantizers(model).items():
        if quantizer.mode != "round" or quantizer.keep != 1:
            raise ValueError(f"quantizers must round to be exported, got mode {quantizer.mode!r} for {name}")


def named_quantizers(model: nn.Module) -> dict[str, Quantizer]:
    """Every quantizer of a model, by what a message calls it; a shared one under the name of each reader."""
    found: dict[str, Quantizer] = {}
    for name, layer in quantized_layers(model).items():
        found[f"the weight of {name}"] = layer.weight_quantizer
    for name, quantizer in input_readers(model).items():
        found[f"the input of {name}"] = quantizer
    return found


@torch.no_grad()
def with_nodes(model: nn.Module) -> nn.Module:
    """A copy of a quantized model whose quantizers are nodes of :data:`DOMAIN`."""
    copy = copy_model("model", model).eval().requires_grad_(False)
    for name, layer in quantized_layers(copy).items():
        layer.module.parametrizations.weight[0] = Weight(name, layer.weight_quantizer, layer.latent)
    grids: dict[int, Grid] = {}
    for name, quantizer in input_readers(copy).items():
        grid = grids.setdefault(id(quantizer), Grid(name, quantizer))
        module: Any = copy.get_submodule(name)
        module.input_quantizer = grid
    return copy


def first_call(example: Any) -> Call:
    """The call that is traced; one sample is taken twice, since a batch of one would be a constant of the graph."""
    call = calibration_calls(example, "example")[0]
    return call if call.size > 1 else call.at(torch.tensor([0, 0]))


def free_batch(model: nn.Module, call: Call) -> tuple[tuple, dict[str, Any], Any]:
    """Copies of a call's arguments, positional and by keyword, and their free axes, as ``torch.export`` takes them.

    The first axis of all tensors that have the samples along it is a batch of any size.
    """

    def copied(value: Any) -> Any:  # an exported program keeps the whole storage of a view
        return value.clone(memory_format=torch.contiguous_format) if isinstance(value, torch.Tensor) else value

    def shape_of(value: Any) -> Any:
        return {0: batch} if isinstance(value, torch.Tensor) and value.ndim and len(value) == call.size else None

    args, kwargs = tuple(map(copied, call.args)), {key: copied(value) for key, value in call.kwargs.items()}
    batch = torch.export.Dim("batch", min=1, max=2**20)
    given = inspect.signature(model.forward).bind(*args, **kwargs).arguments if kwargs else {}
    return args, kwargs, {name: shape_of(value) for name, value in given.items()} or tuple(map(shape_of, args))


def traced(model: nn.Module, example: Call, opset: int) -> Any:
    """The ``onnx_ir.Model`` of :func:`with_nodes`; the first axis of all example tensors is a free batch.

    Raises:
        ValueError: PyTorch is too old, or its exporter fails; the message has what it says.
    """
    if not hasattr(torch.onnx, "ops"):
        raise ValueError(f"torch must be 2.8 or newer to export ONNX, got {torch.__version__}")
    args, kwargs, shapes = free_batch(model, example)
    try:
        program = torch.onnx.export(
            with_nodes(model),
            args,
            kwargs=kwargs,
            dynamo=True,
            opset_version=opset,
            verbose=False,
            dynamic_shapes=shapes,
        )
    except Exception as error:
        reason = str(error.__cause__ or error).strip().splitlines()
        raise ValueError(
            f"model must be one that torch.onnx exports, got {reason[0] if reason else error!r}"
        ) from error
    return program.model  # type: ignore[union-attr]
