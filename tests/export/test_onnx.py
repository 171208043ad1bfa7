"""Exported ONNX files: checked graphs, hdrq's integers, and integer kernels in the runtimes."""

import json
import warnings

import numpy as np
import pytest
import torch
from architectures import MODELS, built
from export.onnx_models import Net
from torch import nn

import hdrq

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
from hdrq.calibrate.data import calibration_calls  # noqa: E402
from hdrq.export import check, to_onnx  # noqa: E402
from hdrq.export.lowering import weight_form  # noqa: E402
from hdrq.export.profiles import PROFILES, TYPES, activation_form  # noqa: E402
from hdrq.quantizers.layers import quantized_layers  # noqa: E402

X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", (DeprecationWarning, FutureWarning, UserWarning))
        yield


def quantized(bits="W4A4", **options):
    return hdrq.quantize(Net().eval(), X, "rtn", bits=bits, progress=False, **options)


def answers(path, x, fused=False):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if not fused:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]


@pytest.mark.parametrize("name", [name for name in MODELS if name != "ResNet-50"])  # ResNet has the same operations
def test_every_architecture_runs_in_integers(name, tmp_path):
    pytest.importorskip("openvino")
    model, data = built(name)
    model = hdrq.quantize(model, data, "rtn", bits="W4A4", progress=False)
    exported = to_onnx(model, data, tmp_path / "model.onnx")
    assert exported.layers and not exported.floats
    found = check(tmp_path / "model.onnx", model, data)
    assert (found.integer, found.floats) == (len(exported.layers), [])
    assert found.unfused <= 1e-6
    assert found.difference <= max(1e-6, 3 * found.floor) and found.agreement == 1


@pytest.mark.parametrize("runtime", ["openvino", "onnxruntime", "standard"])
@pytest.mark.parametrize(("bits", "per_channel"), [("W8A8", False), ("W4A4", True), ("W3A3", False), ("W2A5", True)])
def test_unfused_answers_are_hdrqs(runtime, bits, per_channel, tmp_path):
    model = quantized(bits, per_channel=per_channel)
    to_onnx(model, X, tmp_path / "model.onnx", runtime=runtime, allow_float=True)
    with torch.no_grad():
        want = model(X).numpy()
    np.testing.assert_allclose(answers(tmp_path / "model.onnx", X), want, atol=2e-6)


def test_the_batch_is_free(tmp_path):
    model = quantized()
    to_onnx(model, X[:1], tmp_path / "model.onnx")
    for size in (1, 2, 7):
        with torch.no_grad():
            np.testing.assert_allclose(answers(tmp_path / "model.onnx", X[:size]), model(X[:size]).numpy(), atol=2e-6)


@pytest.mark.parametrize("name", ["BERT", "language"])
def test_the_batch_is_free_where_inputs_are_named(name, tmp_path):
    model, data = built(name)
    model = hdrq.quantize(model, data, "rtn", bits="W4A4", progress=False)
    to_onnx(model, data, tmp_path / "model.onnx")
    for size in (1, 4):
        call = calibration_calls(data)[0].at(torch.arange(size))
        assert check(tmp_path / "model.onnx", model, [dict(call.kwargs)], runtime="onnxruntime").unfused <= 1e-6


@pytest.mark.parametrize("bits", ["W4A8", "W8A8"])
def test_weights_with_zero_points(bits, tmp_path):
    model = quantized(bits, affine_weights=True, per_channel=True)
    to_onnx(model, X, tmp_path / "model.onnx", allow_float=True)
    with torch.no_grad():
        np.testing.assert_allclose(answers(tmp_path / "model.onnx", X), model(X).numpy(), atol=2e-6)


@pytest.mark.parametrize(
    ("bits", "affine", "turned"), [("W4A8", False, False), ("W4A8", True, True), ("W8A8", True, False)]
)
def test_weights_in_groups_are_in_blocks(bits, affine, turned, tmp_path):
    """A linear layer on images reads its weight turned by a Transpose, which is folded, and one on rows as it lies."""

    class Linears(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)

        def forward(self, x):
            return self.b(self.a(x if turned else x[:, 0, 0]).relu())

    model = hdrq.quantize(
        Linears().eval(), X, "rtn", bits={"*": bits}, group_size=4, affine_weights=affine, progress=False
    )
    with pytest.raises(ValueError, match="its weight has a scale for each group"):
        to_onnx(model, X, tmp_path / "refused.onnx")
    exported = to_onnx(model, X, tmp_path / "model.onnx", runtime="standard", allow_float=True)
    assert [layer.why_float for layer in exported.layers] == ["its weight has a scale for each group"] * 2
    with torch.no_grad():
        np.testing.assert_allclose(answers(tmp_path / "model.onnx", X), model(X).numpy(), atol=2e-6)
    graph = onnx.load(tmp_path / "model.onnx").graph
    blocks = [node for node in graph.node if any(a.name == "block_size" and a.i == 4 for a in node.attribute)]
    assert len(blocks) == 2


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("runtime", PROFILES)
def test_every_type_holds_the_difference_of_codes_and_zero_points(bits, wide, runtime):
    """Of 8 bits or 16, from one end of the range to a zero point at the other, it needs one bit more."""
    qmin, qmax = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    low = qmin if wide else qmin + 2
    codes = np.array([[low, -1, qmax], [low, 0, qmax]], np.int16)
    zero = np.array([qmax, qmin] if wide else [0, 1], np.int32)
    form = weight_form(PROFILES[runtime], codes, np.ones(2, np.float32), zero, qmin, qmax, 0)
    kind = TYPES[form.type]
    shift = 0 if form.zero_point is None else form.zero_point.astype(np.int64)[:, None]
    values = (form.codes.astype(np.int64) - shift) * form.scale[:, None].astype(np.float64)
    assert np.array_equal(values, codes.astype(int) - zero[:, None])
    assert kind.low <= form.codes.min() and form.codes.max() <= kind.high
    assert (form.zero_point is not None) == (wide and bits >= 8)


