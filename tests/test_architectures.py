"""Models that hdrq has never seen: all four recipes quantize them, and they are saved, loaded and merged."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hdrq
from hdrq.calibrate.report import report_of
from hdrq.prepare.units import find_blocks
from hdrq.quantizers.layers import input_quantizers, input_readers, quantized_layers

RECIPES = ("rtn", "brecq", "qdrop", "hdrq")


def images(size=32):
    return torch.randn(6, 3, size, size, generator=torch.Generator().manual_seed(0))


class Bottleneck(nn.Module):
    """As torchvision writes it."""

    def __init__(self, inside, planes, stride=1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inside, planes, 1, bias=False), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = nn.Conv2d(planes, planes, 3, stride, 1, bias=False), nn.BatchNorm2d(planes)
        self.conv3, self.bn3 = nn.Conv2d(planes, planes * 4, 1, bias=False), nn.BatchNorm2d(planes * 4)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or inside != planes * 4:
            self.downsample = nn.Sequential(
                nn.Conv2d(inside, planes * 4, 1, stride, bias=False), nn.BatchNorm2d(planes * 4)
            )

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn3(self.conv3(self.relu(self.bn2(self.conv2(out)))))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


class ResNet50(nn.Module):
    """ResNet-50's layers, 64 times narrower."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.maxpool = (
            nn.Conv2d(3, 4, 7, 2, 3, bias=False),
            nn.BatchNorm2d(4),
            nn.MaxPool2d(3, 2, 1),
        )
        inside = 4
        for stage, (planes, count) in enumerate([(1, 3), (2, 4), (4, 6), (8, 3)], 1):
            blocks = []
            for i in range(count):
                blocks.append(Bottleneck(inside, planes, 2 if i == 0 and stage > 1 else 1))
                inside = planes * 4
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        self.fc = nn.Linear(inside, 5)

    def forward(self, x):
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class SamePad(nn.Conv2d):
    """A convolution that pads inside its forward, as EfficientNet-Lite's does."""

    def forward(self, x):
        x = F.pad(x, (self.kernel_size[1] // 2,) * 2 + (self.kernel_size[0] // 2,) * 2)
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Inverted(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.expand, self.bn0 = SamePad(width, 3 * width, 1, bias=False), nn.BatchNorm2d(3 * width)
        self.depthwise = SamePad(3 * width, 3 * width, 3, groups=3 * width, bias=False)
        self.bn1, self.project = nn.BatchNorm2d(3 * width), SamePad(3 * width, width, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x):
        y = F.relu6(self.bn1(self.depthwise(F.relu6(self.bn0(self.expand(x))))))
        return x + self.bn2(self.project(y))


class EfficientNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.blocks = SamePad(3, 6, 3, stride=2), nn.ModuleList([Inverted(6), Inverted(6)])
        self.fc = nn.Linear(6, 4)

    def forward(self, x):
        x = F.relu6(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return self.fc(x.mean((2, 3)))


class Pair(nn.Module):
    def __init__(self, inside, outside):
        super().__init__()
        self.a, self.norm = nn.Conv2d(inside, outside, 3, padding=1), nn.BatchNorm2d(outside)
        self.b = nn.Conv2d(outside, outside, 3, padding=1)

    def forward(self, x, skip=None):
        x = x if skip is None else torch.cat([x, skip], 1)
        return F.relu(self.b(F.relu(self.norm(self.a(x)))))


class UNet(nn.Module):
    """An encoder and a decoder for segmentation, with transposed convolutions and skips."""

    def __init__(self):
        super().__init__()
        self.down1, self.down2, self.middle = Pair(3, 4), Pair(4, 8), Pair(8, 8)
        self.up2, self.up1 = nn.ConvTranspose2d(8, 8, 2, 2), nn.ConvTranspose2d(8, 4, 2, 2)
        self.join2, self.join1, self.head = Pair(16, 8), Pair(8, 4), nn.Conv2d(4, 3, 1)

    def forward(self, x):
        a = self.down1(x)
        b = self.down2(F.max_pool2d(a, 2))
        x = self.join2(self.up2(self.middle(F.max_pool2d(b, 2))), skip=b)
        return self.head(self.join1(self.up1(x), skip=a))


class Reused(nn.Module):
    """Functional ReLUs, and one layer that runs three times."""

    def __init__(self):
        super().__init__()
        self.first, self.again, self.last = (
            nn.Conv2d(3, 6, 3, padding=1),
            nn.Conv2d(6, 6, 3, padding=1),
            nn.Linear(6, 2),
        )

    def forward(self, x):
        x = F.relu(self.first(x))
        for _ in range(3):
            x = F.relu(self.again(x)) + x
        return self.last(x.mean((2, 3)))


class Language(nn.Module):
    """Tokens and a mask by keyword, an embedding, and an output that is tied to it."""

    def __init__(self):
        super().__init__()
        self.embedding, self.inner = nn.Embedding(20, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, *, tokens, mask):
        return self.head(F.gelu(self.inner(input=self.embedding(tokens) * mask[..., None])))


def transformer(name):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    if name == "ResNet":
        config = transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[2, 1], layer_type="basic", num_labels=5
        )
        return transformers.ResNetForImageClassification(config)
    if name == "ViT":
        sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
        config = transformers.ViTConfig(**sizes, num_hidden_layers=2, image_size=32, patch_size=8, num_labels=5)
        return transformers.ViTForImageClassification(config)
    if name == "BERT":
        sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 2}
        config = transformers.BertConfig(**sizes, vocab_size=20, max_position_embeddings=8, num_labels=3)
        return transformers.BertForSequenceClassification(config)
    config = transformers.SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 2],
        sr_ratios=[2, 1],
        hidden_sizes=[8, 16],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=16,
        num_labels=4,
    )
    return transformers.SegformerForSemanticSegmentation(config)


