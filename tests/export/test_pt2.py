"""Programs of ``torch.export``: hdrq's answers, and integer kernels of inductor."""

import json
import shutil
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from architectures import built, output
from helpers import assert_same_bits
from torch import nn

import hdrq
from hdrq.calibrate.data import calibration_calls
from hdrq.export import check, compile_pt2, inductor, pt2, to_pt2
from hdrq.export.pt2e import CLIPS, DEQUANTIZE, QUANTIZE, WEIGHT, float_products
from hdrq.quantizers.attach import attach_input_quantizer
from hdrq.quantizers.layers import quantized_layers, register_layer
from hdrq.quantizers.modules import ActivationQuantizer

X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randint(20, (6, 5), generator=torch.Generator().manual_seed(0))
needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", (DeprecationWarning, FutureWarning))
        yield


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))


def quantized(bits="W4A4", model=None, x=X, **options):
    return hdrq.quantize((model or net()).eval(), x, "rtn", bits=bits, progress=False, **options)


def nodes(program, target):
    return program.graph.find_nodes(op="call_function", target=target)


def answers(program, *args, **kwargs):
    with torch.no_grad():
        return program.module()(*args, **kwargs)


@pytest.mark.parametrize("name", ["EfficientNet", "U-Net"])
def test_architectures_are_exported_whole(name):
    model, data = built(name)
    model = hdrq.quantize(model, data, "rtn", bits="W4A4", progress=False)
    if name == "U-Net":
        with pytest.raises(ValueError, match=r"got up2 \(conv_transpose2d\): float: inductor has no integer kernel of"):
            pt2(model, data)
        with pytest.warns(UserWarning, match=r"computed in float: up2 \(conv_transpose2d\): .*; up1 \(conv_tr"):
            program = pt2(model, data, allow_float=True)
        assert float_products(program) == ["up2 (conv_transpose2d)", "up1 (conv_transpose2d)"]
    else:
        program = pt2(model, data)
        assert float_products(program) == []
    biggest = max(layer.latent.numel() for layer in quantized_layers(model).values())
    assert all(t.numel() < biggest for t in program.state_dict.values() if t.is_floating_point())
    for size in (1, 4, 6):
        part = calibration_calls(data)[0].at(torch.arange(size))
        part = [dict(part.kwargs)] if part.kwargs else part.args[0]
        torch.testing.assert_close(output(program.module(), part), output(model, part), atol=1e-6, rtol=0)


AFFINE = {"per_channel": True, "affine_weights": True}


@pytest.mark.parametrize(
    ("bits", "options"), [("W8A8", {"per_channel": True}), ("W8A8", AFFINE), ("W3A3", {}), ("W2A5", AFFINE)]
)
def test_answers_and_weights_are_hdrqs(bits, options):
    """A weight's codes less their zero points fit int8, but for 8 bits, where they go to float and keep their bits."""
    model = quantized({"*": bits}, **options)
    if bits == "W8A8" and "affine_weights" in options:
        with pytest.raises(ValueError, match="int8 cannot hold its weight's codes less their zero points"):
            pt2(model, X)
        with pytest.warns(UserWarning, match="computed in float"):
            program = pt2(model, X, allow_float=True)
    else:
        program = pt2(model, X)
        names = program.graph_signature.inputs_to_buffers
        for node in nodes(program, WEIGHT):
            codes, scale, *_ = (program.state_dict[names[each.name]] for each in node.args[:3])
            layer = quantized_layers(model)[names[node.args[0].name].partition(".")[0]]
            values = codes.float() * scale.view(-1, *[1] * (codes.ndim - 1))
            assert codes.dtype == torch.int8 and torch.equal(values, layer.module.weight)
    with torch.no_grad():
        torch.testing.assert_close(answers(program, X), model(X), atol=1e-6, rtol=0)


RANGES = [(0, 255), (-129, 126), (0, 7), (3, 18), (-20, -5)]


