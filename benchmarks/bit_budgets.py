"""Bits chosen under a budget (``hdrq.sensitivity``) against the same mean bits for every layer, on digits.

``python -m hdrq.benchmarks.bit_budgets --out FILE`` takes the networks of ``hdrq reproduce`` (``--cache`` keeps them),
quantizes each target's network with every weight at b bits and with the bits that the sensitivity of the *source's*
network gives at b bits in the mean, so that models can be merged, and judges single models and all targets merged by
systematic rounding. Activations have 8 bits. Printed are means over seeds and the paired differences with their
intervals; the sensitivity is measured on calibration images.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

import hdrq
from hdrq.checkpoint.files import output_path, write_atomically
from hdrq.demo.run import one_thread
from hdrq.reproduce.jobs import quantized_one
from hdrq.reproduce.measures import contributions
from hdrq.reproduce.networks import networks
from hdrq.reproduce.protocol import ITERATIONS, METHODS
from hdrq.reproduce.statistics import estimate
from hdrq.reproduce.tasks import CALIBRATION, Task, task_of

RULES = ("", "systematic")  # of one model, and of all


def common_bits(task: Task, models: dict, budget: float) -> dict[str, str]:
    """The bits of each layer that are best for the source's network on calibration images of all targets."""
    images = torch.cat([task.load(domain, "train")[0][: CALIBRATION // 4] for domain in task.targets])
    found = hdrq.sensitivity(models[task.source], images, bits=f"auto:{budget}", samples=len(images))
    return found.bits(found.assign())


def judged(task: Task, models: dict, method: str, bits, seed: int) -> dict[str, dict]:
    """What test images contribute to the accuracy of each target's model, and of all merged."""
    quantized = {
        domain: quantized_one(task, models, domain, METHODS[method], bits, ITERATIONS, {}, seed)
        for domain in task.targets
    }
    merged = hdrq.merge(list(quantized.values()), seed=seed, rule="systematic")
    tests = {domain: task.load(domain, "test") for domain in task.targets}
    return {
        "single": {domain: contributions(model, *tests[domain]) for domain, model in quantized.items()},
        "merged": {domain: contributions(merged, *tests[domain]) for domain in task.targets},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path("reproduce/networks"))
    parser.add_argument("--task", default="digits")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--methods", default="RTN,QDrop")
    parser.add_argument("--budgets", default="3,4", help="whole numbers, which all weights can have alike")
    options = parser.parse_args()
    budgets = [int(budget) for budget in options.budgets.split(",")]
    output_path(options.out)
    task = task_of(options.task)
    found: dict[tuple, dict[int, dict]] = {}
    chosen = {}
    with one_thread():
        for seed in range(options.seeds):
            models = networks(task, seed, options.cache)
            for budget in budgets:
                bits = {"uniform": {"*": f"W{budget}A8"}, "chosen": common_bits(task, models, budget)}
                chosen[f"{budget} bits, seed {seed}"] = bits["chosen"]
                for method in options.methods.split(","):
                    for name, own in bits.items():
                        for what, by_domain in judged(task, models, method, own, seed).items():
                            found.setdefault((budget, method, what, name), {})[seed] = by_domain
                        print(seed, budget, method, name, flush=True)
    records = []
    for budget, method, what, name in found:
        if name == "uniform":
            uniform, ours = (found[budget, method, what, each] for each in ("uniform", "chosen"))
            each = {"uniform": [uniform], "chosen": [ours]}
            records.append(
                {
                    **{"bits": budget, "method": method, "what": what},
                    **{name: str(estimate(way)) for name, way in each.items()},
                    "difference": str(difference := estimate([ours], [uniform])),
                    "p": difference.p,
                }
            )
            print(records[-1])
    facts = {"seeds": options.seeds, "task": options.task, "records": records, "bits": chosen}
    write_atomically(options.out, json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
