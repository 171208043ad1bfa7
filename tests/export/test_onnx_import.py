"""Quantized ONNX models in and out: the round trip changes nothing, and a merge is the mean of what was read."""

import json
import shutil
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import hdrq
from hdrq.checkpoint.format import Reader, packs
from hdrq.checkpoint.history import history as tell
from hdrq.merging.adding import add_file
from hdrq.merging.files import merge_files

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from onnxruntime import quantization as ort  # noqa: E402

from hdrq.export import read, read_onnx, to_onnx, write_like  # noqa: E402

X = np.random.default_rng(0).normal(size=(8, 3, 8, 8)).astype(np.float32)


@pytest.fixture(autouse=True)
def quiet(caplog):
    caplog.set_level("ERROR")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", (DeprecationWarning, FutureWarning, UserWarning))
        yield


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


ENDS = {"x": ["n", 3, 8, 8], "y": ["n", 5]}


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


@pytest.fixture(scope="module", params=FORMS)
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    return [quantize_static(folder / f"{seed}.onnx", seed, **FORMS[request.param]) for seed in (1, 2)]


def merged(paths, folder, **options):
    """Two models, read, merged, and written like the first."""
    files = [folder / f"{k}.safetensors" for k in range(len(paths))]
    for path, file in zip(paths, files, strict=True):
        read_onnx(path, file)
    merge_files(files, folder / "m.safetensors", **options)
    write_like(folder / "m.safetensors", paths[0], folder / "merged.onnx")
    return folder / "merged.onnx"


def test_the_round_trip_is_the_identity(pair, tmp_path):
    read_onnx(pair[0], tmp_path / "a.safetensors")
    write_like(tmp_path / "a.safetensors", pair[0], tmp_path / "again.onnx")
    assert onnx.load(tmp_path / "again.onnx").graph == onnx.load(pair[0]).graph
    assert np.array_equal(answers(tmp_path / "again.onnx"), answers(pair[0]))


def test_a_merge_of_equal_models_is_the_model(pair, tmp_path):
    assert onnx.load(merged([pair[0], pair[0]], tmp_path)).graph == onnx.load(pair[0]).graph


