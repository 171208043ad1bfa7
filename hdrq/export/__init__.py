"""Quantized models for other runtimes: :func:`to_onnx`, and :func:`check` for what a runtime makes of the file; here,
:func:`deploy` keeps weights packed."""

from hdrq.export.checking import Checked, check
from hdrq.export.deployed import deploy
from hdrq.export.onnx_qdq import Exported, to_onnx

__all__ = ["Checked", "Exported", "check", "deploy", "to_onnx"]