def tokens():
    generator = torch.Generator().manual_seed(0)
    return {"tokens": torch.randint(20, (6, 5), generator=generator), "mask": (torch.rand(6, 5) > 0.2).float()}


def sentences():
    given = tokens()
    return {"input_ids": given["tokens"], "attention_mask": given["mask"].long()}


MODELS = {
    "ResNet": (lambda: transformer("ResNet"), images, 4 + 1),
    "ViT": (lambda: transformer("ViT"), images, 4),
    "Segformer": (lambda: transformer("Segformer"), images, 9),
    "ResNet-50": (ResNet50, images, 18),
    "EfficientNet": (EfficientNet, images, 4),
    "U-Net": (UNet, lambda: images(16), 8),
    "reused": (Reused, lambda: images(8), 3),
    "BERT": (lambda: transformer("BERT"), lambda: [sentences()], 7),
    "language": (Language, lambda: [tokens()], 3),
}


def built(name, seed=0):
    build, data, _ = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build().eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2)
    return model, data()


def output(model, data):
    with torch.no_grad():
        result = model(**data[0]) if isinstance(data, list) else model(data)
    return result if isinstance(result, torch.Tensor) else result["logits"]


@pytest.mark.parametrize("name", MODELS)
def test_all_recipes_then_saved_loaded_and_merged(name, tmp_path):
    model, data = built(name)
    source, _ = built(name, seed=1)
    options = {"bits": "W4A4", "source": source, "batch_size": 2, "progress": False}
    quantized = [
        hdrq.quantize(model, data, recipe, iterations=0 if recipe == "rtn" else 2, **options) for recipe in RECIPES
    ]
    want = output(model, data)
    for each in quantized:
        assert output(each, data).isfinite().all()
        assert not torch.equal(output(each, data), want)
        assert output(each, data).shape == want.shape
    hdrq.save(quantized[3], tmp_path / "model.safetensors")
    loaded = hdrq.load(tmp_path / "model.safetensors", model)
    assert torch.equal(output(loaded, data), output(quantized[3], data))
    assert output(hdrq.merge(quantized, draws=2), data).isfinite().all()


@pytest.mark.parametrize("name", MODELS)
def test_units_of_reconstruction(name):
    model, data = built(name)
    units = find_blocks(model, lambda m: output(m, data))
    assert len(units) == MODELS[name][2], units


def test_a_transformer_block_is_one_unit_and_its_projections_share_a_quantizer():
    model, data = built("ViT")
    quantized = hdrq.quantize(model, data, "rtn")
    units = find_blocks(model, lambda m: output(m, data))
    assert [u for u in units if "layers" in u] == ["vit.layers.0", "vit.layers.1"]
    readers, owners = input_readers(quantized), input_quantizers(quantized)
    attention = [n for n in readers if n.endswith(("q_proj", "k_proj", "v_proj", "query", "key", "value"))]
    assert len(attention) == 6
    assert len({id(readers[n]) for n in attention}) == 2
    assert len(readers) > len(owners)