def test_weights_are_the_codes_to_the_bit(tmp_path):
    model = quantized("W3A8", per_channel=True)
    to_onnx(model, X, tmp_path / "model.onnx")
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(tmp_path / "model.onnx").graph.initializer}
    for name, layer in quantized_layers(model).items():
        turned = name == "head"
        kind = "weight_t" if turned else "weight"
        codes, scale = constants[f"{name}.{kind}.codes"], constants[f"{name}.{kind}.scale"]
        assert codes.dtype == np.int8 and np.abs(codes.astype(int)).max() <= (
            64 if name not in ("stem", "head") else 128
        )
        shape = [-1, *[1] * (codes.ndim - 1)] if not turned else [1, -1]
        values = codes.astype(np.float32) * scale.reshape(shape if scale.ndim else [1] * codes.ndim)
        weight = layer.module.weight.detach().numpy()
        assert np.array_equal(values, weight.T if turned else weight)


def test_standard_files_have_the_smallest_types(tmp_path):
    exported = to_onnx(quantized("W4A4", per_channel=True), X, tmp_path / "model.onnx", runtime="standard")
    types = {t.name: t.data_type for t in onnx.load(tmp_path / "model.onnx").graph.initializer}
    assert types["a.weight.codes"] == onnx.TensorProto.INT4
    assert types["a.input.zero_point"] == onnx.TensorProto.UINT4
    assert {layer.name for layer in exported.floats} == {"a", "b"}


def test_onnxruntime_takes_outputs_from_data_and_computes_in_integers(tmp_path):
    model = quantized()
    with pytest.raises(
        ValueError, match=r'data must be given for runtime "onnxruntime": the outputs of 2 convolutions \(stem, b\)'
    ):
        to_onnx(model, X, tmp_path / "model.onnx", runtime="onnxruntime")
    assert not list(tmp_path.iterdir())
    exported = to_onnx(model, X, tmp_path / "model.onnx", runtime="onnxruntime", data=X)
    assert exported.added == ["stem", "b"] and not exported.floats
    found = check(tmp_path / "model.onnx", model, X, runtime="onnxruntime")
    assert (found.integer, found.floats) == (4, [])
    assert found.difference < 0.1


def test_a_graph_that_runs_in_float_is_found(tmp_path):
    """The test of the test: predicted and proven are the same layers."""
    model = quantized()
    exported = to_onnx(model, X, tmp_path / "model.onnx", runtime="onnxruntime", allow_float=True)
    assert [layer.name for layer in exported.floats] == ["stem", "b"]
    found = check(tmp_path / "model.onnx", model, X, runtime="onnxruntime")
    assert len(found.floats) == 2 and found.integer == 2
    assert "b (Conv): float: its output is not quantized" in str(exported)
    to_onnx(model, X, tmp_path / "4.onnx", runtime="standard")
    assert len(check(tmp_path / "4.onnx", model, X, runtime="onnxruntime").floats) >= 2


def test_a_relu6_before_a_narrow_quantizer_is_no_clip(tmp_path):
    class Six(nn.Module):
        def __init__(self, largest):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.largest = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 3), largest

        def forward(self, x):
            return self.b((4 * self.a(x)).clamp(0.0, self.largest)).mean((2, 3))

    for factor, kept in ((1, 0), (3, 1)):  # a range that ends at the bound, and one that ends beyond it
        model = hdrq.quantize(Six(0.5).eval(), X, "rtn", bits={"a": "W8A8", "b": "W4A4"}, progress=False)
        model.b.input_quantizer.scale.data.mul_(factor)
        to_onnx(model, X, tmp_path / "model.onnx", allow_float=True)
        clips = [node for node in onnx.load(tmp_path / "model.onnx").graph.node if node.op_type == "Clip"]
        assert sum("codes" not in node.input[0] for node in clips) == kept
        with torch.no_grad():
            np.testing.assert_allclose(answers(tmp_path / "model.onnx", X), model(X).numpy(), atol=2e-6)