def test_models_merge_and_change_directly(pair, tmp_path):
    """Without files of hdrq between them, and with the same numbers."""
    through = merged(pair, tmp_path)
    merge_files(pair, tmp_path / "direct.onnx")
    assert onnx.load(tmp_path / "direct.onnx").graph == onnx.load(through).graph
    merge_files([pair[0], tmp_path / "1.safetensors"], tmp_path / "mixed.safetensors")
    one, two = (tensors(tmp_path / name)[1] for name in ("m.safetensors", "mixed.safetensors"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    with pytest.raises(
        ValueError, match=r"out must be a \.safetensors file where the first model is no ONNX file, got"
    ):
        merge_files([tmp_path / "0.safetensors", tmp_path / "1.safetensors"], tmp_path / "wrong.onnx")
    assert not (tmp_path / "wrong.onnx").exists()


def test_a_change_goes_into_the_graph(tmp_path):
    path = quantize_static(tmp_path / "a.onnx", 1)
    change = torch.full((8, 8, 3, 3), 0.02)
    add_file(path, {"a.weight": change}, tmp_path / "b.onnx", rule="nearest")
    (before, _, _), (after, step, _) = (
        _dequantized_weights(p)["a.weight_quantized"] for p in (path, tmp_path / "b.onnx")
    )
    assert np.abs(after - before - 0.02).max() <= step.max() / 2 + 1e-6


def test_weights_are_those_of_the_merge_op_and_the_mean_within_a_step(pair, tmp_path):
    """Step by step from the graphs, without the reader: codes, scales and zero points of the merged initializers."""
    merged(pair, tmp_path)
    graphs = [_dequantized_weights(path) for path in (*pair, tmp_path / "merged.onnx")]
    assert set(graphs[0]) == set(graphs[2]) and len(graphs[0]) >= 3
    for layer, (got, step, codes) in graphs[2].items():
        mean = (graphs[0][layer][0] + graphs[1][layer][0]) / 2
        assert np.allclose(step, (graphs[0][layer][1] + graphs[1][layer][1]) / 2, rtol=1e-6, atol=0)
        assert np.abs((got - mean) / step).max() <= (0.6 if codes is None else 1.11)  # zero points round too
        assert np.abs(got - graphs[0][layer][0]).max() > 0
    assert np.isfinite(answers(tmp_path / "merged.onnx", fused=True)).all()


def _dequantized_weights(path):
    """By hand: ``(codes − zero_point)·scale`` of every DequantizeLinear of an initializer, or of a rounded one."""
    model = onnx.load(path)
    constants = {t.name: t for t in model.graph.initializer}
    rounded = {n.output[0]: n.input[0] for n in model.graph.node if n.op_type == "QuantizeLinear"}
    found = {}
    for node in model.graph.node:
        name = rounded.get(node.input[0], node.input[0])
        if (
            node.op_type != "DequantizeLinear"
            or name not in constants
            or constants[name].data_type == TensorProto.INT32
        ):
            continue
        codes, scale, zero = (numpy_helper.to_array(constants[n]).astype(np.float64) for n in (name, *node.input[1:3]))
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
        shape = [-1 if i == axis and scale.size > 1 else 1 for i in range(codes.ndim)]
        scale, zero = scale.reshape(shape), zero.reshape(shape)
        if constants[name].data_type == TensorProto.FLOAT:
            codes = np.clip(np.rint(codes / scale), -128, 127) + zero
        found[name] = ((codes - zero) * scale, scale, None if not zero.any() else codes)
    return found


@pytest.mark.parametrize(
    ("form", "low", "lower"), [("per channel, uint8", -128, 128), ("uint4", -8, 8), ("asymmetric int8", -128, 0)]
)
def test_zero_points_of_any_type(form, low, lower, tmp_path):
    """Unsigned codes lie 2^(b−1) lower in a file; signed ones have zero points if any layer of the model has one."""
    path = quantize_static(tmp_path / "a.onnx", 1, **FORMS[form])
    manifest = read_onnx(path, tmp_path / "a.safetensors")
    constants, (_, stored) = arrays(path), tensors(tmp_path / "a.safetensors")
    for name, facts in manifest["weights"].items():
        codes, zero = (constants[f"{name}.weight_{part}"].astype(int) for part in ("quantized", "zero_point"))
        assert facts["range"] == [low, -low - 1] and facts["affine"]
        assert np.array_equal(stored[f"{name}.weight.zero_point"].numpy(), zero.reshape(-1) - lower) and zero.any()
        held = stored[f"{name}.weight.codes"]
        held = hdrq.ops.unpack(held, facts["shape"]) if packs(*facts["range"]) else held
        assert np.array_equal(held.numpy(), codes - lower)


def test_symmetric_weights_have_no_zero_points(tmp_path):
    manifest = read_onnx(quantize_static(tmp_path / "a.onnx", 1), tmp_path / "a.safetensors")
    assert manifest["weights"]["a"] == {"range": [-128, 127], "axis": None, "shape": [8, 8, 3, 3]}


def test_activations_merge_their_ranges_and_steps(tmp_path):
    paths = [quantize_static(tmp_path / f"{seed}.onnx", seed) for seed in (1, 2)]
    result = arrays(merged(paths, tmp_path, weights=[0.25, 0.75]))
    first, second = map(arrays, paths)
    names = [
        name.removesuffix("_zero_point") for name, value in first.items() if value.dtype == np.uint8 and not value.ndim
    ]
    assert len(names) == 7 and any(first[f"{name}_zero_point"] for name in names)
    for name in names:
        steps = [0.25 * np.float64(first[f"{name}_scale"]), 0.75 * np.float64(second[f"{name}_scale"])]
        assert np.isclose(result[f"{name}_scale"], sum(steps), rtol=1e-6)
        zeros = [float(file[f"{name}_zero_point"]) for file in (first, second)]
        assert result[f"{name}_zero_point"] == round(np.dot(steps, zeros) / sum(steps))


def test_biases_are_the_mean_in_steps_of_the_new_scales(tmp_path):
    paths = [quantize_static(tmp_path / f"{seed}.onnx", seed, per_channel=True) for seed in (1, 2)]
    first, second, result = map(arrays, (*paths, merged(paths, tmp_path)))
    for layer, before in (("stem", "x"), ("a", "r"), ("head", "pooled")):
        real = [
            f[f"{layer}.bias_quantized"] * f[f"{layer}.bias_quantized_scale"].astype(float) for f in (first, second)
        ]
        step = result[f"{layer}.bias_quantized_scale"]
        assert np.array_equal(step, result[f"{before}_scale"] * result[f"{layer}.weight_scale"])
        assert not np.array_equal(step, first[f"{layer}.bias_quantized_scale"])
        got = result[f"{layer}.bias_quantized"] * step.astype(float)
        assert np.abs((got - (real[0] + real[1]) / 2) / step).max() <= 0.5001


def test_a_bias_with_a_zero_point_and_steps_of_its_own_keeps_them(tmp_path):
    paths = []
    for seed in (1, 2):
        paths.append(quantize_static(tmp_path / f"{seed}.onnx", seed))
        model = onnx.load(paths[-1])
        step = next(t for t in model.graph.initializer if t.name == "a.bias_quantized_scale")
        step.CopyFrom(numpy_helper.from_array(np.array([1e-4 * seed], np.float32), step.name))
        zero = next(t for t in model.graph.initializer if t.name == "a.bias_quantized_zero_point")
        zero.CopyFrom(numpy_helper.from_array(np.array(500 * seed, np.int32), zero.name))
        onnx.save(model, paths[-1])
    first, second, result = map(arrays, (*paths, merged(paths, tmp_path)))
    assert result["a.bias_quantized_scale"] == np.float32(1e-4)
    mean = ((first["a.bias_quantized"] - 500) * 1e-4 + (second["a.bias_quantized"] - 1000) * 2e-4) / 2
    assert np.abs((result["a.bias_quantized"] - 500) * 1e-4 - mean).max() <= 0.5001e-4


def test_steps_of_a_bias_that_are_nearly_a_product_stay(tmp_path):
    path = quantize_static(tmp_path / "a.onnx", 1)
    model = onnx.load(path)
    step = next(t for t in model.graph.initializer if t.name == "a.bias_quantized_scale")
    near = np.nextafter(numpy_helper.to_array(step), np.float32(1))
    step.CopyFrom(numpy_helper.from_array(near, step.name))
    onnx.save(model, path)
    assert onnx.load(merged([path, path], tmp_path)).graph == onnx.load(path).graph


def test_a_bias_that_int32_cannot_hold_is_named(tmp_path):
    path = quantize_static(tmp_path / "a.onnx", 1)
    read_onnx(path, tmp_path / "a.safetensors")
    _rewrite(tmp_path / "a.safetensors", lambda values: values["a.bias"].mul_(1e9))
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"bias a.bias must fit int32 in steps of .*e-0\d, got"):
        write_like(tmp_path / "a.safetensors", path, path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 2


def _rewrite(path, change):
    """A file with other tensors."""
    from hdrq.checkpoint.format import Writer

    manifest, values = tensors(path)
    change(values)
    manifest.pop("sha256")
    with Writer(path, {n: (v.dtype, tuple(v.shape)) for n, v in values.items()}, manifest) as file:
        for name, value in values.items():
            file.write(name, value)


def test_floats_are_averaged_and_integers_stay(tmp_path):
    form = FORMS["biases in float"]
    paths = [quantize_static(tmp_path / f"{seed}.onnx", seed, **form) for seed in (1, 2)]
    first, second, result = map(arrays, (*paths, merged(paths, tmp_path)))
    assert np.allclose(result["a.bias"], (first["a.bias"] + second["a.bias"]) / 2, atol=1e-7)
    assert np.array_equal(result["shape"], [0, -1])


def test_a_merged_graph_runs_on_integer_kernels(tmp_path):
    paths = [quantize_static(tmp_path / f"{seed}.onnx", seed) for seed in (1, 2)]
    kinds = []
    for path in (paths[0], merged(paths, tmp_path)):
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "optimized.onnx"), 3
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        kinds.append(sorted(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node))
    assert kinds[0] == kinds[1] and kinds[0].count("QLinearConv") == 2 and "Conv" not in kinds[0]


# Our own files.


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x).relu()
        x = (x + self.b(self.a(x).relu())).relu()
        return self.head(x.mean((2, 3)))


