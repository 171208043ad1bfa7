"""``hdrq bench compat``: a step of reconstruction in the released style, before and after ``hdrq.compat.patch``.

One block of a ResNet-50 (stage 3, 14 × 14) and one of a ViT-B (197 tokens), W4A4, in both phases of HDRQ: noise, and
the fake-quantization of the last iterations, which is QDrop's as well. Four steps take turns: the released one, that
with its quantizers patched, that with the loop's mix and distance replaced as well by the ops which ``patch`` names,
and the block in full precision. What remains after subtracting the last is the quantizers' part, with Adam.
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
from hdrq.benchmarks import released
from hdrq.benchmarks.harness import Mismatch, pinned
from hdrq.benchmarks.released import BLOCKS, Fused, Released, channels, measure
from hdrq.calibrate.data import Call
from hdrq.calibrate.ranges import attach_quantizers
from hdrq.compat import patch
from hdrq.methods.loss import reconstruction_loss
from hdrq.quantizers.layers import quantized_layers
from hdrq.recipes import recipe

PHASES = {"noise": "fake_noise_quantize", "fake-quantization": "fake_quantize"}


def steps(name: str, phase: str, batch: int, device: str) -> tuple[dict, list]:
    """The four steps of a block, as functions without arguments, and what the patch replaced.

    Raises:
        Mismatch: the patch did not replace the quantizer, or the patched block has other gradients.
    """
    build, inputs = BLOCKS[name]
    torch.manual_seed(0)
    model, x = nn.Sequential(build()).eval().requires_grad_(False).to(device), inputs(batch).to(device)
    plan = recipe("hdrq", "official", iterations=10_000, batch_size=batch)
    quantized, plain = copy.deepcopy(model), copy.deepcopy(model).requires_grad_(True)
    attach_quantizers(quantized, [Call((x,), {})], {"*": "W4A4"}, plan, ["0"])
    rows = [x + 0.1 * torch.randn_like(x), x, model(x)]
    source = {n: layer.latent.detach() + 1e-3 for n, layer in quantized_layers(quantized).items()}
    functions = [getattr(released, PHASES[phase])]
    with patch(released) as patched:
        functions.append(getattr(released, PHASES[phase]))
    if functions[0] is functions[1]:
        raise Mismatch(patched.report())

    kinds = [(Released, functions[0]), (Released, functions[1]), (Fused, functions[1])]

    def build_all(keep: float) -> list[Released]:
        return [kind(copy.deepcopy(model), quantized, source, plan, function, keep) for kind, function in kinds]

    if phase != "noise":
        _same_gradients(build_all(keep=1.0), rows)
    eager, ours, fused = build_all(keep=0.5)

    def full() -> None:
        plain.zero_grad()
        reconstruction_loss(plain(x), rows[2], channels(x)).backward()

    steps = {"released": lambda: eager.step(rows), "patched": lambda: ours.step(rows)}
    return steps | {"fused": lambda: fused.step(rows), "full precision": full}, patched.replaced


def _same_gradients(steps: list[Released], rows: list[torch.Tensor]) -> None:
    """Without drops nothing is drawn, so the gradients of all steps are the same but for round-off."""
    expected, *found = ([*torch.autograd.grad(step.loss(rows), step.weights + step.scales)] for step in steps)
    for gradients in found:
        for theirs, own in zip(expected, gradients, strict=True):
            error = float((theirs - own).norm() / theirs.norm().clamp(min=1e-30))
            if not error < 1e-3:
                raise Mismatch(f"a gradient of the patched step is {error:.1e} from that of the released one")


def main(arguments: list[str] | None = None, prog: str = "python -m hdrq.benchmarks compat") -> int:
    """Verify, time, print and write: 0, or 1 if a verification failed. Exits with 2 on bad arguments."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--iterations", type=int, default=20, help="of each step, after two that warm up")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write figures (CSV, JSON) there")
    options = parser.parse_args(arguments)
    for name, least in (("iterations", 2), ("threads", 1), ("batch", 1)):
        value = getattr(options, name)
        if min(value if isinstance(value, list) else [value]) < least:
            parser.error(f"argument --{name}: must be at least {least}, got {value}")
    print(f"{facts()['processor']}, torch {torch.__version__}, {options.threads} thread{'s' * (options.threads > 1)}")
    names = "".join(f"{name:>12}" for name in ("released", "patched", "fused", "full prec."))
    print(
        "milliseconds of a step; how many times as fast the patched and the fused one are, and their quantizers' part"
    )
    print(f"{'':44}{names}{'step':>14}{'quantizers':>16}")
    records = []
    for name in BLOCKS:
        for batch in options.batch:
            for phase in PHASES:
                try:
                    records.append(_row(name, phase, batch, options))
                except Mismatch as failure:
                    print(f"{name}, {phase}, batch {batch}: verification failed: {failure}")
                    return 1
    losing = [f"{r['block']}, {r['phase']}, batch {r['batch']}" for r in records if r["patched_step_ratio"] < 1]
    print(f"Where we lose: {', '.join(losing) or 'nowhere'}")
    if options.out is not None:
        _write(records, options)
    return 0


def _row(name: str, phase: str, batch: int, options: argparse.Namespace) -> dict:
    with pinned(options.threads):
        functions, replaced = steps(name, phase, batch, options.device)
        times = measure(functions, options.iterations, options.device, warm_up=2)
    if passed := [str(r) for r in replaced if r.passed_on]:
        raise Mismatch(f"the original computed calls of the patched step: {'; '.join(passed)}")
    median = {step: 1e3 * statistics.median(samples) for step, samples in times.items()}
    part = {step: max(median[step] - median["full precision"], 1e-6) for step in ("released", "patched", "fused")}
    ratios = {
        f"{step}_{what}_ratio": of["released"] / of[step]
        for what, of in (("step", median), ("quantizers", part))
        for step in ("patched", "fused")
    }
    columns = "".join(f"{median[step]:12.2f}" for step in times) + "".join(f"{ratio:8.2f}" for ratio in ratios.values())
    print(f"{f'{name}, {phase}, batch {batch}':44}{columns}", flush=True)
    record = {"block": name, "phase": phase, "batch": batch, "threads": options.threads}
    for step, samples in times.items():
        p20, _, _, p80 = statistics.quantiles(samples, n=5, method="inclusive")
        key = step.replace(" ", "_")
        record |= {f"{key}_p20": 1e3 * p20, f"{key}_p50": median[step], f"{key}_p80": 1e3 * p80}
    return record | ratios


def _write(records: list[dict], options: argparse.Namespace) -> None:
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"compat-{options.device}"
    with open(path.with_suffix(".csv"), "w", newline="") as file:
        writer = csv.DictWriter(file, records[0])
        writer.writeheader()
        writer.writerows(records)
    record = {"title": "a step of reconstruction before and after patch, milliseconds", **facts(), "figures": records}
    path.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
