"""A network to export, and quantized ONNX models to read: made by ONNX Runtime's quantizer, or by hand."""

import numpy as np
import pytest
import torch
from torch import nn

from hdrq.checkpoint.format import Reader
from hdrq.merging.files import merge_files

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from onnxruntime import quantization as ort  # noqa: E402

from hdrq.export import read_onnx, write_like  # noqa: E402

X = np.random.default_rng(0).normal(size=(8, 3, 8, 8)).astype(np.float32)


class Net(nn.Module):
    """A residual network with two convolutions whose outputs nobody quantizes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x).relu()
        x = (x + self.b(self.a(x).relu())).relu()
        return self.head(x.mean((2, 3)))


def answers(path, fused=False, x=X):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if not fused:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})[0]


def arrays(path):
    return {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}


def tensors(path):
    with Reader(path) as file:
        return file.manifest, {name: file.tensor(name) for name in file.specs}


# A residual network of others, in float, and what onnxruntime.quantization makes of it.

ENDS = {"x": ["n", 3, 8, 8], "y": ["n", 5]}


def float_model(path, seed):
    base, own = np.random.default_rng(0), np.random.default_rng(seed)

    def parameter(name, *shape):
        values = base.normal(size=shape) / np.sqrt(np.prod(shape[1:])) * (1 + 0.2 * own.normal(size=shape))
        return numpy_helper.from_array(values.astype(np.float32), name)

    parameters = [parameter("stem.weight", 8, 3, 3, 3), parameter("stem.bias", 8), parameter("a.weight", 8, 8, 3, 3)]
    parameters += [parameter("a.bias", 8), parameter("head.weight", 5, 8), parameter("head.bias", 5)]
    parameters += [parameter("shift", 1, 8, 1, 1), numpy_helper.from_array(np.array([0, -1], np.int64), "shape")]
    nodes = [
        helper.make_node("Conv", ["x", "stem.weight", "stem.bias"], ["s"], "stem", kernel_shape=[3, 3]),
        helper.make_node("Relu", ["s"], ["r"], "relu"),
        helper.make_node("Conv", ["r", "a.weight", "a.bias"], ["c"], "a", kernel_shape=[3, 3], pads=[1] * 4),
        helper.make_node("Add", ["r", "c"], ["sum"], "sum"),
        helper.make_node("Sub", ["sum", "shift"], ["shifted"], "shift"),
        helper.make_node("GlobalAveragePool", ["shifted"], ["pooled"], "pool"),
        helper.make_node("Reshape", ["pooled", "shape"], ["flat"], "flat"),
        helper.make_node("Gemm", ["flat", "head.weight", "head.bias"], ["y"], "head", transB=1),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in ENDS.items()]
    graph = helper.make_graph(nodes, "net", ends[:1], ends[1:], parameters)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, path)


class Calibration(ort.CalibrationDataReader):
    def __init__(self):
        self.batches = iter([{"x": X}])

    def get_next(self):
        return next(self.batches, None)


FORMS = {
    "per tensor": {},
    "per channel, uint8": {"per_channel": True, "weight_type": ort.QuantType.QUInt8},
    "int4": {"weight_type": ort.QuantType.QInt4},
    "uint4": {"per_channel": True, "weight_type": ort.QuantType.QUInt4},
    "int16 weights": {"weight_type": ort.QuantType.QInt16, "activation_type": ort.QuantType.QUInt16},
    "symmetric": {"activation_type": ort.QuantType.QInt8, "extra_options": {"ActivationSymmetric": True}},
    "asymmetric int8": {"extra_options": {"WeightSymmetric": False}},
    "weights in float": {"per_channel": True, "extra_options": {"AddQDQPairToWeight": True}},
    "biases in float": {"extra_options": {"QuantizeBias": False}},
    "quantizers of their own": {"extra_options": {"DedicatedQDQPair": True}},
    "contributed operators": {"activation_type": ort.QuantType.QUInt16, "extra_options": {"UseQDQContribOps": True}},
}


def quantize_static(path, seed, **options):
    types = {"weight_type": ort.QuantType.QInt8, "activation_type": ort.QuantType.QUInt8}
    options = {"quant_format": ort.QuantFormat.QDQ, **types, **options}
    float_model(path.with_suffix(".float"), seed)
    ort.quantize_static(path.with_suffix(".float"), path, Calibration(), **options)
    path.with_suffix(".float").unlink()
    return path


def merged(paths, folder, **options):
    """Two models, read, merged, and written like the first."""
    files = [folder / f"{k}.safetensors" for k in range(len(paths))]
    for path, file in zip(paths, files, strict=True):
        read_onnx(path, file)
    merge_files(files, folder / "m.safetensors", **options)
    write_like(folder / "m.safetensors", paths[0], folder / "merged.onnx")
    return folder / "merged.onnx"


# Graphs made by hand.

X4 = np.random.default_rng(3).normal(size=(16, 4)).astype(np.float32)
W4 = (4, 6)


def graph_of(path, nodes, constants, ends=None, opset=21, **facts):
    ends = {"x": ["n", 4], "y": ["n", "m"]} if ends is None else ends
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in ends.items()]
    held = [
        t if isinstance(t, TensorProto) else numpy_helper.from_array(np.asarray(t), n) for n, t in constants.items()
    ]
    graph = helper.make_graph(nodes, "net", values[:1], values[1:], held)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10, **facts)
    onnx.save(model, path)
    return path


def node(op, inputs, outputs, **attributes):
    return helper.make_node(op, inputs.split(), outputs.split(), outputs, **attributes)


def linear(path, seed=0, *, nodes=(), constants=(), drop=(), opset=21, **attributes):
    """A product of a per-channel int8 weight, between quantizers; some of it replaced or left out."""
    random = np.random.default_rng(seed)
    held = {
        "w": random.integers(-127, 128, (4, 6)).astype(np.int8),
        "w_scale": (random.random(6) * 0.01 + 0.01).astype(np.float32),
        "x_scale": np.float32(random.random() * 0.01 + 0.02),
        "x_zero": np.uint8(random.integers(100, 150)),
        **dict(constants),
    }
    graph = [
        node("QuantizeLinear", "x x_scale x_zero", "xq"),
        node("DequantizeLinear", "xq x_scale x_zero", "xd"),
        node("DequantizeLinear", "w w_scale", "wd", axis=1, **attributes),
        node("MatMul", "xd wd", "y"),
    ]
    replaced = {n.output[0] for n in nodes} | set(drop)
    graph = [*[n for n in graph if n.output[0] not in replaced], *nodes]
    order = {name: i for i, name in enumerate(["xq", "xc", "xd", "wq", "wt", "wd"])}
    return graph_of(path, sorted(graph, key=lambda n: order.get(n.output[0], 9)), held, opset=opset)


def round_trip(paths, tmp_path):
    """Both ways, and the merge's answers beside those of a graph whose weight is the mean of the two."""
    read_onnx(paths[0], tmp_path / "a.safetensors")
    write_like(tmp_path / "a.safetensors", paths[0], tmp_path / "again.onnx")
    assert onnx.load(tmp_path / "again.onnx").graph == onnx.load(paths[0]).graph
    result = merged(paths, tmp_path)
    onnx.checker.check_model(onnx.load(result), full_check=True)
    read_onnx(result, tmp_path / "again.safetensors")
    (want, left), (got, right) = tensors(tmp_path / "m.safetensors"), tensors(tmp_path / "again.safetensors")
    assert got["weights"] == want["weights"] and got["inputs"] == want["inputs"]
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
    return result, want, left


def external(path):
    model = onnx.load(path)
    target = path.with_name(f"external_{path.name}")
    onnx.save(model, target, save_as_external_data=True, location=f"{target.name}.bin", size_threshold=0)
    return target