@pytest.mark.parametrize(("qmin", "qmax"), RANGES)
def test_a_quantizer_is_hdrqs_but_at_ties(qmin, qmax):
    """The ends of the range, infinities, and values beside ties; at ties an even multiple of the scale decides."""
    model = quantized()
    model[0].input_quantizer.qmin, model[0].input_quantizer.qmax = qmin, qmax
    program = pt2(model, X)
    quantize, dequantize = nodes(program, QUANTIZE)[0], nodes(program, DEQUANTIZE)[0]
    steps = torch.cat([torch.arange(qmin - 3.0, qmin + 40), torch.arange(qmax - 40.0, qmax + 3)])
    for offset in (-0.499, 0.0, 0.499):
        x = torch.cat(
            [(steps + offset) * model[0].input_quantizer.scale.detach(), torch.tensor([torch.inf, -torch.inf])]
        )
        got = x
        if quantize.args[0].op == "call_function":
            got = torch.clamp(got, *quantize.args[0].args[1:])
        assert (quantize.args[0].op == "placeholder") == (qmax - qmin == 255)
        got = dequantize.target(quantize.target(got, *quantize.args[1:]), *dequantize.args[1:])
        assert torch.equal(got, model[0].input_quantizer(x))
    with torch.no_grad():
        torch.testing.assert_close(answers(program, X), model(X), atol=1e-6, rtol=0)


def test_a_merged_model_with_a_shifted_range():
    merged = hdrq.merge([quantized(), quantized(per_channel=False)])
    merged[2].input_quantizer.qmin, merged[2].input_quantizer.qmax = -3, 12
    with torch.no_grad():
        torch.testing.assert_close(answers(pt2(merged, X), X), merged(X), atol=1e-6, rtol=0)


class Turned(nn.Module):
    """A linear layer whose weight is transposed, as transformers' ``Conv1D``."""

    def __init__(self, inside, outside):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inside, outside)), nn.Parameter(torch.randn(outside))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


