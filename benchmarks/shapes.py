"""Shapes of real layers: what reconstruction quantizes, and what it passes on.

Weights are those of the published models; activations come in batches of 32 images at 224 pixels (ResNet-50, ViT-B/16)
and of 8 crops at 512 pixels (MiT-B5, SegFormer's encoder).
"""

from __future__ import annotations

SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "resnet50": {
        "layer1 conv3": (256, 64, 1, 1),
        "layer2 conv2": (128, 128, 3, 3),
        "layer3 conv2": (256, 256, 3, 3),
        "layer4 conv2": (512, 512, 3, 3),
        "layer1 activation": (32, 256, 56, 56),
        "layer4 activation": (32, 2048, 7, 7),
    },
    "vit-b": {
        "patch embedding": (768, 3, 16, 16),
        "attention qkv": (2304, 768),
        "mlp fc1": (3072, 768),
        "tokens": (32, 197, 768),
        "mlp hidden": (32, 197, 3072),
    },
    "mit-b5": {
        "stage 1 reduction": (64, 64, 8, 8),
        "stage 3 query": (320, 320),
        "stage 3 mlp fc1": (1280, 320),
        "stage 4 mlp fc1": (2048, 512),
        "stage 1 tokens": (8, 16384, 64),
        "stage 3 tokens": (8, 1024, 320),
    },
}
