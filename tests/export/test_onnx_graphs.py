"""Forms that a quantized ONNX graph may have, each read, merged and written back: graphs made by hand."""

import numpy as np
import pytest
from export.onnx_models import (
    W4,
    X4,
    answers,
    arrays,
    linear,
    merged,
    node,
    onnx,
    onnxruntime,
    round_trip,
)
from onnx import TensorProto, helper, numpy_helper

import hdrq

pytestmark = pytest.mark.usefixtures("quiet")


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
