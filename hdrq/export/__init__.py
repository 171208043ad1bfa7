"""Quantized models for other runtimes: :func:`to_onnx` and :func:`pt2`, and :func:`check` for what a runtime makes of
them; here, :func:`deploy` keeps weights packed. Models of other tools: :func:`read` makes files of hdrq of them, to be
merged, and :func:`write_like` writes such a file in their form."""

from hdrq.export.checking import Checked, check
from hdrq.export.deployed import deploy
from hdrq.export.exported import Exported
from hdrq.export.folders import read_folder, to_compressed_tensors
from hdrq.export.foreign import read, write_like
from hdrq.export.inductor import compile_pt2
from hdrq.export.onnx_import import read_onnx
from hdrq.export.onnx_qdq import to_onnx
from hdrq.export.pt2e import pt2, to_pt2

__all__ = [
    "Checked",
    "Exported",
    "check",
    "compile_pt2",
    "deploy",
    "pt2",
    "read",
    "read_folder",
    "read_onnx",
    "to_compressed_tensors",
    "to_onnx",
    "to_pt2",
    "write_like",
]
