"""Quantized models as ONNX files with QuantizeLinear and DequantizeLinear, from which runtimes take integer kernels."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch import nn

from hdrq import checks
from hdrq._version import __version__
from hdrq.calibrate.data import calibration_calls
from hdrq.checkpoint.files import output_path, write_atomically
from hdrq.errors import MissingExtra
from hdrq.export.exported import Exported, check_floats
from hdrq.export.graph import check_exportable, first_call, named_quantizers, traced
from hdrq.export.profiles import WIDENED, profile
from hdrq.quantizers.layers import input_readers, quantized_layers
from hdrq.quantizers.provenance import origin

OPSETS = (21, 25)
LARGEST = 2**31 - 2**20  # bytes of a protobuf; beyond, weights lie in a file beside it


def to_onnx(
    model: nn.Module,
    example: Any,
    path: str | os.PathLike,
    *,
    runtime: str = "openvino",
    data: Any = None,
    allow_float: bool = False,
    opset: int = 21,
) -> Exported:
    """Write a quantized model as an ONNX file.

    Weights are integer initializers with their scales, inputs pass through QuantizeLinear, Clip where no type has their
    range, and DequantizeLinear: the same integers as hdrq's, ties too. Biases and all that is not quantized stay float.
    The first axis of every input is a batch of any size.

    Args:
        model: by :func:`hdrq.quantize`, :func:`hdrq.merge` or :func:`hdrq.load`; float32.
        example: data as for :func:`hdrq.quantize`, of which the first call is traced.
        path: of the file, which appears whole or not at all.
        runtime: "openvino" computes this placement of quantizers in integers as it is. "onnxruntime" wants the outputs
            of convolutions quantized too, to 8 bits by their range over ``data``. "tensorrt" has no zero points; it was
            not run. "standard" has the smallest types of ONNX, for others to read.
        data: as for :func:`hdrq.quantize`; read for "onnxruntime" alone.
        allow_float: let a runtime compute in float what it cannot compute in integers.
        opset: 21 to 25.

    Returns:
        What each layer will be computed in.

    Raises:
        TypeError, ValueError: "X must be …, got …": the model is not quantized or cannot be traced, a runtime cannot
            hold a range, or would silently compute a quantized layer in float.
        MissingExtra: onnx or onnxscript, or onnxruntime where ``data`` is read; ``pip install "hdrq[export]"``.

    Source: ONNX operators QuantizeLinear and DequantizeLinear, opset 21.
    """
    require("onnx", "onnx_ir", "onnxscript")
    from hdrq.export.layers import layers_of, unquantized_outputs
    from hdrq.export.lowering import lower
    from hdrq.export.outputs import quantize_outputs

    target = profile(runtime)
    if not isinstance(opset, int) or not OPSETS[0] <= opset <= OPSETS[1]:
        raise ValueError(f"opset must be in [{OPSETS[0]}, {OPSETS[1]}], got {opset}: int4 and 16 bits came with 21")
    path = output_path(path)
    check_exportable(model)
    if not allow_float and runtime != "standard":
        check_bits(model, runtime)
    call = first_call(example)
    program = traced(model, call, opset)
    lower(program, target)
    added: list[str] = []
    if runtime == "onnxruntime" and (missing := unquantized_outputs(program.graph)):
        if data is not None:
            require("onnxruntime")
            added = quantize_outputs(program, missing, calibration_calls(data, "data"))
        elif not allow_float:
            names = ", ".join(name for name, _ in missing[:5])
            raise ValueError(
                f'data must be given for runtime "onnxruntime": the outputs of {len(missing)} convolutions ({names}'
                f"{', …' if len(missing) > 5 else ''}) are not quantized, so it would compute them in float; or "
                'runtime="openvino", or allow_float=True'
            )
    layers = layers_of(program.graph, target)
    if not allow_float and runtime != "standard":
        check_floats(layers, runtime)
    program.metadata_props.update(provenance(model, runtime))
    _write(program, path)
    return Exported(path, runtime, layers, added, saturation(model, runtime))


def check_bits(model: nn.Module, runtime: str) -> None:
    """Refuse quantizers of more than 8 bits, of which no runtime computes integer products.

    Raises:
        ValueError: names the first.
    """
    for name, quantizer in named_quantizers(model).items():
        bits = (quantizer.qmax - quantizer.qmin).bit_length()
        if bits > 8:
            raise ValueError(
                f'bits must be 2 to 8 for runtime "{runtime}" to compute in integers, got {bits} for {name}; '
                "allow_float=True lets it compute in float"
            )


def saturation(model: nn.Module, runtime: str) -> list[str]:
    """Which layers may saturate in the 16 bits in which processors without VNNI add pairs of products."""
    readers = input_readers(model)
    wide = [
        name
        for name, layer in quantized_layers(model).items()
        if name in readers
        and readers[name].qmax - readers[name].qmin > 127
        and max(-layer.weight_quantizer.qmin, layer.weight_quantizer.qmax) > WIDENED
    ]
    if not wide or runtime not in ("openvino", "onnxruntime", "inductor"):
        return []
    return [f"8 bits times 8 bits may saturate on x86 processors without VNNI: {checks.listed(wide)}"]


def provenance(model: nn.Module, runtime: str) -> dict[str, str]:
    """What the file says of where it comes from."""
    return {"hdrq": __version__, "hdrq.runtime": runtime, "hdrq.origin": json.dumps(origin(model), sort_keys=True)}


def _write(program: Any, path: Path) -> None:
    """The checked graph as a file; one beyond what a protobuf holds has its weights in a second file beside it."""
    import onnx
    import onnx_ir as ir

    if sum(value.const_value.nbytes for value in program.graph.initializers.values()) > LARGEST:
        ir.save(program, path, external_data=f"{path.name}.data")
        onnx.checker.check_model(os.fspath(path), full_check=True)
        return
    proto = ir.to_proto(program)
    onnx.checker.check_model(proto, full_check=True)
    write_atomically(path, proto.SerializeToString())


def require(*packages: str, extra: str = "export") -> None:
    """Refuse to go on without packages that only exporting needs."""
    for package in packages:
        try:
            __import__(package)
        except ImportError as error:
            raise MissingExtra(f'{package} must be installed, got none: pip install "hdrq[{extra}]"') from error