class Zoo(nn.Module):
    """Layers of many kinds: a convolution that runs twice, one of lines, several that read one tensor, pooling between
    two quantizers, a tied embedding, an attention, a transposed linear layer, a tensor that does not lie in a row."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.pool, self.pooled = nn.Conv2d(3, 8, 3, padding="same"), nn.MaxPool2d(2), nn.Conv2d(8, 8, 1)
        self.left, self.right = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8), nn.Conv2d(8, 8, 1, bias=False)
        self.again, self.line = nn.Conv2d(8, 8, 3, padding=1), nn.Conv1d(8, 8, 3, padding="same")
        self.embedding, self.attention = nn.Embedding(20, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.turned, self.along = Turned(8, 8), nn.Linear(5, 5)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x, *, tokens, scale):
        x = self.pooled(self.pool(F.relu(self.stem(x), inplace=True)))
        x = self.left(x) + self.right(x)
        for _ in range(2):
            x = F.relu(self.again(x)) + x
        x = F.relu6(self.line(x.flatten(2))).mean(2)
        y = self.embedding(tokens) * scale
        y = y + self.attention(y, y, y)[0]
        y = y + self.along(self.turned(F.gelu(y)).transpose(1, 2)).transpose(1, 2)
        return {"logits": self.head(x[:, None] + y)}


@pytest.fixture
def zoo(monkeypatch):
    """The network, and a call: inputs of 8 bits around the pooling, of 4 elsewhere."""
    monkeypatch.setattr(hdrq.quantizers.layers, "_registered", {})
    register_layer(Turned, 1)
    call = {"x": X[:6], "tokens": TOKENS, "scale": torch.ones(1, 5, 8)}
    bits = {"pooled": "W6A8", "*": "W3A4"}  # 8 bits times 8 saturate on processors without VNNI
    model = hdrq.quantize(Zoo().eval(), [call], "rtn", bits=bits, per_channel=True, progress=False)
    attach_input_quantizer(model.pool, ActivationQuantizer(torch.tensor([0.003]), 0, 255))
    model.left.input_quantizer.scale.data.mul_(0.3)  # half of what is read is clipped
    return model, call


@needs_compiler
def test_products_run_in_integers(zoo, tmp_path):
    """Compiled once, for every size of the batch; for one sample alone inductor would make a product of floats."""
    pytest.importorskip("torchao")
    model, call = zoo
    exported = to_pt2(model, [call], tmp_path / "model.pt2")
    names = ["stem", "pooled", "left", "right", "again", "again", "line"]
    names += [f"attention.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")]
    assert [layer.name for layer in exported.layers] == [*names, "turned", "along", "head"]
    facts = {"hdrq": "", "hdrq.origin": ""}
    held = torch.export.load(tmp_path / "model.pt2", extra_files=facts).example_inputs
    assert not any(t.any() for t in held[1].values()) and held[1]["x"].shape == (2, 3, 8, 8)  # no data of anybody
    assert facts["hdrq"] == hdrq.__version__ and json.loads(facts["hdrq.origin"])["recipe"]["name"] == "rtn"

    one = {name: value[:1] for name, value in call.items()}
    found = check(tmp_path / "model.pt2", model, [call, one], runtime="inductor")
    assert (found.integer, found.floats) == (14, [])
    assert found.difference <= max(1e-5, 3 * found.floor) and found.unfused <= 1e-6 and found.agreement == 1


def padded(mode, kernel=3):
    return nn.Sequential(nn.Conv2d(3, 4, kernel, padding="same", padding_mode=mode), nn.Flatten(), nn.Linear(256, 5))


def grouped():
    return quantized({"*": "W4A8"}, nn.Sequential(nn.Flatten(), nn.Linear(192, 8)), group_size=8)


def without_input():
    model = quantized()
    model[2]._forward_pre_hooks.clear()
    del model[2].input_quantizer
    return model


def three_axes():
    layers = nn.Unflatten(1, (1, 3)), nn.Conv3d(1, 4, (3, 3, 3)), nn.Flatten(), nn.Linear(144, 5)
    return quantized("W4A4", nn.Sequential(*layers))


class Norm(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight / self.weight.norm())


def normed():
    return quantized("W4A4", nn.Sequential(nn.Flatten(), Norm(192, 8)))


def far():
    model = quantized()
    model[2].input_quantizer.qmin, model[2].input_quantizer.qmax = -300, -45
    return model


FLOAT = [
    (
        lambda: quantized({"*": "W16A16"}),
        'bits must be 2 to 8 for runtime "inductor" to compute in integers, got 16 for',
    ),
    (grouped, r"got 1 \(linear\): float: its weight's scales do not lie along output channels"),
    (without_input, r"got 2 \(conv2d\): float: its input is not quantized to 8 bits; allow_float=True lets it"),
    (three_axes, r"got 1 \(conv3d\): float: inductor has no integer kernel of it"),
    (lambda: quantized("W4A4", padded("zeros", 2)), r"got 0 \(conv2d\): float: it pads one side more than the other"),
    (lambda: quantized("W4A4", padded("circular")), r"got 0 \(conv2d\): float: its input is not quantized to 8 bits"),
    (normed, r"got 1 \(.*\): float: its weight is read by .* and 1 more"),
    (far, r"got 2 \(conv2d\): float: its input is not quantized to 8 bits"),
]


@pytest.mark.parametrize(("build", "message"), FLOAT)
def test_a_product_of_floats_is_refused_and_exact_where_it_is_let(build, message, tmp_path):
    model = build()
    with pytest.raises(ValueError, match=message):
        to_pt2(model, X, tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())
    with pytest.warns(UserWarning, match="computed in float"):
        program = pt2(model, X, allow_float=True)
    assert float_products(program)
    with torch.no_grad():
        torch.testing.assert_close(answers(program, X), model(X), atol=1e-6, rtol=0)


def test_zeros_around_an_input_become_zero_points():
    model = quantized("W4A4", SamePad(3, 4, 3))
    program = pt2(model, X)
    (pad,) = nodes(program, torch.ops.aten.constant_pad_nd.default)
    assert pad.args[0].target is QUANTIZE and pad.args[2] == pad.args[0].args[2] != 0
    with torch.no_grad():
        assert_same_bits(answers(program, X), model(X))


class SamePad(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), self.weight, self.bias)


class Six(nn.Module):
    def __init__(self, clip):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.clip = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 3), clip

    def forward(self, x):
        return self.b(self.clip(4 * self.a(x))).mean((2, 3))


@pytest.mark.parametrize(("clip", "wide"), [(F.relu, 1), (nn.Hardtanh(0.0, 0.5), 2), (nn.ReLU6(), 2)])
def test_a_relu_before_a_narrow_quantizer_is_no_clip(clip, wide):
    """Where the quantizer's range ends no later; its clamp is then the one operation that a kernel takes along."""
    for factor, count in ((1, 1), (30, wide)):
        model = quantized({"a": "W8A8", "b": "W4A4"}, Six(clip))
        model.b.input_quantizer.scale.data.mul_(factor)
        program = pt2(model, X)
        assert sum(node.target in CLIPS for node in program.graph.nodes) == count
        with torch.no_grad():
            torch.testing.assert_close(answers(program, X), model(X), atol=1e-6, rtol=0)


