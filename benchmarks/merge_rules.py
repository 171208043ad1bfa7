"""How rules of a merge compare, on the demo's models: harmonic mean of the accuracies, over seeds of the merge.

``python -m hdrq.benchmarks.merge_rules --out FILE`` quantizes the three adapted models (one seed, 400 iterations a
block) with HDRQ and QDrop at three bit widths, and merges all three and each pair of them: to nearest, with noise (30
draws), and systematically. Nothing is chosen by what comes out.
"""

from __future__ import annotations

import argparse
import json
from itertools import combinations
from pathlib import Path

import torch

import hdrq
from hdrq.demo.data import TARGETS, load
from hdrq.demo.model import load_model
from hdrq.demo.run import CALIBRATION, ITERATIONS, one_thread
from hdrq.evaluate.metrics import accuracy, harmonic_mean

RULES = {"half-even": {}, "noise": {"draws": 30}, "systematic": {}}
BITS = ("W4A4", "W3A3", "W2A4")


def quantized(recipe: str, bits: str, iterations: int) -> dict[str, torch.nn.Module]:
    source = load_model("source") if recipe == "hdrq" else None
    return {
        domain: hdrq.quantize(
            load_model(domain),
            load(domain, "train")[0][:CALIBRATION],
            recipe,
            bits=bits,
            source=source,
            iterations=iterations,
            progress=False,
        )
        for domain in TARGETS
    }


def compare(models: dict[str, torch.nn.Module], seeds: int) -> list[dict]:
    """One record for each set of domains: the scores of each rule, one for each seed."""
    tests = {domain: load(domain, "test") for domain in TARGETS}
    records = []
    for domains in (*combinations(TARGETS, 2), TARGETS):
        scores = {}
        for rule, options in RULES.items():
            own = range(1 if rule == "half-even" else seeds)
            merges = [hdrq.merge([models[d] for d in domains], rule=rule, seed=s, **options) for s in own]
            scores[rule] = [harmonic_mean(accuracy(m, *tests[d]) for d in domains) for m in merges]
        records.append({"domains": domains, "scores": scores})
    return records


@one_thread()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5, help="of the merge")
    parser.add_argument("--iterations", type=int, default=ITERATIONS)
    arguments = parser.parse_args()
    records = []
    for bits in BITS:
        for recipe in ("hdrq", "qdrop"):
            for record in compare(quantized(recipe, bits, arguments.iterations), arguments.seeds):
                records.append({"recipe": recipe, "bits": bits, **record})
                means = {rule: torch.tensor(s).mean().item() for rule, s in record["scores"].items()}
                spreads = {rule: torch.tensor(s).std(correction=0).item() for rule, s in record["scores"].items()}
                figures = ", ".join(f"{rule} {means[rule]:.1f} ± {spreads[rule]:.1f}" for rule in RULES)
                print(f"{recipe} {bits} {' + '.join(record['domains'])}: {figures}", flush=True)
            facts = {"hdrq": hdrq.__version__, "torch": torch.__version__, "iterations": arguments.iterations}
            arguments.out.write_text(json.dumps({**facts, "records": records}, indent=1) + "\n")


if __name__ == "__main__":
    main()
