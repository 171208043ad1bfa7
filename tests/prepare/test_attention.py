"""Attention: packed projections become layers, and q, k, v and softmax get quantizers where modules return them."""

import pytest
import torch
import torch.nn.functional as F
from helpers import merged_content
from torch import nn

import hdrq
from hdrq.calibrate.report import report_of
from hdrq.merging.files import merge_files
from hdrq.prepare.attention import Attention, operand_table, quantized_operands, replace_attention
from hdrq.prepare.units import find_blocks
from hdrq.quantizers.layers import input_quantizers, quantized_layers

ALL = ["q", "k", "v", "softmax"]
X = torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(6, 16, 8, generator=torch.Generator().manual_seed(3))  # of 4 x 4 tokens


def seeded(build, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build().eval()
        for p in model.parameters():  # biases are not zero
            if p.ndim == 1:
                p.data.add_(0.1 * torch.randn_like(p))
    return model


class EncoderBlock(nn.Module):
    """The structure of torchvision's."""

    def __init__(self):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.self_attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.dropout = nn.Dropout(0.1)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.1), nn.Linear(16, 8))

    def forward(self, x):
        y = self.ln_1(x)
        y, _ = self.self_attention(y, y, y, need_weights=False)
        x = x + self.dropout(y)
        return x + self.mlp(self.ln_2(x))


class Vision(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.stem, self.blocks, self.head = nn.Linear(8, 8), nn.Sequential(block(), block()), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x))[:, 0])


class PackedLayer(nn.Module):
    """The structure of timm's attention and block: one layer for q, k and v, the products in code."""

    def __init__(self, fused, norm=nn.Identity):
        super().__init__()
        self.fused, self.norm = fused, nn.LayerNorm(8)
        self.attn = PackedAttention(fused, norm)
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        x = x + self.attn(self.norm(x))
        return x + self.fc2(F.gelu(self.fc1(x)))


class PackedAttention(nn.Module):
    def __init__(self, fused, norm):
        super().__init__()
        self.fused, self.qkv, self.proj = fused, nn.Linear(8, 24), nn.Linear(8, 8)
        self.q_norm, self.k_norm, self.attn_drop = norm(4), norm(4), nn.Dropout(0.1)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        return self.proj(self.product(q, k, v).transpose(1, 2).flatten(2))

    def product(self, q, k, v):
        if self.fused:
            return F.scaled_dot_product_attention(q, k, v)
        return self.attn_drop((q / 2 @ k.mT).softmax(-1)) @ v