def test_what_is_the_same_for_every_sample_is_left_out_of_the_loop():
    model, data = built("BERT")
    quantized = hdrq.quantize(model, data, "hdrq", iterations=1, distance=0, batch_size=2, progress=False)
    learned = [block.name for block in report_of(quantized).blocks]
    assert len(learned) == 6 and "bert.embeddings.position_embeddings" not in learned
    assert "bert.embeddings.position_embeddings" in quantized_layers(quantized)


def test_a_skip_to_the_decoder_is_quantized_where_it_is_read():
    model, data = built("U-Net")
    names = set(input_quantizers(hdrq.quantize(model, data, "rtn")))
    assert {"up1", "up2", "join1.a", "join2.a", "middle"} <= names


@pytest.mark.parametrize(("placement", "extra"), [("qdrop", True), ("input", False)])
def test_placement(placement, extra):
    model, data = built("ResNet-50")
    names = input_quantizers(hdrq.quantize(model, data, "rtn", activation_placement=placement))
    assert ("layer1.1" in names) is extra
    assert ("layer1.1.conv1" in names) is not extra
    assert "layer1.1.conv2" in names


def test_a_tied_weight_stays_tied():
    model, data = built("language")
    quantized = hdrq.quantize(model, data, "hdrq", iterations=2, distance=0, progress=False)
    layers = quantized_layers(quantized)
    assert set(layers) == {"embedding", "inner", "head"}
    assert torch.equal(quantized.embedding.weight, quantized.head.weight)
    assert "embedding" not in input_readers(quantized)  # its input is integers


def test_blocks_by_name_and_layers_in_float():
    model, data = built("ResNet-50")
    bits = {"conv1": "W8A8", "fc": "float", "layer4": "W8A8", "*": "W4A4"}
    quantized = hdrq.quantize(
        model, data, "qdrop", bits=bits, blocks=["layer1", "layer2"], iterations=1, batch_size=2, progress=False
    )
    layers = quantized_layers(quantized)
    assert "fc" not in layers
    assert layers["layer4.0.conv1"].weight_quantizer.qmax == 127
    assert layers["layer1.0.conv1"].weight_quantizer.qmax == 7
    for names, message in (
        (["nowhere"], "a block must be one of"),
        (["layer1", "layer1.0"], "blocks must lie apart, got 'layer1.0' inside 'layer1'"),
        (["maxpool"], "a block must hold a convolution"),
    ):
        with pytest.raises(ValueError, match=message):
            hdrq.quantize(model, data, "rtn", blocks=names)


def test_an_input_that_leans_to_one_side_has_a_zero_point_and_is_merged():
    class Lean(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.b(F.elu(self.a(x)))

    torch.manual_seed(0)
    model, x = Lean().eval(), 4 * torch.randn(200, 6)
    models = [hdrq.quantize(model, shift + x, "rtn", bits={"*": "W8A4"}) for shift in (0, 3)]
    ranges = [(m.b.input_quantizer.qmin, m.b.input_quantizer.qmax) for m in models]
    assert all(low > -8 and high - low == 15 for low, high in ranges)
    merged = hdrq.merge(models).b.input_quantizer
    steps = [m.b.input_quantizer.scale.item() for m in models]
    low = sum(s * r[0] for s, r in zip(steps, ranges, strict=True)) / sum(steps)
    assert (merged.qmin, merged.qmax) == (round(low), round(low) + 15)


def test_a_transposed_convolution_in_groups_has_no_scale_for_each_channel():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 4, 2, groups=2)).eval()
    hdrq.quantize(model, images(8), "rtn")
    with pytest.raises(ValueError, match="1 must have one group for a scale for each output channel, got 2"):
        hdrq.quantize(model, images(8), "rtn", per_channel=True)


def test_channels_of_a_transposed_convolution_lie_on_axis_1():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 7, 2)).eval()
    quantized = hdrq.quantize(model, images(8), "rtn", per_channel=True)
    assert quantized_layers(quantized)["1"].weight_quantizer.scale.numel() == 7
