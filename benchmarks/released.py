"""A step of reconstruction as the released codes write it, from their description, on blocks of two networks.

Quantizers, noise by ``multinomial``, ``rand`` for the drops and a norm for each layer, all eager; Adam as torch has it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from hdrq import ops
from hdrq.benchmarks.bench_noise import official as official_noise
from hdrq.methods.loss import reconstruction_loss
from hdrq.quantizers.layers import input_quantizers, quantized_layers
from hdrq.rng import rng_state


class Bottleneck(nn.Module):
    """A residual block of ResNet-50 (He et al. 2016), BatchNorm folded: (N, 4C, H, W) to the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4 * width, width, 1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.conv3 = nn.Conv2d(width, 4 * width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x + self.conv3(F.relu(self.conv2(F.relu(self.conv1(x))))))


class Transformer(nn.Module):
    """A block of ViT (Dosovitskiy et al. 2021): (B, N, C) to the same."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


BLOCKS = {
    "ResNet-50 block": (lambda: Bottleneck(256), lambda n: torch.randn(n, 1024, 14, 14).relu()),
    "ViT-B block": (lambda: Transformer(768, 12), lambda n: torch.randn(n, 197, 768)),
}


def fake_noise_quantize(x: torch.Tensor, scale: torch.Tensor, quant_min: int, quant_max: int) -> torch.Tensor:
    """The released HDRQ's quantizer while it adds noise."""
    return official_noise(x, scale, True, quant_min, quant_max)


def fake_quantize(x: torch.Tensor, scale: torch.Tensor, quant_min: int, quant_max: int) -> torch.Tensor:
    """The released quantizer of the last iterations, and QDrop's."""
    v = x / scale
    return torch.clamp((v.round() - v).detach() + v, quant_min, quant_max) * scale


class Weight(nn.Module):
    """A weight's quantizer, by one of those functions or by what is in its place."""

    def __init__(self, scale: torch.Tensor, quantize: Callable) -> None:
        super().__init__()
        self.scale, self.quantize = nn.Parameter(scale.clone()), quantize

    def forward(self, w: torch.Tensor) -> torch.Tensor:
        factor = 1 / math.sqrt(w.numel() * 7)
        s = self.scale * factor + (self.scale * (1 - factor)).detach()
        return self.quantize(w, s, -8, 7)


class Activation(Weight):
    """The same for an activation, some elements of which are not quantized."""

    def __init__(self, scale: torch.Tensor, quantize: Callable, mix: Callable) -> None:
        super().__init__(scale, quantize)
        self.mix = mix

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mix(super().forward(x), x)


class Released:
    """The step of a block whose quantized copy says where quantizers are, and with which scales."""

    def __init__(
        self,
        block: nn.Module,
        quantized: nn.Module,
        source: dict[str, torch.Tensor],
        plan,
        quantize: Callable,
        keep: float = 0.5,
    ) -> None:
        self.block, self.source, self.plan, self.keep = block, source, plan, keep
        self.weights: list[nn.Parameter] = []
        self.scales: list[nn.Parameter] = []
        for name, layer in quantized_layers(quantized).items():
            module = block.get_submodule(name)
            quantizer = Weight(layer.weight_quantizer.scale.detach(), quantize)
            parametrize.register_parametrization(module, "weight", quantizer)
            self.weights += [module.parametrizations.weight.original, module.parametrizations.weight[0].scale]
        for name, own in input_quantizers(quantized).items():
            activation = Activation(own.scale.detach(), quantize, self.mix)
            block.get_submodule(name).register_forward_pre_hook(lambda m, args, a=activation: (a(args[0]), *args[1:]))
            self.scales.append(activation.scale)
        self.optimizers = [
            torch.optim.Adam(self.weights, plan.weight_lr),
            torch.optim.Adam(self.scales, plan.activation_lr),
        ]
        for p in self.weights:
            p.requires_grad_(True)

    def mix(self, quantized: torch.Tensor, full: torch.Tensor) -> torch.Tensor:
        """An element is the first one's with probability ``keep``."""
        return quantized if self.keep == 1 else torch.where(torch.rand_like(full) < self.keep, quantized, full)

    def distance(self, weight: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        return (weight - source).norm()

    def loss(self, batch: list[torch.Tensor]) -> torch.Tensor:
        """Of a batch: the quantized input, the one of full precision, the target."""
        quantized, full, target = batch
        x = self.mix(quantized, full)
        loss = reconstruction_loss(self.block(x), target, channels(x))
        for name, w in self.source.items():
            latent = self.block.get_submodule(name).parametrizations.weight.original
            loss = loss + self.plan.distance * self.distance(latent, w)
        return loss

    def step(self, batch: list[torch.Tensor]) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        self.loss(batch).backward()
        for optimizer in self.optimizers:
            optimizer.step()


class Fused(Released):
    """That step, the mix and the distance replaced by the ops that ``patch`` names."""

    drawn = 0

    def mix(self, quantized: torch.Tensor, full: torch.Tensor) -> torch.Tensor:
        self.drawn += 1
        return ops.drop_mix(quantized, full, self.keep, rng_state(0, 0, self.drawn, full.device))

    def distance(self, weight: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        return ops.source_distance(weight, source)


def channels(x: torch.Tensor) -> int:
    """The axis of channels of images, or of tokens."""
    return 1 if x.ndim == 4 else -1


def measure(functions: dict, iterations: int, device: str, warm_up: int = 5) -> dict[str, list[float]]:
    """Seconds of each step, the functions taking turns."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(warm_up + iterations):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if device == "cuda":
                torch.cuda.synchronize()
            if i >= warm_up:
                times[name].append(time.perf_counter() - start)
    return times