def adapted(seed, bits, **options):
    model, x = Net().eval(), torch.from_numpy(X)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * parameter.std() * torch.randn_like(parameter))
    return hdrq.quantize(model, x, "rtn", bits=bits, progress=False, **options)


OURS = [
    ("W3A3", "onnxruntime", {"per_channel": True}),
    ("W4A8", "standard", {"affine_weights": True}),  # in types that differ between the two
    ({"stem": "W8A8", "*": "W4A8"}, "openvino", {"affine_weights": True, "group_size": 4}),
]


@pytest.mark.parametrize(("bits", "runtime", "options"), OURS)
def test_files_of_ours_have_the_codes_that_hdrq_had(bits, runtime, options, tmp_path):
    """Shifts, zero points and transposition are undone, so a merge of them is that of hdrq's own files, to the bit."""
    models = [adapted(seed, bits, **options) for seed in (1, 2)]
    for k, model in enumerate(models):
        hdrq.save(model, tmp_path / f"{k}.safetensors")
        data = torch.from_numpy(X) if runtime == "onnxruntime" else None
        to_onnx(model, torch.from_numpy(X), tmp_path / f"{k}.onnx", runtime=runtime, data=data, allow_float=True)
        read_onnx(tmp_path / f"{k}.onnx", tmp_path / f"{k}.read")
        assert _agree(tmp_path / f"{k}.safetensors", tmp_path / f"{k}.read") == 4
        write_like(tmp_path / f"{k}.read", tmp_path / f"{k}.onnx", tmp_path / "again.onnx")
        assert onnx.load(tmp_path / "again.onnx").graph == onnx.load(tmp_path / f"{k}.onnx").graph
    kinds = [{t.name: t.data_type for t in onnx.load(tmp_path / f"{k}.onnx").graph.initializer} for k in range(2)]
    assert (kinds[0] == kinds[1]) == (runtime != "standard")
    merge_files([tmp_path / "0.safetensors", tmp_path / "1.safetensors"], tmp_path / "m.safetensors")
    merge_files([tmp_path / "0.read", tmp_path / "1.read"], tmp_path / "m.read")
    assert _agree(tmp_path / "m.safetensors", tmp_path / "m.read") == 4
    model = hdrq.load(tmp_path / "m.safetensors", Net().eval())
    for k in range(2):  # codes may need another type than the graph's own had
        write_like(tmp_path / "m.read", tmp_path / f"{k}.onnx", tmp_path / "m.onnx")
        onnx.checker.check_model(onnx.load(tmp_path / "m.onnx"), full_check=True)
        if runtime != "onnxruntime":  # whose outputs have quantizers that the model has not
            with torch.no_grad():
                np.testing.assert_allclose(answers(tmp_path / "m.onnx"), model(torch.from_numpy(X)).numpy(), atol=2e-6)
        read_onnx(tmp_path / "m.onnx", tmp_path / "again.read")
        assert _agree(tmp_path / "m.read", tmp_path / "again.read") == 4


