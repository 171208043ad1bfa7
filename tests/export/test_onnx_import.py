"""Models of ONNX Runtime's quantizer: the round trip changes nothing, and a merge is the mean of what was read."""

import hashlib
import json
import shutil

import numpy as np
import pytest
import torch
from export.onnx_models import (
    FORMS,
    answers,
    arrays,
    external,
    merged,
    onnx,
    onnxruntime,
    quantize_static,
    tensors,
)
from onnx import TensorProto, numpy_helper

import hdrq
from hdrq.checkpoint.format import packs
from hdrq.checkpoint.history import history as tell
from hdrq.export import read_onnx, write_like
from hdrq.merging.adding import add_file
from hdrq.merging.files import merge_files

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture(scope="module", params=FORMS)
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    return [quantize_static(folder / f"{seed}.onnx", seed, **FORMS[request.param]) for seed in (1, 2)]


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


def test_the_file_says_where_it_comes_from(tmp_path):

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
