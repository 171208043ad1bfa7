"""GPTQ of one weight, against the time of its floating-point operations at the machine's own matrix product.

``python -m hdrq.benchmarks.gptq --out FILE`` rounds a weight of ``--side`` inputs and outputs (4,096) on one core, in
float64. Rounds alternate with torch's product of two such matrices, whose rate the operations are divided by. They are
counted twice: those that GPTQ has as published, with two Cholesky factors and an inverse of H between them (4/3·K³ +
N·K²), so that a time of 1 is that of a perfect implementation of it; and the fewer that are done here, one factor and
the same sums without an inverse (K³/3 + N·K²). Times are the process's on the core, which a busy machine lengthens
less than those of a clock. First the codes of a small weight are compared with the published recursion's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

import hdrq
from hdrq.benchmarks.report import hardware
from hdrq.calibrate.gptq import gptq
from hdrq.demo.run import one_thread


def published(weight: torch.Tensor, hessian: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The codes, as the paper has them: the inverse of H, its upper factor, and a step for each column."""
    w, h, s = weight.double(), hessian.clone(), scale.double()
    h.diagonal().add_(0.01 * h.diagonal().mean())
    upper = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    codes = torch.empty_like(w)
    for j in range(len(h)):
        codes[:, j] = (w[:, j] / s).round().clamp(-8, 7)
        w[:, j:] -= ((w[:, j] - codes[:, j] * s) / upper[j, j])[:, None] * upper[j, j:]
    return codes.to(torch.int8)


def case(rows: int, side: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight, the second moments of correlated inputs, and a scale for each output."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2 * side, side, generator=generator, dtype=torch.float64)
    x[:, 1:] += x[:, :-1]
    weight = torch.randn(rows, side, generator=generator)
    return weight, x.T @ x, weight.abs().amax(1) / 7


def timed(run) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


@one_thread()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--side", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    small = case(64, 256)
    if not torch.equal(gptq(*small, -8, 7).codes, published(*small)):
        raise SystemExit("gptq must give the codes of the published recursion, got others")
    side = options.side
    weight, hessian, scale = case(side, side)
    a, product = hessian.clone(), torch.empty_like(hessian)
    rounds = []
    for _ in range(options.rounds):
        gemm = timed(lambda: torch.mm(a, hessian, out=product))
        rounds.append((gemm, timed(lambda: gptq(weight, hessian, scale, -8, 7))))
    flops = {"product": 2 * side**3, "published": 7 / 3 * side**3, "done": 4 / 3 * side**3}
    rates = [flops["product"] / gemm for gemm, _ in rounds]
    ratios = {
        count: [seconds * rate / flops[count] for (_, seconds), rate in zip(rounds, rates, strict=True)]
        for count in ("published", "done")
    }
    record = {
        "device": hardware("cpu"),
        "torch": torch.__version__,
        "side": side,
        "product GFLOP/s": [rate / 1e9 for rate in rates],
        "seconds": [seconds for _, seconds in rounds],
        "over the published operations": ratios["published"],
        "over the operations done": ratios["done"],
    }
    for name, values in record.items():
        if isinstance(values, list):
            print(f"{name}: median {statistics.median(values):.2f}, least {min(values):.2f}, most {max(values):.2f}")
    if options.out is not None:
        options.out.write_text(json.dumps({"hdrq": hdrq.__version__, **record}, indent=1) + "\n")


if __name__ == "__main__":
    main()