def _agree(these, those):
    """How many weights two files have, which are equal in all that quantizers have."""
    (one, left), (two, right) = tensors(these), tensors(those)
    assert one["weights"] == two["weights"] and one["inputs"].items() <= two["inputs"].items()
    names = [f"{n}.weight.{part}" for n in one["weights"] for part in ("codes", "scale", "zero_point")]
    names += [f"{n}.input.scale" for n in one["inputs"]]
    assert all(torch.equal(left[name], right[name]) for name in names if name in left)
    return len(one["weights"])


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = tmp_path_factory.mktemp("ours") / "a.onnx"
        to_onnx(adapted(1, "W4A4", per_channel=True), torch.from_numpy(X), path)
    return path


def test_files_of_ours_without_their_metadata_have_the_same_values(ours, tmp_path):
    shutil.copy(ours, tmp_path / "a.onnx")
    plain = onnx.load(ours)
    del plain.metadata_props[:]
    onnx.save(plain, tmp_path / "plain.onnx")
    for name in ("a", "plain"):
        read_onnx(tmp_path / f"{name}.onnx", tmp_path / f"{name}.safetensors")
    (own, left), (foreign, right) = (tensors(tmp_path / f"{name}.safetensors") for name in ("a", "plain"))
    assert own["weights"]["a"]["range"] == [-8, 7] and foreign["weights"]["a"]["range"] == [-128, 127]
    codes = hdrq.ops.unpack(left["a.weight.codes"], (8, 8, 3, 3))
    values = [
        hdrq.ops.dequantize(c, t["a.weight.scale"], axis=0)
        for c, t in ((codes, left), (right["a.weight.codes"], right))
    ]
    assert torch.equal(*values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shift": 9}, r"shift of a.weight.codes must be in \[0, 7\], got 9"),
        ({"range": [-2, 1]}, r"codes a.weight.codes must be in \[-2, 1\], got"),
        ({"shift": 5}, "codes of a must be as metadata hdrq.weights says, got others in a.weight.codes"),
        (
            {"layer": 3},
            "metadata hdrq.weights must have layer, range, shift, turned, zero_point of a.weight.codes, got",
        ),
        ({"turned": True}, r"a.weight.codes must be a matrix to be turned, got the shape \(8, 8, 3, 3\)"),
        ({"zero_point": [1, 2]}, "codes of a must be as metadata"),
        ({"zero_point": [9] * 8}, r"zero point of a.weight.codes must be in \[-8, 7\], got 9"),
        ({"layer": "b"}, "codes of b must be the same in"),
    ],
)
def test_metadata_that_lies_is_refused(change, message, ours, tmp_path):
    model = onnx.load(ours)
    facts = {entry.key: entry.value for entry in model.metadata_props}
    table = json.loads(facts["hdrq.weights"])
    table["a.weight.codes"].update(change)
    helper.set_model_props(model, {**facts, "hdrq.weights": json.dumps(table)})
    onnx.save(model, tmp_path / "a.onnx")
    with pytest.raises(ValueError, match=rf"a\.onnx: {message}"):
        read_onnx(tmp_path / "a.onnx", tmp_path / "a.safetensors")


