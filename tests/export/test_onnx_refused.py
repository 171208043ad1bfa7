"""ONNX files that cannot be read or merged are refused by name, and nothing is written."""

import numpy as np
import pytest
from export.onnx_models import (
    W4,
    arrays,
    external,
    linear,
    merged,
    node,
    onnx,
    quantize_static,
)
from onnx import TensorProto, helper

from hdrq.export import read, read_onnx, write_like
from hdrq.merging.files import merge_files

pytestmark = pytest.mark.usefixtures("quiet")


def _outside(tensor):
    tensor.external_data[0].value = "../secret.bin"


def _beyond(tensor):
    tensor.external_data.add(key="length", value=str(10**9))


def _larger(tensor):
    tensor.dims[0] = 2**40


@pytest.mark.parametrize(
    ("spoil", "message"), [(_outside, "external data must lie in files beside the model"), (_beyond, ""), (_larger, "")]
)
def test_external_data_must_be_there_and_beside_the_model(spoil, message, tmp_path):
    (tmp_path / "folder").mkdir()
    path = external(linear(tmp_path / "folder" / "a.onnx"))
    (tmp_path / "secret.bin").write_bytes(bytes(1000))
    model = onnx.load(path, load_external_data=False)
    spoil(next(t for t in model.graph.initializer if t.name == "w"))
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ValueError, match=rf"external_a\.onnx: {message}"):
        read_onnx(path, tmp_path / "a.safetensors")
    assert not (tmp_path / "a.safetensors").exists()


