"""A step of block reconstruction: ``python -m hdrq.benchmarks.reconstruct_step --out NAME``.

One block of a ResNet-50 (stage 3, 14 × 14) and one of a ViT-B (197 tokens), W4A4, HDRQ with the official preset:
empirical noise on weights and activations, drops, distance, LSQ, Adam. Four steps take turns: hdrq's; the same step as
the released code writes it, from its description (quantizers, noise by ``multinomial``, ``rand``, a norm for each
layer, all eager, Adam as torch has it); that one with its quantizer replaced by ``hdrq.compat.patch``; and the block in
full precision, forward and backward, which is what none can save. What remains after subtracting it is the part that is
not convolution.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from hdrq.backends.info import facts
from hdrq.benchmarks.bench_noise import official as official_noise
from hdrq.benchmarks.harness import pinned
from hdrq.calibrate.cache import Cache
from hdrq.calibrate.data import Call
from hdrq.calibrate.ranges import attach_quantizers
from hdrq.calibrate.sequential import Unit
from hdrq.calibrate.trace import trace
from hdrq.compat import patch
from hdrq.methods.loss import reconstruction_loss
from hdrq.methods.reconstruct.learner import Learner
from hdrq.quantizers.layers import input_quantizers, quantized_layers
from hdrq.recipes import recipe


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
    """The released code's quantizer, in eager operations."""
    return official_noise(x, scale, True, quant_min, quant_max)


class EagerNoise(nn.Module):
    """The released code's quantizer of a weight, by a function of its own or by what is in its place."""

    def __init__(self, scale: torch.Tensor, quantize: Callable) -> None:
        super().__init__()
        self.scale, self.quantize = nn.Parameter(scale.clone()), quantize

    def forward(self, w: torch.Tensor) -> torch.Tensor:
        factor = 1 / math.sqrt(w.numel() * 7)
        s = self.scale * factor + (self.scale * (1 - factor)).detach()
        return self.quantize(w, s, -8, 7)