# Graphs made by hand.


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


X4 = np.random.default_rng(3).normal(size=(16, 4)).astype(np.float32)


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


def test_weights_alone(tmp_path):
    paths = [linear(tmp_path / f"{k}.onnx", k, nodes=[node("MatMul", "x wd", "y")], drop=["xq", "xd"]) for k in (1, 2)]
    _, manifest, _ = round_trip(paths, tmp_path)
    assert manifest["inputs"] == {} and manifest["weights"]["w"] == {"range": [-128, 127], "axis": 1, "shape": [4, 6]}


@pytest.mark.parametrize("axis", [0, 1])
def test_blocks_are_groups_along_the_last_axis(axis, tmp_path):
    paths = []
    for k in (1, 2):
        random = np.random.default_rng(k)
        shape = (2, 6) if axis == 0 else (4, 3)
        held = {
            "w": helper.make_tensor("w", TensorProto.UINT4, (4, 6), random.integers(0, 16, 24)),
            "w_scale": (random.random(shape) * 0.1 + 0.1).astype(np.float32),
            "w_zero": helper.make_tensor("w_zero", TensorProto.UINT4, shape, random.integers(4, 12, 4 * 6 // 2)),
        }
        weight = node("DequantizeLinear", "w w_scale w_zero", "wd", axis=axis, block_size=2)
        nodes = [weight, node("MatMul", "x wd", "y")]
        paths.append(linear(tmp_path / f"{k}.onnx", k, nodes=nodes, constants=held, drop=["xq", "xd"]))
    result, manifest, left = round_trip(paths, tmp_path)
    shape = [6, 4] if axis == 0 else [4, 6]
    facts = {"range": [-8, 7], "axis": None, "shape": shape, "affine": True, "group_size": 2}
    assert manifest["weights"]["w"] == facts
    codes = hdrq.ops.unpack(left["w.weight.codes"], shape)
    values = hdrq.ops.dequantize(
        codes, left["w.weight.scale"], zero_point=left["w.weight.zero_point"].float(), group_size=2
    ).numpy()
    want = X4 @ (values.T if axis == 0 else values)
    np.testing.assert_allclose(answers(result, x=X4), want, atol=1e-5)


@pytest.mark.parametrize("rounded", [False, True])
def test_weights_with_negative_scales(rounded, tmp_path):
    """Block quantizers of ONNX Runtime make the greatest magnitude −8, whatever its sign."""
    paths = []
    for k in (1, 2):
        random = np.random.default_rng(k)
        held = {"w_scale": ((random.random(6) * 0.01 + 0.01) * [1, -1, 1, -1, 1, (-1) ** k]).astype(np.float32)}
        nodes = []
        if rounded:
            held |= {"w": random.normal(size=W4).astype(np.float32), "w_zero": np.zeros(6, np.int8)}
            nodes = [node("QuantizeLinear", "w w_scale w_zero", "wq", axis=1)]
            nodes += [node("DequantizeLinear", "wq w_scale w_zero", "wd", axis=1)]
        paths.append(linear(tmp_path / f"{k}.onnx", k, nodes=nodes, constants=held))
    result, manifest, left = round_trip(paths, tmp_path)
    assert manifest["weights"]["w"]["affine"] and left["w.weight.scale"].min() > 0
    options = {"zero_point": left["w.weight.zero_point"].float(), "axis": 1}
    values = hdrq.ops.dequantize(left["w.weight.codes"], left["w.weight.scale"], **options).numpy()
    np.testing.assert_allclose(_weight_of(result), values, atol=1e-7)
    steps = left["w.weight.scale"].numpy()
    mean = (_weight_of(paths[0]) + _weight_of(paths[1])) / 2
    assert np.abs((values - mean) / steps).max() <= 0.61
    assert np.sign(arrays(result)["w_scale"]).tolist() == np.sign(arrays(paths[0])["w_scale"]).tolist()


def _weight_of(path):
    """The weight that ONNX Runtime dequantizes."""
    model = onnx.load(path)
    model.graph.output.append(helper.make_tensor_value_info("wd", TensorProto.FLOAT, W4))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(["wd"], {"x": X4})[0]


def test_constants_of_nodes_and_aliases(tmp_path):
    paths = []
    for k in (1, 2):
        held = np.random.default_rng(k)
        step = numpy_helper.from_array(np.float32(held.random() * 0.01 + 0.02), "s")
        nodes = [
            helper.make_node("Constant", [], ["x_scale"], value=step),
            helper.make_node("Identity", ["w_scale"], ["alias"]),
            node("DequantizeLinear", "w alias", "wd", axis=1),
        ]
        path = linear(tmp_path / f"{k}.onnx", k, nodes=nodes)
        model = onnx.load(path)
        kept = [t for t in model.graph.initializer if t.name != "x_scale"]
        ordered = sorted(model.graph.node, key=lambda n: n.op_type not in ("Constant", "Identity"))
        del model.graph.initializer[:], model.graph.node[:]
        model.graph.initializer.extend(kept)
        model.graph.node.extend(ordered)
        onnx.save(model, path)
        paths.append(path)
    _, manifest, left = round_trip(paths, tmp_path)
    assert list(manifest["inputs"]) == ["x"] and "x_scale" not in left and "w_scale" not in left


def test_one_constant_of_two_quantizers_becomes_two_where_they_differ(tmp_path):
    """Exporters merge equal constants: zero points of 0, say; a merge moves one of them."""
    paths = []
    for k, (first, second) in enumerate([(0.02, 0.03), (0.04, 0.01)]):
        held = {"x_scale": np.float32(first), "z_scale": np.float32(second), "x_zero": np.uint8(100 + 40 * k)}
        nodes = [
            node("MatMul", "xd wd", "z"),
            node("QuantizeLinear", "z z_scale x_zero", "zq"),
            node("DequantizeLinear", "zq z_scale x_zero", "y"),
        ]
        paths.append(linear(tmp_path / f"{k}.onnx", k, nodes=nodes, constants=held))
    result, manifest, _ = round_trip(paths, tmp_path)
    assert manifest["inputs"] == {"x": [-127, 128], "z": [-110, 145]}
    constants = arrays(result)
    assert (constants["x_zero"], constants["x_zero.1"]) == (127, 110)


@pytest.mark.parametrize(("low", "zeros", "merged_zero"), [(0, (3, 0), 1), (10, (13, 10), 11), (None, (3, 0), 1)])
def test_ranges_that_a_clip_narrows(low, zeros, merged_zero, tmp_path):
    """Its bounds stay and the zero point moves; a Clip without a lower bound gets none that it does not need."""
    paths = []
    for k, zero in enumerate(zeros):
        held = {"x_scale": np.float32(0.1 + 0.2 * k), "x_zero": np.uint8(zero)}
        held |= {"low": np.uint8(low or 0), "high": np.uint8((low or 0) + 7)}
        clip = helper.make_node("Clip", ["xq", "" if low is None else "low", "high"], ["xc"])
        nodes = [clip, node("DequantizeLinear", "xc x_scale x_zero", "xd")]
        paths.append(linear(tmp_path / f"{k}.onnx", k, nodes=nodes, constants=held))
    result, manifest, _ = round_trip(paths, tmp_path)
    assert manifest["inputs"] == {"x": [-1, 6]} and arrays(result)["x_zero"] == merged_zero


def test_a_constant_that_others_read_too_stays_for_them(tmp_path):
    """A type that no tensor of a file has is part of the graph, though the zero point that it is may move."""
    paths = []
    for k, scale in enumerate((0.02, 0.1)):
        held = {"w": helper.make_tensor("w", TensorProto.UINT4, W4, np.random.default_rng(k).integers(0, 16, 24))}
        held |= {"w_zero": helper.make_tensor("w_zero", TensorProto.UINT4, (6,), [3, 4, 5, 6, 7, 8])}
        held |= {"w_scale": np.full(6, scale, np.float32)}
        nodes = [node("DequantizeLinear", "w w_scale w_zero", "wd", axis=1)]
        nodes += [node("MatMul", "xd wd", "y1"), node("Cast", "w_zero", "wz", to=1), node("Add", "y1 wz", "y")]
        paths.append(linear(tmp_path / f"{k}.onnx", k, nodes=nodes, constants=held))
    round_trip(paths, tmp_path)
    constants = arrays(merged(paths, tmp_path, rule="requantize"))
    assert constants["w_zero"].astype(int).tolist() == [3, 4, 5, 6, 7, 8]
    assert constants["w_zero.1"].astype(int).tolist() != [3, 4, 5, 6, 7, 8]


def test_a_range_without_zero_point_has_none_after_the_merge(tmp_path):
    """As TensorRT asks for it: int8, whose Clip moves."""
    paths = []
    for k, low in enumerate((-8, -4)):
        held = {"x_scale": np.float32(0.1), "x_zero": np.int8(0), "low": np.int8(low), "high": np.int8(low + 15)}
        nodes = [node("Clip", "xq low high", "xc"), node("DequantizeLinear", "xc x_scale x_zero", "xd")]
        paths.append(linear(tmp_path / f"{k}.onnx", k, nodes=nodes, constants=held))
    constants = arrays(round_trip(paths, tmp_path)[0])
    assert [int(constants[name]) for name in ("x_zero", "low", "high")] == [0, -6, 9]


def test_a_weight_that_is_read_twice_is_stored_once(tmp_path):
    nodes = [
        node("DequantizeLinear", "w w_scale", "wd2", axis=1),
        node("MatMul", "xd wd", "y1"),
        node("MatMul", "xd wd2", "y2"),
        node("Add", "y1 y2", "y"),
    ]
    paths = [linear(tmp_path / f"{k}.onnx", k, nodes=nodes) for k in (1, 2)]
    _, manifest, _ = round_trip(paths, tmp_path)
    assert list(manifest["weights"]) == ["w"]


def test_what_is_not_finite_is_structure_and_a_mask_is_not(tmp_path):
    held = {"mask": np.array([0, 0, 0, 0, 0, -np.inf], np.float32), "top": np.float32(np.inf)}
    held |= {"word": np.array(["a"], object), "unread": np.random.default_rng().random(3)}
    nodes = [
        node("MatMul", "xd wd", "y1"),
        helper.make_node("Clip", ["y1", "", "top"], ["y2"]),
        node("Add", "y2 mask", "y"),
        node("Size", "word", "count"),
    ]
    paths = [linear(tmp_path / f"{k}.onnx", k, nodes=nodes, constants=held) for k in (1, 2)]
    _, _, left = round_trip(paths, tmp_path)
    assert "mask" in left and not {"top", "word", "unread"} & left.keys()
    other = linear(tmp_path / "3.onnx", 3, nodes=nodes, constants={**held, "word": np.array(["b"], object)})
    with pytest.raises(ValueError, match=r"models must be alike to be merged, got onnx\.constants \(other integers"):
        merged([paths[0], other], tmp_path)


def test_scales_of_float16_stay_so(tmp_path):
    held = {"w_scale": np.linspace(0.01, 0.02, 6).astype(np.float16)}
    nodes = [node("Cast", "wd", "wf", to=TensorProto.FLOAT), node("MatMul", "xd wf", "y")]
    paths = [linear(tmp_path / f"{k}.onnx", k, nodes=nodes, constants=held) for k in (1, 2)]
    result, _, _ = round_trip(paths, tmp_path)
    assert arrays(result)["w_scale"].dtype == np.float16


def external(path):
    model = onnx.load(path)
    target = path.with_name(f"external_{path.name}")
    onnx.save(model, target, save_as_external_data=True, location=f"{target.name}.bin", size_threshold=0)
    return target


def test_external_data(pair, tmp_path):
    paths = [shutil.copy(path, tmp_path / path.name) for path in pair]
    apart = [external(path) for path in paths]
    manifest = read_onnx(apart[0], tmp_path / "a.safetensors")
    assert list(manifest["origin"]["data"]) == [f"{apart[0].name}.bin"]
    write_like(tmp_path / "a.safetensors", apart[0], tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx.data").exists()
    (tmp_path / "apart").mkdir()
    for one, two in ((paths[0], tmp_path / "again.onnx"), (merged(paths, tmp_path), merged(apart, tmp_path / "apart"))):
        one, two = arrays(one), arrays(two)
        assert one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)


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


# What is refused.


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
W4 = (4, 6)
TWICE = [
    node("DequantizeLinear", "w w_scale2", "wd2", axis=1),
    node("MatMul", "xd wd2", "y1"),
    node("Add", "y1 y0", "y"),
]
LOW_HIGH = {"low": np.uint8(0), "high": np.uint8(7), "seven": np.uint8(9)}
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
    "the name of a safetensors header": (
        {
            "nodes": [node("MatMul", "xd wd", "y1"), node("Add", "y1 __metadata__", "y")],
            "constants": {"__metadata__": np.float32(1)},
        },
        "constants must not have the names of quantizers' tensors, got __metadata__",
    ),
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
    "a tensor's name": (
        {
            "nodes": [node("MatMul", "xd wd", "y1"), node("Add", "y1 x.input.scale", "y")],
            "constants": {"x.input.scale": np.float32(1)},
        },
        "constants must not have the names of quantizers' tensors, got x.input.scale",
    ),
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


def test_graphs_inside_nodes_must_agree_and_are_kept(tmp_path):
    """Constants that only they read are merged with the rest; constants inside them are structure."""

    def branch(value):
        held = [numpy_helper.from_array(np.float32(value), "inner")]
        nodes = [helper.make_node("Mul", ["y1", "outer"], ["z1"]), helper.make_node("Add", ["z1", "inner"], ["z"])]
        out = helper.make_tensor_value_info("z", TensorProto.FLOAT, ["n", 6])
        return helper.make_graph(nodes, "branch", [], [out], held)

    def model(k, inner):
        held = {"flag": np.array(True), "outer": np.float32(k)}
        nodes = [
            node("MatMul", "xd wd", "y1"),
            helper.make_node("If", ["flag"], ["y"], then_branch=branch(inner), else_branch=branch(0)),
        ]
        return linear(tmp_path / f"{k}{inner}.onnx", k, nodes=nodes, constants=held)

    result, _, left = round_trip([model(1, 5), model(2, 5)], tmp_path)
    assert left["outer"] == 1.5 and arrays(result)["outer"] == 1.5
    with pytest.raises(ValueError, match=r"onnx\.nodes\.If \(other integers"):
        merged([model(1, 5), model(2, 6)], tmp_path)


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


def test_the_file_says_where_it_comes_from(tmp_path):
    import hashlib

    paths = [quantize_static(tmp_path / f"{seed}.onnx", seed) for seed in (1, 2)]
    result = merged(paths, tmp_path, weights=[0.75, 0.25])
    facts = {entry.key: entry.value for entry in onnx.load(result).metadata_props}
    history = json.loads(facts["hdrq.origin"])
    assert facts["hdrq"] == hdrq.__version__ and history["merge"]["weights"] == [0.75, 0.25]
    assert [m["origin"]["sha256"] for m in history["models"]] == [
        hashlib.sha256(p.read_bytes()).hexdigest() for p in paths
    ]
    manifest = read_onnx(result, tmp_path / "again.safetensors")
    origin = manifest["origin"]
    assert (origin["kind"], origin["producer"], origin["opset"]) == ("onnx", "onnx.quantize 0.1.0", {"ai.onnx": 21})
    assert manifest["parent"] == history
    told = list(tell(manifest).lines())
    assert [line.strip().partition(":")[0] for line in told] == ["read", "merged", "read", "read"]


def test_the_commands(tmp_path, monkeypatch):
    app, testing = pytest.importorskip("hdrq.cli").app, pytest.importorskip("typer.testing")
    monkeypatch.chdir(tmp_path)
    for seed, name in ((1, "a"), (2, "b")):
        quantize_static(tmp_path / f"{name}.onnx", seed)

    def call(line):
        return testing.CliRunner().invoke(app, line.split())

    for line in (
        "import a.onnx -o a.safetensors",
        "import b.onnx -o b.safetensors",
        "merge a.safetensors b.safetensors -o m.safetensors",
        "export m.safetensors --like a.onnx -o merged.onnx",
    ):
        result = call(line)
        assert result.exit_code == 0, result.output
    assert "merged.onnx: m.safetensors in the form of a.onnx" in result.stdout
    assert np.isfinite(answers(tmp_path / "merged.onnx", fused=True)).all()
    assert (
        "a.safetensors: 3 quantized weights, 7 quantizers of activations, from a.onnx"
        in call("import a.onnx -o a.safetensors").stdout
    )
    assert call("inspect m.safetensors").exit_code == 0
    result = call("export m.safetensors -o other.onnx")
    assert result.exit_code == 2
    assert "must be given, or --like with what the file was imported from" in result.output
    result = call("export a.safetensors --like m.safetensors -o other.onnx")
    assert result.exit_code == 2 and "template must be an ONNX model (.onnx)" in result.output
