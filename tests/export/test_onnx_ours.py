"""ONNX files that hdrq wrote are read as what hdrq had, to the bit; metadata that lies is refused."""

import json
import shutil
import warnings

import numpy as np
import pytest
import torch
from export.onnx_models import (
    Net,
    X,
    answers,
    onnx,
    tensors,
)
from onnx import helper

import hdrq
from hdrq.export import read_onnx, to_onnx, write_like
from hdrq.merging.files import merge_files

pytestmark = pytest.mark.usefixtures("quiet")


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