def test_merged_models_with_shifted_ranges(tmp_path):
    merged = hdrq.merge([quantized(), quantized()])
    merged.a.input_quantizer.qmin, merged.a.input_quantizer.qmax = -3, 12
    to_onnx(merged, X, tmp_path / "model.onnx")
    with torch.no_grad():
        np.testing.assert_allclose(answers(tmp_path / "model.onnx", X), merged(X).numpy(), atol=2e-6)


@pytest.mark.parametrize(
    "qmin, qmax", [(0, 255), (-128, 127), (-129, 126), (0, 7), (-4, 3), (3, 18), (-5, 250), (0, 2**16 - 1)]
)
def test_quantizelinear_is_ours(qmin, qmax, tmp_path):
    """On ties, infinities and the ends of the range, in a graph of one quantizer."""
    model = quantized()
    quantizer = model.stem.input_quantizer
    quantizer.qmin, quantizer.qmax = qmin, qmax
    quantizer.scale.data.fill_(0.37)
    exported = to_onnx(model, X, tmp_path / "model.onnx", runtime="openvino", allow_float=True)
    assert exported
    graph = onnx.load(tmp_path / "model.onnx")
    value = next(
        n.output[0] for n in graph.graph.node if n.op_type == "DequantizeLinear" and n.input[0].startswith("stem.input")
    )
    del graph.graph.output[:]
    graph.graph.output.append(onnx.helper.make_tensor_value_info(value, onnx.TensorProto.FLOAT, None))
    steps = np.r_[np.arange(qmin - 3, qmin + 40) + 0.5, np.arange(qmax - 40, qmax + 3) + 0.5, np.arange(-9, 9) / 2]
    values = np.r_[steps * 0.37, [np.inf, -np.inf, 1e38, -1e38]].astype(np.float32)
    x = torch.from_numpy(np.resize(values, X.shape))
    onnx.save(graph, tmp_path / "part.onnx")
    want = hdrq.ops.fake_quantize(x, torch.tensor(0.37), qmin, qmax).numpy()
    assert np.array_equal(answers(tmp_path / "part.onnx", x) + 0.0, want + 0.0)


def test_the_file_says_where_it_comes_from(tmp_path):
    model = quantized()
    to_onnx(model, X, tmp_path / "model.onnx")
    facts = {p.key: p.value for p in onnx.load(tmp_path / "model.onnx").metadata_props}
    assert facts["hdrq"] == hdrq.__version__ and json.loads(facts["hdrq.origin"])["recipe"]["name"] == "rtn"


def wide():
    return quantized("W16A16")


def half():
    return quantized().bfloat16()


BAD = [
    (Net, {}, ValueError, "model must be quantized by hdrq.quantize, got a plain Net"),
    (int, {}, TypeError, "model must be a quantized torch.nn.Module, got int"),
    (half, {}, TypeError, r"model must be float32 to be exported, got bfloat16 in .*: \.float"),
    (wide, {}, ValueError, 'bits must be 2 to 8 for runtime "openvino" to compute in integers, got 16 for the weight'),
    (quantized, {"runtime": "mobile"}, ValueError, "runtime must be one of 'openvino', 'onnxruntime', 'tensorrt', 'st"),
    (quantized, {"opset": 13}, ValueError, r"opset must be in \[21, 25\], got 13"),
    (quantized, {"runtime": "tensorrt"}, ValueError, r"ranges must lie in \[-128, 127\] for tensorrt, which has no"),
]


@pytest.mark.parametrize(("build", "options", "error", "message"), BAD)
def test_bad_input(build, options, error, message, tmp_path):
    with pytest.raises(error, match=message):
        to_onnx(build(), X, tmp_path / "model.onnx", **options)
    assert not list(tmp_path.iterdir())


def test_quantizers_must_round(tmp_path):
    model = quantized()
    model.a.input_quantizer.mode = "float"
    with pytest.raises(ValueError, match="quantizers must round to be exported, got mode 'float' for the input of a"):
        to_onnx(model, X, tmp_path / "model.onnx")


def test_what_cannot_be_traced_is_named(tmp_path):
    class Branching(Net):
        def forward(self, x):
            return super().forward(x if x.sum() > 0 else -x)

    model = hdrq.quantize(Branching().eval(), X, "rtn", progress=False)
    with pytest.raises(ValueError, match=r"model must be one that torch\.onnx exports, got"):
        to_onnx(model, X, tmp_path / "model.onnx")


def test_profiles_hold_every_range_of_8_bits():
    for qmin in range(-300, 45):
        for levels in (4, 8, 16, 256):
            qmax = qmin + levels - 1
            if qmax < 0 or qmin > 0:
                continue
            form = activation_form(PROFILES["openvino"], "layer", qmin, qmax)
            assert form.type.name == ("UINT8" if qmin >= -255 else "UINT16")
            assert (form.low - form.zero_point, form.high - form.zero_point) == (qmin, qmax)


def test_a_checked_model_takes_all_its_calls(tmp_path):
    pytest.importorskip("openvino")
    model = quantized()
    to_onnx(model, [X[:4], X[4:]], tmp_path / "model.onnx")
    assert len(calibration_calls([X[:4], X[4:]])) == 2
    assert check(tmp_path / "model.onnx", model, [X[:4], X[4:]]).agreement == 1