class Window(nn.Module):
    """The structure of Swin's attention: a softmax and a dropout that are modules."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.softmax, self.attn_drop, self.proj_drop = nn.Softmax(-1), nn.Dropout(0.1), nn.Dropout(0.1)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return x + self.proj_drop(self.proj(self.attn_drop(self.softmax(q @ k.mT)) @ v))


class Reduced(nn.Module):
    """The structure of SegFormer's and PVT's block: one layer for k and v, of an image that a convolution shrinks."""

    def __init__(self, norm=nn.Identity):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(8), ReducedAttention(norm)
        self.norm2, self.fc1, self.fc2 = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class ReducedAttention(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.q, self.kv, self.proj = nn.Linear(8, 8), nn.Linear(8, 16), nn.Linear(8, 8)
        self.sr, self.norm, self.attn_drop = nn.Conv2d(8, 8, 2, 2), nn.LayerNorm(8), nn.Dropout(0.1)
        self.q_norm, self.k_norm = norm(4), norm(4)

    def forward(self, x):
        small = self.norm(self.sr(x.mT.unflatten(2, (4, 4))).flatten(2).mT)
        q = self.q(x).unflatten(2, (2, 4)).transpose(1, 2)
        k, v = self.kv(small).unflatten(2, (2, 2, 4)).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        weights = self.attn_drop((q / 2 @ k.mT).softmax(-1))
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class Cross(nn.Module):
    """Cross attention with two projections, its products in a function: the first tokens ask, all of them answer."""

    def __init__(self, q="to_q", kv="to_kv", width=16):
        super().__init__()
        self.names = q, kv
        self.add_module(q, nn.Linear(8, 8))
        self.add_module(kv, nn.Linear(8, width))
        self.to_out = nn.Linear(8, 8)

    def forward(self, x):
        q, kv = (self.get_submodule(name) for name in self.names)
        q, parts = q(x[:, :2]), kv(x).split(8, -1)
        return x + F.pad(self.to_out(F.scaled_dot_product_attention(q, parts[0], parts[-1])), (0, 0, 0, x.shape[1] - 2))


def encoder():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


class Translator(nn.Module):
    """Cross attention, sequence first, masks."""

    def __init__(self):
        super().__init__()
        self.stem, self.layers = nn.Linear(8, 8), nn.ModuleList(nn.TransformerDecoderLayer(8, 2, 16) for _ in range(2))
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(5))

    def forward(self, x):
        x = self.stem(x).transpose(0, 1)
        memory = x.flip(0)[:3]
        for layer in self.layers:
            x = layer(x, memory, tgt_mask=self.mask, tgt_is_causal=True)
        return x.transpose(0, 1)


def hugging():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.ViTConfig(**sizes, num_hidden_layers=2, image_size=16, patch_size=8, num_labels=5)
    return transformers.ViTForImageClassification(config)


MODELS = {  # how it is built, what it runs on, its attentions and their operands
    "torchvision": (lambda: Vision(EncoderBlock), X, {f"blocks.{i}.self_attention": ALL for i in (0, 1)}),
    "encoder": (encoder, X, {f"layers.{i}.self_attn": ALL for i in (0, 1)}),
    "decoder": (Translator, X, {f"layers.{i}.{n}": ALL for i in (0, 1) for n in ("self_attn", "multihead_attn")}),
    "timm": (lambda: Vision(lambda: PackedLayer(True)), X, {f"blocks.{i}.attn": ALL[:3] for i in (0, 1)}),
    "timm, eager": (lambda: Vision(lambda: PackedLayer(False)), X, {f"blocks.{i}.attn": ALL for i in (0, 1)}),
    "SegFormer": (lambda: Vision(Reduced), IMAGES, {f"blocks.{i}.attn": ALL for i in (0, 1)}),
    "cross": (lambda: Vision(Cross), X, {f"blocks.{i}": ALL[:3] for i in (0, 1)}),
    "Swin": (lambda: Vision(Window), X, {f"blocks.{i}": ALL for i in (0, 1)}),
    "ViT": (
        hugging,
        torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1)),
        {f"vit.layers.{i}.attention": ALL[:3] for i in (0, 1)},
    ),
}


@torch.no_grad()
def output(model, x):
    result = model(x)
    return result if isinstance(result, torch.Tensor) else result["logits"]


@pytest.mark.parametrize("name", MODELS)
def test_all_recipes_save_load_merge(name, tmp_path, every_step_kept):
    build, x, attentions = MODELS[name]
    model, source = seeded(build), seeded(build, 1)
    want = output(model, x)
    options = {"source": source, "batch_size": 2, "progress": False}
    quantized = {
        recipe: hdrq.quantize(model, x, recipe, iterations=0 if recipe == "rtn" else 3, **options)
        for recipe in ("rtn", "qdrop", "hdrq")
    }
    for recipe, each in quantized.items():
        assert report_of(each).attention == attentions
        assert torch.equal(output(model, x), want)  # the model given is left as it was
        got = output(each, x)
        assert got.isfinite().all() and 1e-3 < (got - want).norm() / want.norm() < 0.6, recipe
        hdrq.save(each, tmp_path / recipe)
        loaded = hdrq.load(tmp_path / recipe, model)
        assert torch.equal(output(loaded, x), got)
        assert quantized_operands(loaded) == attentions
    rtn, hdr = quantized["rtn"], quantized["hdrq"]
    moved = [n for n, q in input_quantizers(hdr).items() if not torch.equal(q.scale, input_quantizers(rtn)[n].scale)]
    assert set(input_quantizers(hdr)) - set(moved) == set()  # every scale of an activation learns, operands' too
    merged = hdrq.merge([hdr, quantized["qdrop"]], draws=2)
    assert output(merged, x).isfinite().all()
    hdrq.save(merged, tmp_path / "merged")
    assert torch.equal(output(hdrq.load(tmp_path / "merged", model), x), output(merged, x))
    merge_files([tmp_path / "hdrq", tmp_path / "qdrop"], tmp_path / "files", draws=2)
    assert merged_content(tmp_path / "files") == merged_content(tmp_path / "merged")


def test_operands_have_the_bits_of_their_attention_and_softmax_is_unsigned():
    model = seeded(lambda: Vision(EncoderBlock))
    bits = {"stem": "W8A8", "blocks.0": "W4A6", "blocks.1.self_attention": "float", "*": "W4A4"}
    quantized = hdrq.quantize(model, X, "rtn", bits=bits)
    levels = {n: q.qmax - q.qmin + 1 for n, q in input_quantizers(quantized).items()}
    assert [levels[f"blocks.0.self_attention.{label}"] for label in ALL] == [64] * 4
    assert input_quantizers(quantized)["blocks.0.self_attention.softmax"].qmin == 0
    assert not [n for n in (*levels, *quantized_layers(quantized)) if n.startswith("blocks.1.self_attention")]
    assert report_of(quantized).attention == {"blocks.0.self_attention": ALL, "blocks.1.self_attention": []}


@pytest.mark.parametrize("name", ["torchvision", "timm, eager"])
def test_without_attention_only_layers_are_quantized(name, tmp_path):
    build, x, attentions = MODELS[name]
    model = seeded(build)
    quantized = hdrq.quantize(model, x, "qdrop", iterations=2, attention=False, progress=False)
    assert not any(report_of(quantized).attention.values())
    assert not [n for n in input_quantizers(quantized) if n.rpartition(".")[2] in ALL]
    projections = [n for n in quantized_layers(quantized) if n.endswith(("q_proj", "qkv"))]
    assert len(projections) == len(attentions)
    hdrq.save(quantized, tmp_path / "model.safetensors")
    assert torch.equal(output(hdrq.load(tmp_path / "model.safetensors", model), x), output(quantized, x))


def test_what_an_operand_quantizer_does_to_a_packed_layer():
    model = seeded(lambda: Vision(lambda: PackedLayer(False)))
    quantized = hdrq.quantize(model, X, "rtn")
    seen, read = {}, []
    attn = quantized.blocks[0].attn
    attn.qkv.register_forward_hook(lambda m, args, y: seen.update(x=args[0], y=y))
    attn.attn_drop.register_forward_hook(lambda m, args, y: read.append((args[0], y)))
    output(quantized, X)
    raw = F.linear(seen["x"], attn.qkv.weight, attn.qkv.bias)
    for label, part, whole in zip("qkv", seen["y"].chunk(3, -1), raw.chunk(3, -1), strict=True):
        assert torch.equal(part, attn.qkv.operands[label].input_quantizer(whole))
    assert torch.equal(read[0][1], attn.attn_drop.operands["softmax"].input_quantizer(read[0][0]))
    assert attn.attn_drop.operands["softmax"].input_quantizer.qmin == 0


def test_one_layer_for_keys_and_values_returns_k_and_then_v():
    model = seeded(lambda: Vision(Reduced))
    quantized = hdrq.quantize(model, IMAGES, "rtn")
    seen = {}
    attn = quantized.blocks[0].attn
    attn.kv.register_forward_hook(lambda m, args, y: seen.update(x=args[0], y=y))
    output(quantized, IMAGES)
    raw = F.linear(seen["x"], attn.kv.weight, attn.kv.bias)
    for label, part, whole in zip("kv", seen["y"].chunk(2, -1), raw.chunk(2, -1), strict=True):
        assert torch.equal(part, attn.kv.operands[label].input_quantizer(whole))
    assert attn.kv.operands["k"].input_quantizer.scale != attn.kv.operands["v"].input_quantizer.scale
    assert operand_table(quantized)["blocks.0.attn.kv"] == ["k", "v"]


@pytest.mark.parametrize(
    "names", ["q kv", "to_q to_kv", "q_proj kv_proj", "query key_value", "q_linear kv_linear", "Wq Wkv"]
)
def test_names_of_a_joint_projection(names):
    q, kv = names.split()
    quantized = hdrq.quantize(seeded(lambda: Vision(lambda: Cross(q, kv))), X, "rtn")
    assert operand_table(quantized) == {f"blocks.{i}.{n}": p for i in (0, 1) for n, p in ((q, ["q"]), (kv, ["k", "v"]))}


def test_a_layer_whose_whole_output_is_keys_and_values_too_has_no_operands():
    quantized = hdrq.quantize(seeded(lambda: Vision(lambda: Cross(width=8))), X, "rtn")
    assert operand_table(quantized) == {} and "blocks.0.to_kv" in quantized_layers(quantized)


def test_a_norm_of_k_leaves_v_to_the_joint_projection():
    quantized = hdrq.quantize(seeded(lambda: Vision(lambda: Reduced(nn.LayerNorm))), IMAGES, "rtn")
    table = {n: labels for n, labels in operand_table(quantized).items() if n.startswith("blocks.0")}
    places = {"kv": [None, "v"], "q_norm": ["q"], "k_norm": ["k"], "attn_drop": ["softmax"]}
    assert table == {f"blocks.0.attn.{n}": labels for n, labels in places.items()}


def test_norms_of_q_and_k_return_the_operands():
    model = seeded(lambda: Vision(lambda: PackedLayer(True, nn.LayerNorm)))
    quantized = hdrq.quantize(model, X, "rtn")
    table = {n: labels for n, labels in operand_table(quantized).items() if n.startswith("blocks.0")}
    places = {"qkv": [None, None, "v"], "q_norm": ["q"], "k_norm": ["k"]}
    assert table == {f"blocks.0.attn.{n}": labels for n, labels in places.items()}


def test_a_head_that_is_a_softmax_is_no_attention():
    model = seeded(lambda: nn.Sequential(Vision(Window), nn.Softmax(-1)))
    assert "1.operands.softmax" not in input_quantizers(hdrq.quantize(model, X, "rtn"))


def test_a_packed_layer_of_unequal_parts_has_no_operands():
    class Unequal(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.proj = nn.Linear(8, 18), nn.Linear(10, 8)

        def forward(self, x):
            q, k, v = self.qkv(x).split([4, 4, 10], -1)
            return self.proj(F.scaled_dot_product_attention(q, k, v))

    quantized = hdrq.quantize(seeded(lambda: Vision(Unequal)), X, "rtn")
    assert operand_table(quantized) == {} and "blocks.0.qkv" in quantized_layers(quantized)


KINDS = [
    {},
    {"batch_first": True},
    {"bias": False},
    {"kdim": 6, "vdim": 10},
    {"kdim": 6, "vdim": 10, "add_bias_kv": True, "batch_first": True},
    {"add_bias_kv": True, "add_zero_attn": True},
]
CAUSAL = torch.ones(5, 5).triu(1).bool()
PADDED = torch.arange(5) >= torch.tensor([[5], [3], [4]])
MASKS = {
    "none": {},
    "causal": {"attn_mask": CAUSAL, "is_causal": True},
    "float": {"attn_mask": torch.linspace(-1, 1, 25).view(5, 5)},
    "by head": {"attn_mask": torch.linspace(-1, 1, 150).view(6, 5, 5)},
    "padding": {"key_padding_mask": PADDED},
    "both": {"attn_mask": CAUSAL, "key_padding_mask": PADDED},
}


@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("kind", KINDS, ids=str)
@torch.no_grad()
def test_replacement_computes_what_multihead_attention_does(kind, masks):
    packed = seeded(lambda: nn.MultiheadAttention(8, 2, **kind))
    new = Attention(packed)
    if "add_bias_kv" in kind:
        masks = {**masks, "is_causal": False}  # with appended rows PyTorch's answer depends on need_weights
    generator = torch.Generator().manual_seed(2)
    widths = (8, kind.get("kdim", 8), kind.get("vdim", 8))
    q, k, v = (torch.randn(3, 5, width, generator=generator) for width in widths)
    if not kind.get("batch_first"):
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    for options in ({"need_weights": False}, {"need_weights": True}, {"average_attn_weights": False}):
        want, got = packed(q, k, v, **masks, **options), new(q, k, v, **masks, **options)
        torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-6)
        assert (got[1] is None) is (want[1] is None)
        if want[1] is not None:
            torch.testing.assert_close(got[1], want[1], rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_replacement_of_one_sample_and_of_half_types():
    packed = seeded(lambda: nn.MultiheadAttention(8, 2, batch_first=True))
    q, k = X[0], X[1, :3]
    for masks in ({}, {"key_padding_mask": torch.tensor([False, False, True])}):
        want, got = packed(q, k, k, **masks), Attention(packed)(q, k, k, **masks)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    half = seeded(lambda: Vision(EncoderBlock)).bfloat16()
    replace_attention(half, lambda m: m(X.bfloat16()))
    assert half.blocks[0].self_attention.q_proj.weight.dtype == torch.bfloat16


def test_what_the_replacement_refuses():
    new = Attention(nn.MultiheadAttention(8, 2, batch_first=True))
    with pytest.raises(ValueError, match="attn_mask must be the causal mask where is_causal is True, got None"):
        new(X, X, X, is_causal=True)
    with pytest.raises(TypeError, match=r"a mask must be bool or floating point, got torch.int64"):
        new(X, X, X, attn_mask=torch.zeros(5, 5, dtype=torch.long))
    nested = torch.nested.nested_tensor([X[0], X[1, :3]])
    with pytest.raises(ValueError, match="query must be a dense tensor, got a nested one"):
        new(nested, nested, nested)


def test_a_replacement_that_changes_outputs_is_refused():
    class Hooked(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
            self.attn.register_forward_hook(lambda m, args, y: (y[0] + 1, y[1]))

        def forward(self, x):
            return self.attn(x, x, x)[0]

    with pytest.raises(ValueError, match=r"layers in place of nn.MultiheadAttention \(attn\) must leave the outputs"):
        hdrq.quantize(seeded(Hooked), X, "rtn")


def test_padding_leaves_the_fast_path_and_nested_tensors():
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2)

        def forward(self, x, padding):
            return self.encoder(x, src_key_padding_mask=padding)

    model, padding = seeded(Padded), PADDED.repeat(2, 1)
    quantized = hdrq.quantize(model, [(X, padding)], "qdrop", iterations=2, batch_size=2, progress=False)
    assert report_of(quantized).attention == {f"encoder.layers.{i}.self_attn": ALL for i in (0, 1)}
    with torch.no_grad():
        got, want = quantized(X, padding), model(X, padding)
    assert 0 < (got - want)[~padding].norm() / want[~padding].norm() < 0.6
    assert not want[padding].any() and got[padding].all()  # PyTorch's nested tensors leave zeros


def test_shared_and_lonely_attentions():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)
            self.two = self.one

        def forward(self, x):
            x = x + self.one(x, x, x)[0]
            return self.head(x + self.two(x, x, x)[0])

    model = seeded(Shared)
    quantized = hdrq.quantize(model, X, "hdrq", iterations=2, distance=0, batch_size=2, progress=False)
    assert isinstance(quantized.one, Attention) and quantized.two is quantized.one
    assert find_blocks(quantized, lambda m: m(X)) == ["one", "head"]
    assert report_of(quantized).attention == {"one": ALL}
    assert [block.name for block in report_of(quantized).blocks] == ["one", "head"]


def test_source_has_the_same_treatment():
    model, source = (seeded(lambda: Vision(EncoderBlock), seed) for seed in (0, 1))
    options = {"iterations": 20, "batch_size": 2, "scale_step": 0, "progress": False}
    near, far = (
        hdrq.quantize(model, X, "hdrq", source=source, distance=weight, weight_lr=1e-2, **options) for weight in (10, 0)
    )
    theirs = source.blocks[1].self_attention.in_proj_weight.detach().chunk(3)

    def distance(quantized):
        own = [quantized.blocks[1].self_attention.get_submodule(f"{label}_proj").weight for label in "qkv"]
        return sum(float((a - b).norm()) for a, b in zip(own, theirs, strict=True))

    assert distance(near) < distance(far)


def test_kinds_of_attention_are_not_merged_with_each_other():
    model = seeded(lambda: Vision(EncoderBlock))
    models = [hdrq.quantize(model, X, "rtn", attention=flag) for flag in (True, False)]
    with pytest.raises(ValueError, match=r"blocks.0.self_attention.k.input.scale .* missing in number 1"):
        hdrq.merge(models)
