"""A step of block reconstruction: ``python -m hdrq.benchmarks.reconstruct_step --out NAME``.

One block of a ResNet-50 (stage 3, 14 × 14) and one of a ViT-B (197 tokens), W4A4, HDRQ with the official preset:
empirical noise on weights and activations, drops, distance, LSQ, Adam. Three steps take turns: hdrq's; the same step as
the released code writes it; and the block in full precision, forward and backward, which is what neither can save. What
remains after subtracting it is the part that is not convolution. ``hdrq bench compat`` has the released step with its
quantizers patched.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import statistics
from pathlib import Path

import torch
from torch import nn

from hdrq.backends.info import facts
from hdrq.benchmarks.harness import pinned
from hdrq.benchmarks.released import BLOCKS, Released, channels, fake_noise_quantize, measure
from hdrq.calibrate.cache import Cache
from hdrq.calibrate.data import Call
from hdrq.calibrate.ranges import attach_quantizers
from hdrq.calibrate.sequential import Unit
from hdrq.calibrate.trace import trace
from hdrq.methods.loss import reconstruction_loss
from hdrq.methods.reconstruct.learner import Learner
from hdrq.quantizers.layers import input_quantizers, quantized_layers
from hdrq.recipes import recipe


def steps(name: str, samples: int, device: str) -> dict:
    """The three steps of a block, as functions without arguments."""
    build, inputs = BLOCKS[name]
    torch.manual_seed(0)
    model, x = nn.Sequential(build()).eval().requires_grad_(False).to(device), inputs(samples).to(device)
    plan = recipe("hdrq", "official", iterations=10_000, batch_size=samples)
    quantized, plain, theirs = (copy.deepcopy(model) for _ in range(3))
    call = Call((x,), {})
    attach_quantizers(quantized, [call], {"*": "W4A4"}, plan, ["0"])
    (node,) = trace(model, ["0"], call)
    cache = Cache(x.device, "device", None)
    rows = [cache.rows(samples, x.shape[1:], x.dtype) for _ in range(3)]
    noisy = x + 0.1 * torch.randn_like(x)
    for row, value in zip(rows, (noisy, x, model(x)), strict=True):
        row.write(0, value)
    source = {n: layer.latent.detach() + 1e-3 for n, layer in quantized_layers(quantized).items()}
    eager = Released(theirs, quantized, source, plan, fake_noise_quantize)
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
        "full precision": full,
    }


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
            p20, _, _, p80 = (1e3 * q for q in statistics.quantiles(times[name], n=5, method="inclusive"))
            records.append(
                {"block": block, "step": name, "threads": options.threads, "batch": options.batch, "p20": p20}
                | {"p50": 1e3 * seconds, "p80": p80, "rest": 1e3 * rest[name]}
            )
        whole, part = (t["official, eager"] / max(t["hdrq"], 1e-9) for t in (median, rest))
        print(f"{whole:.2f} times as fast as a step, {part:.2f} in what is not convolution")
    if options.out is not None:
        with open(options.out.with_suffix(".csv"), "w", newline="") as file:
            writer = csv.DictWriter(file, records[0])
            writer.writeheader()
            writer.writerows(records)
        record = {"title": "a step of reconstruction, milliseconds", **facts(), "figures": records}
        options.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