def test_files_that_are_cut_or_altered_are_named(tmp_path):
    """Every cut, and bytes changed anywhere: the file is read or refused by name, and nothing else happens."""
    data = quantize_static(tmp_path / "whole.onnx", 1).read_bytes()
    random, path, refused = np.random.default_rng(0), tmp_path / "a.onnx", 0
    spoiled = [data[:size] for size in range(0, len(data), len(data) // 60)]
    for _ in range(150):
        changed = bytearray(data)
        for place in random.integers(0, len(data), random.integers(1, 8)):
            changed[place] = random.integers(256)
        spoiled.append(bytes(changed))
    for each in spoiled:
        path.write_bytes(each)
        try:
            read_onnx(path, tmp_path / "a.safetensors")
        except ValueError as error:
            assert str(error).startswith(f"{path}: ") and not (tmp_path / "a.safetensors").exists()
            refused += 1
        else:
            (tmp_path / "a.safetensors").unlink()
    assert refused > 60
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.onnx", "whole.onnx"]


def tensor(name, kind, shape):
    return helper.make_tensor(name, kind, shape, np.zeros(int(np.prod(shape))))


FLOAT8 = TensorProto.FLOAT8E4M3FN
TWICE = [
    node("DequantizeLinear", "w w_scale2", "wd2", axis=1),
    node("MatMul", "xd wd2", "y1"),
    node("Add", "y1 y0", "y"),
]
LOW_HIGH = {"low": np.uint8(0), "high": np.uint8(7), "seven": np.uint8(9)}


def with_constant_called(name):
    """A graph that adds a constant of this name, which files keep for other tensors; and the message."""
    nodes = [node("MatMul", "xd wd", "y1"), node("Add", f"y1 {name}", "y")]
    message = f"constants must not have the names of quantizers' tensors, got {name}"
    return {"nodes": nodes, "constants": {name: np.float32(1)}}, message


REFUSED = {
    "codes that are read in two ways": (
        {"nodes": [node("MatMul", "xd wd", "y0"), *TWICE], "constants": {"w_scale2": np.full(6, 0.1, np.float32)}},
        "w must be quantized in one way, got another for DequantizeLinear wd2",
    ),
    "a clip for some": (
        {
            "nodes": [node("Clip", "xq low high", "xc"), node("DequantizeLinear", "xc x_scale x_zero", "xd2")],
            "constants": LOW_HIGH,
        },
        "integers of QuantizeLinear xq must be clipped for all who read them, got Clip for some",
    ),
    "two clips": (
        {
            "nodes": [
                node("Clip", "xq low high", "xc"),
                node("Clip", "xq low seven", "xc2"),
                node("DequantizeLinear", "xc x_scale x_zero", "xd"),
            ],
            "constants": LOW_HIGH,
        },
        "quantizers with the scale x_scale must have one range, got .*",
    ),
    "zero points of another shape": (
        {"nodes": [node("DequantizeLinear", "w w_scale w_zero", "wd", axis=1)], "constants": {"w_zero": np.int8(0)}},
        r"scale and zero point of w must have the shape \(6,\), got \(6,\)",
    ),
    "zero points of another type": (
        {
            "nodes": [node("DequantizeLinear", "w w_scale w_zero", "wd", axis=1)],
            "constants": {"w_zero": np.zeros(6, np.uint8)},
        },
        "zero point of w must be INT8, got UINT8",
    ),
    "the name of a safetensors header": with_constant_called("__metadata__"),
    "a shape that is not its own": (
        {"constants": {"w": TensorProto(name="w", data_type=3, dims=[-1, 6], raw_data=bytes(24))}},
        r"w must have sides in \[0, 281474976710656\), got the shape \(-1, 6\)",
    ),
    "more elements than bytes": (
        {"constants": {"w": TensorProto(name="w", data_type=3, dims=[2**40, 6], raw_data=bytes(24))}},
        "cannot reshape array of size 24",
    ),
    "QOperator": (
        {"nodes": [node("QLinearMatMul", "xq x_scale x_zero w w_scale w x_scale x_zero", "y")]},
        r"products must lie between DequantizeLinear and QuantizeLinear, got QLinearMatMul y: quantize_",
    ),
    "dynamic": (
        {"nodes": [node("DynamicQuantizeLinear", "x", "xq s z"), node("DequantizeLinear", "xq s z", "xd")]},
        "quantization must be static, got DynamicQuantizeLinear xq s z: its scales come with each input",
    ),
    "computed scale": (
        {"nodes": [node("ReduceMax", "x", "s"), node("QuantizeLinear", "x s x_zero", "xq")]},
        "scale and zero point must be constants, got others for QuantizeLinear xq: dynamic quantization has none",
    ),
    "blocks of their own": (
        {"nodes": [node("MatMulNBits", "x w w_scale", "y", domain="com.microsoft")]},
        "weights must be read by DequantizeLinear, got MatMulNBits y: .* quant_format=QuantFormat.QDQ",
    ),
    "fp8 weights": (
        {"constants": {"w": tensor("w", FLOAT8, W4)}},
        "quantizers must be of UINT4, INT4, UINT8, INT8, UINT16, INT16, got FLOAT8E4M3FN for DequantizeLinear wd",
    ),
    "fp8 activations": (
        {"constants": {"x_zero": tensor("x_zero", FLOAT8, ())}},
        "quantizers must be of .*, got FLOAT8E4M3FN for QuantizeLinear xq",
    ),
    "int2": (
        {"constants": {"w": tensor("w", TensorProto.INT2, W4)}},
        "quantizers must be of .*, got INT2 for DequantizeLinear wd",
    ),
    "nothing quantized": (
        {"nodes": [node("MatMul", "x x", "y")], "drop": ["xq", "xd", "wd"]},
        "weights must be integers that DequantizeLinear reads, got none; onnxruntime.quantization.quantize_static",
    ),
    "activations per channel": (
        {"constants": {"x_scale": np.full(4, 0.1, np.float32), "x_zero": np.zeros(4, np.uint8)}},
        r"activations must have one scale, got \(4,\) for QuantizeLinear xq",
    ),
    "a weight that nodes compute": (
        {"nodes": [node("Transpose", "w", "wt"), node("DequantizeLinear", "wt w_scale", "wd", axis=0)]},
        "weights must be initializers that DequantizeLinear reads, got one that nodes compute for DequantizeLinear wd",
    ),
    "scales of another shape": (
        {"constants": {"w_scale": np.full(5, 0.1, np.float32)}},
        r"scale and zero point of w must have the shape \(6,\), got \(5,\)",
    ),
    "a scale of 0": (
        {"constants": {"w_scale": np.zeros(6, np.float32)}},
        r"scale w_scale must be finite and not 0, got 0\.0",
    ),
    "a negative scale of activations": (
        {"constants": {"x_scale": np.float32(-0.1)}},
        r"scale x_scale must be finite and positive, got -0\.1",
    ),
    "blocks that do not divide": (
        {"nodes": [node("DequantizeLinear", "w w_scale", "wd", axis=0, block_size=3)]},
        r"block_size must divide axis 0 of w, got 3 for the shape \(4, 6\)",
    ),
    "codes that something else reads": (
        {"nodes": [node("Cast", "w", "wf", to=1)]},
        "w must be read by its quantizer alone, got others that read it as it is",
    ),
    "a tensor's name": with_constant_called("x.input.scale"),
    "an axis that there is not": (
        {"nodes": [node("DequantizeLinear", "w w_scale", "wd", axis=2)]},
        r"axis of DequantizeLinear wd must be in \[-2, 1\], got 2",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input(case, tmp_path):
    change, message = REFUSED[case]
    path = linear(tmp_path / "a.onnx", **change)
    with pytest.raises(ValueError, match=rf"a\.onnx: {message}"):
        read_onnx(path, tmp_path / "a.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["a.onnx"]


def test_what_is_no_file_and_what_is_no_model(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"x")
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none.onnx", tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"path must be .*an ONNX model \(\.onnx\).*, got"):
        read(tmp_path / "a.bin", tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"path must be an ONNX file, got .*, a folder"):
        read_onnx(tmp_path, tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"nodes": [node("MatMul", "xd wd", "y1"), node("Relu", "y1", "y")]},
            r"onnx.nodes.Relu \(missing in the first",
        ),
        ({"opset": 23}, r"onnx.opset \(other integers"),
        ({"nodes": [node("MatMul", "wd xd", "y")]}, r"onnx.nodes.MatMul \(other integers"),
        ({"constants": {"w_scale": np.float32(0.1)}}, r"w.weight.scale \(\(6,\) torch.float32 in the first, \(1,\)"),
    ],
)
def test_models_of_other_graphs_are_refused(change, message, tmp_path):
    paths = [linear(tmp_path / "a.onnx"), linear(tmp_path / "b.onnx", **change)]
    with pytest.raises(ValueError, match=f"models must be alike to be merged, got .*{message}"):
        merged(paths, tmp_path)
    read_onnx(paths[0], tmp_path / "a.safetensors")
    with pytest.raises(
        ValueError, match=r"file must be what was imported from .*b\.onnx, or a merge of such files, got"
    ):
        write_like(tmp_path / "a.safetensors", paths[1], tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


def test_inputs_of_another_type_are_another_graph(tmp_path):
    paths = [linear(tmp_path / f"{k}.onnx", k) for k in (1, 2)]
    model = onnx.load(paths[1])
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.DOUBLE
    onnx.save(model, paths[1])
    with pytest.raises(ValueError, match=r"got onnx\.graph \(other integers in"):
        merged(paths, tmp_path)


def test_integers_must_agree(tmp_path):
    nodes = [node("MatMul", "xd wd", "y1"), node("Gather", "y1 places", "y", axis=1)]
    paths = [
        linear(tmp_path / f"{k}.onnx", k, nodes=nodes, constants={"places": np.array([0, k], np.int64)}) for k in (1, 2)
    ]
    with pytest.raises(ValueError, match=r"models must be alike to be merged, got places \(other integers in"):
        merged(paths, tmp_path)
    with pytest.raises(ValueError, match=r"with another places \(other integers\)"):
        write_like(tmp_path / "0.safetensors", paths[1], tmp_path / "out.onnx")


def test_integers_of_more_bits_than_the_graph_has_are_refused(tmp_path):
    def of(kind, k, largest):
        held = {"w": helper.make_tensor("w", kind, W4, np.random.default_rng(k).integers(-largest, largest, 24))}
        return linear(tmp_path / f"{k}.onnx", k, constants=held)

    paths = [of(TensorProto.INT4, 1, 8), of(TensorProto.INT8, 2, 128)]
    with pytest.raises(ValueError, match="bits says what the result has where models differ"):
        merged(paths, tmp_path)
    for path in paths:
        merge_files([tmp_path / "0.safetensors", tmp_path / "1.safetensors"], tmp_path / "m.safetensors", bits="W8A8")
        if path == paths[0]:
            with pytest.raises(ValueError, match=r"codes of w must fit INT4, got \[.*\]; take a model of more bits"):
                write_like(tmp_path / "m.safetensors", path, tmp_path / "out.onnx")
        else:
            write_like(tmp_path / "m.safetensors", path, tmp_path / "out.onnx")
    assert arrays(tmp_path / "out.onnx")["w"].dtype == np.int8
