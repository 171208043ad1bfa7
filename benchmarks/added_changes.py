"""What is left of a small change that goes into integer codes, rule by rule.

``python -m hdrq.benchmarks.added_changes --out FILE`` measures two things. First, one weight of 1,024 × 1,024 at 4 bits
and a change of rank 8, 0.05 to 1 steps large (root mean square): the share kept, and the error of the outputs' change
for independent inputs and for correlated ones (64 directions and a tenth of noise), which calibrated rounding is shown
a sample of. Second, an adapter that is trained: a network of three linear layers learns the demo's font digits, a LoRA
of rank 4 the labelled training digits of another domain; it is added to the quantized network, and the accuracy on that
domain's test digits is taken. Its change is also taken times 0.25, and unrounded, in float on the quantized weights.
"""

from __future__ import annotations

import argparse
import copy
import json
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import hdrq
from hdrq.calibrate.moments import Moments
from hdrq.demo.data import SOURCE, load
from hdrq.demo.run import one_thread
from hdrq.evaluate.metrics import accuracy
from hdrq.merging.changed import RULES, changed_weight
from hdrq.merging.weights import Product, Quantized
from hdrq.quantizers.layers import quantized_layers

SIDE, RANK = 1024, 8
SIZES = (0.05, 0.2, 0.5, 1.0)  # steps
DOMAINS = ("mnist", "optdigits", "photos")
LAYERS = ("0", "2", "4")


def one_weight(seed: int) -> list[dict]:
    """A record for each size of the change and each rule."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    weight = normal(SIDE, SIDE)
    scale = hdrq.ops.search_scale(weight, -8, 7, axis=0)
    codes = hdrq.ops.quantize(weight, scale, -8, 7, axis=0)
    old = Quantized(codes, scale, None, {"range": [-8, 7], "axis": 0})
    mixing, left, right = normal(64, SIDE), normal(SIDE, RANK), normal(RANK, SIDE)
    x, unseen = (normal(4096, 64) @ mixing + 0.1 * normal(4096, SIDE) for _ in range(2))
    seen = Moments((x.T @ x).double()[None])
    records = []
    for size in SIZES:
        product = (left @ right) / scale[:, None]
        change = Product(left, right, size / float(product.square().mean().sqrt()))
        for rule in RULES:
            new, found = changed_weight("weight", old, change, rule, hdrq.rng_state(seed), seen)
            delta = change.rows(slice(None)).float()
            missed = (new.float() - codes.float()) * scale[:, None] - delta
            error = float((unseen @ missed.T).norm() / (unseen @ delta.T).norm())
            records.append({"steps": size, "rule": rule, "kept": found.kept, "error": found.error, "inputs": error})
    return records


def trained(domain: str, seed: int) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A network that has learned fonts, and a LoRA for a domain, as peft names its tensors; alpha is 2·r."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(3 * 32 * 32, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    _fit(net.parameters(), lambda x: net(x), *load(SOURCE, "train"), epochs=6)
    layers = {name: net[int(name)] for name in LAYERS}
    pairs = {n: (torch.randn(4, m.in_features) * 0.02, torch.zeros(m.out_features, 4)) for n, m in layers.items()}
    leaves = [factor.requires_grad_() for pair in pairs.values() for factor in pair]

    def adapted(x: torch.Tensor) -> torch.Tensor:
        for number, layer in enumerate(net):
            x, read = layer(x), x
            if str(number) in pairs:
                a, b = pairs[str(number)]
                x = x + 2 * (read @ a.T) @ b.T
        return x

    _fit(leaves, adapted, *load(domain, "train"), epochs=20)
    named = {f"{n}.lora_{f}": v.detach() for n, pair in pairs.items() for f, v in zip("AB", pair, strict=True)}
    return net.eval(), {f"base_model.model.{name}.weight": value for name, value in named.items()}


def _fit(parameters, run, images: torch.Tensor, labels: torch.Tensor, epochs: int) -> None:
    optimizer = torch.optim.AdamW(list(parameters), lr=1e-3)
    for _ in range(epochs):
        for index in torch.randperm(len(images)).split(64):
            loss = F.cross_entropy(run(images[index].flatten(1)), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def adapters(bits: str, seeds: int) -> list[dict]:
    """A record for each domain, scale of the change and seed of the training."""
    records = []
    for domain in DOMAINS:
        for seed in range(seeds):
            net, lora = trained(domain, seed)
            images, test = load(domain, "train")[0].flatten(1), load(domain, "test")
            test = (test[0].flatten(1), test[1])
            model = hdrq.quantize(net, images, "rtn", bits={"*": bits}, per_channel=True, progress=False)
            for scale in (0.25, 1.0):
                change = hdrq.Change(lora, alpha=8, scale=scale)
                scores = {"none": accuracy(model, *test), "unrounded": accuracy(_unrounded(model, lora, scale), *test)}
                kept, steps = {}, 0.0
                for rule in RULES:
                    found = hdrq.add(model, change, rule=rule, seed=seed, calibration=images)
                    scores[rule], kept[rule] = accuracy(found.model, *test), found.report.kept
                    steps = max(t.steps for t in found.report.tensors)
                records.append({"bits": bits, "domain": domain, "scale": scale, "seed": seed, "largest steps": steps})
                records[-1] |= {"accuracy": scores, "kept": kept}
    return records


def _unrounded(model: nn.Module, lora: dict[str, torch.Tensor], scale: float) -> nn.Module:
    """The quantized weights with the change on them in float: no grid has such values."""
    result = copy.deepcopy(model)
    for name, layer in quantized_layers(result).items():
        a, b = (lora[f"base_model.model.{name}.lora_{factor}.weight"] for factor in "AB")
        layer.latent.data += 2 * scale * b @ a
        layer.weight_quantizer.mode = "float"
    return result


@one_thread()
def main() -> None:
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3, help="of the training")
    arguments = parser.parse_args()
    weights = one_weight(0)
    for record in weights:
        print(", ".join(f"{k} {v:.3f}" if isinstance(v, float) else v for k, v in record.items()), flush=True)
    found = []
    for bits in ("W4A8", "W3A8"):
        found += adapters(bits, arguments.seeds)
        for domain in DOMAINS:
            for scale in (0.25, 1.0):
                rows = [r for r in found if (r["bits"], r["domain"], r["scale"]) == (bits, domain, scale)]
                means = {k: sum(r["accuracy"][k] for r in rows) / len(rows) for k in rows[0]["accuracy"]}
                kept = {k: sum(r["kept"][k] for r in rows) / len(rows) for k in rows[0]["kept"]}
                figures = [f"{k} {v:.1f}" + (f" ({kept[k]:.2f})" if k in kept else "") for k, v in means.items()]
                print(f"{bits} {domain} × {scale}: {', '.join(figures)}", flush=True)
    facts = {"hdrq": hdrq.__version__, "torch": torch.__version__, "seeds": arguments.seeds}
    arguments.out.write_text(json.dumps({**facts, "weight": weights, "adapters": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
