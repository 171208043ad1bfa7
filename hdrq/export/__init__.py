"""Quantized models for other runtimes: :func:`to_onnx`, and :func:`check` for what a runtime makes of the file; here,
:func:`deploy` keeps weights packed. Models of other tools: :func:`read` makes files of hdrq of them, to be merged, and
:func:`write_like` writes such a file in their form."""

from hdrq.export.checking import Checked, check
from hdrq.export.deployed import deploy
from hdrq.export.foreign import read, write_like
from hdrq.export.onnx_import import read_onnx
from hdrq.export.onnx_qdq import Exported, to_onnx

__all__ = ["Checked", "Exported", "check", "deploy", "read", "read_onnx", "to_onnx", "write_like"]
