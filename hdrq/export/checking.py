"""What a runtime makes of an exported file: its answers beside PyTorch's, and the kernels that it chose."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from hdrq import checks, tree
from hdrq.calibrate.data import Call, calibration_calls
from hdrq.export.inductor import count_products, opened
from hdrq.export.onnx_qdq import require
from hdrq.export.session import feed, session

RUNTIMES = ("onnxruntime", "openvino", "inductor")
PRODUCTS = ("Conv", "FusedConv", "ConvTranspose", "MatMul", "FusedMatMul", "Gemm", "FusedGemm")
INTEGER_PRODUCTS = ("QLinearConv", "MatMulIntegerToFloat", "QLinearMatMul", "QGemm", "ConvInteger", "MatMulInteger")


@dataclass(frozen=True)
class Checked:
    """A file's answers and kernels in one runtime.

    Attributes:
        difference: the largest of an output, fused as the runtime likes, against PyTorch's.
        unfused: the same with nothing fused, where each quantizer is a kernel of its own: in ONNX Runtime, for
            "inductor" in PyTorch.
        floor: how far PyTorch is from itself without oneDNN, on the same data.
        agreement: how often the greatest output is the same one.
        integer, floats: products in integers; products that read a quantized weight and compute in float, by name.
    """

    runtime: str
    difference: float
    unfused: float
    floor: float
    agreement: float
    integer: int
    floats: list[str]

    def __str__(self) -> str:
        lines = [
            f"{self.runtime}: {self.integer} products in integers, {len(self.floats)} of quantized weights in float",
            f"outputs differ from PyTorch's by at most {self.difference:.2g}; unfused by {self.unfused:.2g}; "
            f"PyTorch from itself without oneDNN by {self.floor:.2g}",
            f"the same answer for {100 * self.agreement:.1f}% of the samples",
        ]
        return "\n".join([*lines, *(f"  in float: {name}" for name in self.floats)])


@torch.no_grad()
def check(path: Any, model: nn.Module, data: Any, *, runtime: str = "openvino") -> Checked:
    """Run an exported file beside the model that it was made from, and count the kernels that the runtime chose.

    Args:
        path: a file that :func:`hdrq.export.to_onnx` wrote; for "inductor" one of :func:`hdrq.export.to_pt2`, or a
            program of :func:`hdrq.export.pt2`.
        model: the quantized model.
        data: as for :func:`hdrq.quantize`.
        runtime: "openvino", "onnxruntime" or "inductor".

    Raises:
        TypeError, ValueError: there is no such runtime, or the file is none of its kind.
        MissingExtra: it is not installed; for ONNX onnxruntime is needed in any case, for "inductor" torchao.
    """
    checks.choice("runtime", runtime, RUNTIMES)
    if runtime != "inductor":
        require("onnx", "onnxruntime", *({"openvino"} & {runtime}))
    calls = calibration_calls(data, "data")
    want = [_answers(model, call) for call in calls]
    with torch.backends.mkldnn.flags(enabled=False):
        plain = [_answers(model, call) for call in calls]
    run, plainly, integer, floats = {"openvino": _openvino, "onnxruntime": _onnxruntime, "inductor": _inductor}[
        runtime
    ](path)
    got, unfused = [run(call) for call in calls], [plainly(call) for call in calls]
    same = [(_top(g) == _top(w)).ravel() for g, w in zip(got, want, strict=True)]
    return Checked(
        runtime,
        _largest(got, want),
        _largest(unfused, want),
        _largest(plain, want),
        float(np.concatenate(same).mean()),
        integer,
        floats,
    )


def _answers(model: Callable, call: Call) -> list[np.ndarray]:
    outputs = call(model) if isinstance(model, nn.Module) else model(*call.args, **call.kwargs)
    return [x.numpy() for x in tree.leaves(outputs) if isinstance(x, torch.Tensor) and x.is_floating_point()]


def _top(answers: list[np.ndarray]) -> np.ndarray:
    """The place of the greatest: among channels of images, else along the last axis."""
    return np.asarray(answers[0].argmax(1 if answers[0].ndim == 4 else -1))


def _largest(these: list, those: list) -> float:
    pairs = ((a, b) for left, right in zip(these, those, strict=True) for a, b in zip(left, right, strict=True))
    return max(float(np.abs(a - b).max(initial=0)) for a, b in pairs)


def _runner(opened: Any) -> Callable[[Call], list[np.ndarray]]:
    return lambda call: [y for y in opened.run(None, feed(opened, call)) if y.dtype == np.float32]


def _onnxruntime(path: str | os.PathLike) -> tuple[Callable, Callable, int, list[str]]:
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        opened = session(path, optimized)
        graph = _graph(optimized)
    floats = [str(product) for product in _products(graph)]
    integer = sum(node.op_type in INTEGER_PRODUCTS for node in graph.node)
    return _runner(opened), _runner(session(path)), integer, floats


def _graph(path: str | os.PathLike) -> Any:
    import onnx

    return onnx.load(os.fspath(path), load_external_data=False).graph


@dataclass(frozen=True)
class Product:
    """A product that reads a weight through a DequantizeLinear.

    ``names`` are its own, its output's, and those of the sum with its bias, by one of which a fused kernel goes.
    """

    name: str
    op: str
    names: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.name} ({self.op})"


def _products(graph: Any) -> list[Product]:
    constants = {tensor.name for tensor in graph.initializer}
    weights = {
        node.output[0] for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] in constants
    }
    sums = {name: node for node in graph.node if node.op_type in ("Add", "Sub") for name in node.input}
    found = []
    for node in graph.node:
        if node.op_type in PRODUCTS and weights.intersection(node.input):
            steps = [node, *([sums[node.output[0]]] if node.output[0] in sums else [])]
            found.append(Product(node.name, node.op_type, tuple(n for s in steps for n in (s.name, s.output[0]))))
    return found


def _openvino(path: str | os.PathLike) -> tuple[Callable, Callable, int, list[str]]:
    import openvino

    compiled = openvino.Core().compile_model(
        os.fspath(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    )
    kernels: dict[str, bool] = {}  # by the nodes of the file that a kernel computes: whether it is one of integers
    for node in compiled.get_runtime_model().get_ops():
        found = node.get_rt_info()
        names, primitive, precision = (
            found[key].astype(str) for key in ("originalLayersNames", "primitiveType", "runtimePrecision")
        )
        integers = primitive.endswith("I8") or precision in ("u8", "i8")
        for name in names.split(","):
            product = name.partition("/")[0].removesuffix("_original")
            kernels[product] = kernels.get(product, False) or integers
    products = _products(_graph(path))
    floats = [str(product) for product in products if not any(kernels.get(name, False) for name in product.names)]

    def run(call: Call) -> list[np.ndarray]:
        results = compiled([tensor.detach().cpu().numpy() for tensor in call.tensors])
        return [y for y in (results[k] for k in range(len(compiled.outputs))) if y.dtype == np.float32]

    return run, _runner(session(path)), len(products) - len(floats), floats


def _inductor(path: Any) -> tuple[Callable, Callable, int, list[str]]:
    program = opened(path)
    compiled, integer, floats = count_products(program)
    return partial(_answers, compiled), partial(_answers, program.module()), integer, floats