class EagerActivation(EagerNoise):
    """The same for an activation, an element being left as it is with probability one half."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.where(torch.rand_like(x) < 0.5, super().forward(x), x)


class Official:
    """The step as the released code writes it."""

    def __init__(
        self, block: nn.Module, quantized: nn.Module, source: dict[str, torch.Tensor], plan, quantize: Callable
    ) -> None:
        self.block, self.source, self.plan = block, source, plan
        weights, scales = [], []
        for name, layer in quantized_layers(quantized).items():
            module = block.get_submodule(name)
            noise = EagerNoise(layer.weight_quantizer.scale.detach(), quantize)
            parametrize.register_parametrization(module, "weight", noise)
            weights += [module.parametrizations.weight.original, module.parametrizations.weight[0].scale]
        for name, quantizer in input_quantizers(quantized).items():
            activation = EagerActivation(quantizer.scale.detach(), quantize)
            block.get_submodule(name).register_forward_pre_hook(lambda m, args, a=activation: (a(args[0]), *args[1:]))
            scales.append(activation.scale)
        self.optimizers = [torch.optim.Adam(weights, plan.weight_lr), torch.optim.Adam(scales, plan.activation_lr)]
        for p in weights:
            p.requires_grad_(True)

    def step(self, batch: list[torch.Tensor]) -> None:
        quantized, full, target = batch
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        x = torch.where(torch.rand_like(quantized) < 0.5, quantized, full)
        loss = reconstruction_loss(self.block(x), target, channels(x))
        for name, w in self.source.items():
            latent = self.block.get_submodule(name).parametrizations.weight.original
            loss = loss + self.plan.distance * (latent - w).norm()
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()


def channels(x: torch.Tensor) -> int:
    """The axis of channels of images, or of tokens."""
    return 1 if x.ndim == 4 else -1


def steps(name: str, samples: int, device: str) -> dict:
    """The four steps of a block, as functions without arguments."""
    build, inputs = BLOCKS[name]
    torch.manual_seed(0)
    model, x = nn.Sequential(build()).eval().requires_grad_(False).to(device), inputs(samples).to(device)
    plan = recipe("hdrq", "official", iterations=10_000, batch_size=samples)
    quantized, plain, theirs, patched = (copy.deepcopy(model) for _ in range(4))
    call = Call((x,), {})
    attach_quantizers(quantized, [call], {"*": "W4A4"}, plan, ["0"])
    (node,) = trace(model, ["0"], call)
    cache = Cache(x.device, "device", None)
    rows = [cache.rows(samples, x.shape[1:], x.dtype) for _ in range(3)]
    noisy = x + 0.1 * torch.randn_like(x)
    for row, value in zip(rows, (noisy, x, model(x)), strict=True):
        row.write(0, value)
    source = {n: layer.latent.detach() + 1e-3 for n, layer in quantized_layers(quantized).items()}
    eager = Official(theirs, quantized, source, plan, fake_noise_quantize)
    with patch(__name__) as ours:
        if not ours.replaced:
            raise RuntimeError(ours.report())
        drop_in = Official(patched, quantized, source, plan, globals()["fake_noise_quantize"])
    layers = list(quantized_layers(quantized).values())
    activations = input_quantizers(quantized)
    unit = Unit(0, node, quantized[0], model[0], layers, activations, rows[:1], rows[1:2], rows[2])
    learner = Learner(unit, plan, source, seed=0, graph="auto")
    learner.phase = learner._phase(5000)
    learner._set_modes()
    learner.row.copy_(learner.schedule[5000])
    run = learner._graphed()
    batch = [row.tensor for row in rows]
    plain.requires_grad_(True)

    def full() -> None:
        plain.zero_grad()
        reconstruction_loss(plain(x), batch[2], channels(x)).backward()

    return {
        "hdrq": lambda: run(batch),
        "official, eager": lambda: eager.step(batch),
        "official, patched": lambda: drop_in.step(batch),
        "full precision": full,
    }


def measure(functions: dict, iterations: int, device: str) -> dict[str, list[float]]:
    """Seconds of each step, the functions taking turns."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(iterations + 5):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if device == "cuda":
                torch.cuda.synchronize()
            if i >= 5:
                times[name].append(time.perf_counter() - start)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="without an ending: CSV and JSON")
    options = parser.parse_args()
    print(f"{facts()['processor']}, torch {torch.__version__}, batch {options.batch}, {options.iterations} iterations")
    records = []
    for block in BLOCKS:
        with pinned(options.threads):
            times = measure(steps(block, options.batch, options.device), options.iterations, options.device)
        median = {name: statistics.median(samples) for name, samples in times.items()}
        rest = {name: median[name] - median["full precision"] for name in median}
        print(f"\n{block}, {options.threads} thread{'s' * (options.threads > 1)}")
        for name, seconds in median.items():
            print(f"{name:18}{1e3 * seconds:10.2f} ms{1e3 * rest[name]:10.2f} ms without the convolutions")
            p20, _, _, p80 = (1e3 * q for q in statistics.quantiles(times[name], n=5))
            records.append(
                {"block": block, "step": name, "threads": options.threads, "batch": options.batch, "p20": p20}
                | {"p50": 1e3 * seconds, "p80": p80, "rest": 1e3 * rest[name]}
            )
        for faster in ("hdrq", "official, patched"):
            whole, part = (t["official, eager"] / max(t[faster], 1e-9) for t in (median, rest))
            print(f"{faster}: {whole:.2f} times as fast as a step, {part:.2f} in what is not convolution")
    if options.out is not None:
        with open(options.out.with_suffix(".csv"), "w", newline="") as file:
            writer = csv.DictWriter(file, records[0])
            writer.writeheader()
            writer.writerows(records)
        record = {"title": "a step of reconstruction, milliseconds", **facts(), "figures": records}
        options.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
