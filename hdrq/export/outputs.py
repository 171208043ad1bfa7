"""8-bit quantizers on outputs that hdrq leaves in float, for runtimes whose integer convolutions return integers."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch

from hdrq.calibrate.data import Call
from hdrq.export.lowering import drop_superfluous_clip, insert_grid
from hdrq.export.profiles import TYPES, ActivationForm
from hdrq.export.session import feed, session


def quantize_outputs(program: ir.Model, outputs: list[tuple[str, ir.Value]], calls: list[Call]) -> list[str]:
    """Quantize each output by its range over the calls, 0 inside, in place. Returns the layers' names."""
    ranges = _ranges(program, [value for _, value in outputs], calls)
    for (name, value), (low, high) in zip(outputs, ranges, strict=True):
        low, high = min(low, 0.0), max(high, 0.0)
        step = np.asarray(max(high - low, 1e-30) / 255, np.float32)
        zero_point = int(np.clip(np.rint(-low / step), 0, 255))
        insert_grid(program.graph, value, f"{name}.output", step, ActivationForm(TYPES["UINT8"], zero_point, 0, 255))
    for node in list(program.graph):
        if node.op_type == "Clip":
            drop_superfluous_clip(program.graph, node)
    return [name for name, _ in outputs]


def _ranges(program: ir.Model, values: list[ir.Value], calls: list[Call]) -> list[tuple[float, float]]:
    """The least and the greatest element of each value over all calls, as the graph computes them unfused."""
    own = list(program.graph.outputs)
    program.graph.outputs.extend(value for value in values if value not in own)
    try:
        proto = ir.to_proto(program).SerializeToString()
    finally:
        del program.graph.outputs[len(own) :]
    unfused = session(proto)
    names = [str(value.name) for value in values]
    found = [(np.inf, -np.inf)] * len(values)
    for call in calls:
        for at in torch.arange(call.size).split(32):
            results = unfused.run(names, feed(unfused, call.at(at)))
            found = [
                (min(low, float(r.min())), max(high, float(r.max())))
                for (low, high), r in zip(found, results, strict=True)
            ]
    return found
