"""Models of many architectures, small, with data of their own."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hdrq.calibrate.report import report_of
from hdrq.methods.post_training import fold


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


def disagreements(model, quantized, data):
    """Blocks whose loss, as the loop found it last, is not that of their outputs in the quantized model.

    A loss is a mean over samples and positions of a sum over channels: Σ (y_q − y)² is that, times their number. A
    block that is called again is left out: its later inputs come from itself, and they change while it learns.
    """
    blocks = {block.name: block.loss_after for block in report_of(quantized).blocks}
    outputs = [_outputs(each, list(blocks), data) for each in (quantized, fold(model, data))]
    wrong = []
    for name, loss in blocks.items():
        if len(outputs[0][name]) > 1:
            continue
        got, want = (o[name][0] for o in outputs)
        squares = float((got.float() - want.float()).square().sum())
        ratios = [
            squares / (want.numel() / channels) / loss if loss else float(squares == 0) for channels in want.shape
        ]
        if all(abs(ratio - 1) > 1e-3 for ratio in ratios):
            wrong.append(f"the loss of block {name} must be that of the model, got {loss:.3g} and ratios {ratios}")
    return wrong


def _outputs(model, names, data):
    """The largest tensor that each block returns, over all samples."""
    found, handles = {name: [] for name in names}, []
    for name in names:

        def keep(module, args, output, name=name):
            found[name].append(max(_tensors(output), key=torch.Tensor.numel).clone())  # what follows may write into it

        handles.append(model.get_submodule(name).register_forward_hook(keep))
    with torch.no_grad():
        model(**data[0]) if isinstance(data, list) else model(data)
    for handle in handles:
        handle.remove()
    return found


def _tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for each in values for tensor in _tensors(each)]