def half():
    return quantized().bfloat16()


def noisy():
    model = quantized()
    model[0].input_quantizer.mode = "noise"
    return model


class Branching(nn.Linear):
    def forward(self, x):
        return super().forward(x if x.sum() > 0 else -x)


class OneBatch(nn.Linear):
    def forward(self, x):
        return super().forward(x.reshape(8, 192))


BAD = [
    (net, ValueError, "model must be quantized by hdrq.quantize, got a plain Sequential"),
    (half, TypeError, r"model must be float32 to be exported, got bfloat16 in .*: \.float"),
    (noisy, ValueError, "quantizers must round to be exported, got mode 'noise' for the input of 0"),
    (
        lambda: quantized("W4A4", nn.Sequential(nn.Flatten(), Branching(192, 8))),
        ValueError,
        "model must be one that torch",
    ),
    (
        lambda: quantized("W4A4", nn.Sequential(nn.Flatten(), OneBatch(192, 8))),
        ValueError,
        "model must be one that torch",
    ),
]


@pytest.mark.parametrize(("build", "error", "message"), BAD)
def test_bad_input(build, error, message):
    with pytest.raises(error, match=message):
        pt2(build(), X)


def test_a_compiled_program_refuses_what_machine_code_would_misread():
    example = {"x": X, "mask": torch.ones(1, 8), "scale": 2.0}
    seen = []
    program = torch.export.export(nn.Linear(8, 5), (X[:, 0, 0],))
    program._example_inputs = ((), example)
    compiled = inductor.Compiled(program, lambda **given: seen.append(given))
    turned = X.transpose(2, 3)
    compiled(mask=example["mask"], scale=2.0, x=turned[:3])
    assert seen[0]["x"].is_contiguous() and torch.equal(seen[0]["x"], turned[:3])
    for change in (
        *({"x": x} for x in (X[:, :2], X.double(), X.to("meta"), X[:0], None)),
        *({"mask": mask} for mask in (torch.ones(8, 8), None)),
        *({"scale": scale} for scale in (3.0, 2)),
    ):
        with pytest.raises(ValueError, match=r"arguments must be as in \(x=\(8, 3, 8, 8\) float32, .*, got \("):
            compiled(**{**example, **change})
    with pytest.raises(TypeError, match="arguments must be as in"):
        compiled(X, **example)
    assert len(seen) == 1


def test_what_is_missing_or_no_program_is_named(monkeypatch, tmp_path):
    with pytest.raises(TypeError, match=r"program must be one of torch\.export or its file, got Sequential"):
        compile_pt2(net())
    (tmp_path / "model.pt2").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"program must be a file of torch\.export\.save, got .*model\.pt2: "):
        compile_pt2(tmp_path / "model.pt2")
    with pytest.raises(FileNotFoundError):
        compile_pt2(tmp_path / "none.pt2")
    program = torch.export.export(nn.Linear(8, 5), (X[:, 0, 0],))
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(
        hdrq.errors.MissingExtra, match=r'torchao must be installed, got none: pip install "hdrq\[pt2\]"'
    ):
        compile_pt2(program)


def test_a_missing_compiler_is_named(monkeypatch):
    def failing(*args, **options):
        raise torch._inductor.exc.InvalidCxxCompiler()

    pytest.importorskip("torchao")
    own = torch._inductor.config.pre_grad_custom_pass
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", failing)
    with pytest.raises(hdrq.errors.MissingExtra, match=r"a C\+\+ compiler must be installed, such as g\+\+, got none"):
        compile_pt2(torch.export.export(nn.Linear(8, 5), (X[:, 0, 0],)))
    assert torch._inductor.config.pre_grad_custom_pass is own
