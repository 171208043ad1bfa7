"""A graph in ONNX Runtime, on the CPU."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from hdrq.calibrate.data import Call


def session(model: str | os.PathLike | bytes, optimized: Path | None = None) -> Any:
    """A session of a file, or of a graph's bytes: unfused, or as optimized as can be, with what that is in a file."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_DISABLE_ALL if optimized is None else level.ORT_ENABLE_ALL
    if optimized is not None:
        options.optimized_model_filepath = os.fspath(optimized)
    source = model if isinstance(model, bytes) else os.fspath(model)
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def feed(session: Any, call: Call) -> dict[str, np.ndarray]:
    """A call's tensors as the inputs of a session."""
    inputs = [each.name for each in session.get_inputs()]
    return dict(zip(inputs, (tensor.detach().cpu().numpy() for tensor in call.tensors), strict=True))
