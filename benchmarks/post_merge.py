"""Accuracy of merges of the demo's three digit experts, quantized with and without their guidance; no timing.

``python -m hdrq.benchmarks.post_merge`` prints the figures of ``docs/post-merge.md``: for each way the accuracy on the
three tests in percent, and their mean.
"""

from __future__ import annotations

import copy
import warnings

from torch import nn

import hdrq
from hdrq.demo.data import TARGETS, load
from hdrq.demo.model import load_model
from hdrq.demo.run import one_thread
from hdrq.evaluate.metrics import accuracy
from hdrq.merging.float_merges import merge_float

SAMPLES = 256
GUIDED = [{"lam": lam} for lam in (0.0, 0.001, 0.01, 0.1, 1.0, 10.0)] + [
    {"bias": "keep"},
    {"weighting": "norm"},
    {"stream": "experts"},
    {"act_order": True},
]
LEARNED = [  # blocks with the experts' outputs as targets
    {"iterations": 400, "weight_lr": 0.027, "bias_lr": rate, "distance": distance}
    for rate in (0.0, 1e-3, 1e-2)
    for distance in (0.0, 5e-2)
]
IN_FLOAT = [
    {"stream": "merged", "bias": "solve"},
    {"stream": "merged", "bias": "keep"},
    {"stream": "experts", "bias": "solve"},
    {"stream": "experts", "bias": "keep"},
]


@one_thread()
def main() -> None:
    warnings.simplefilter("ignore")
    experts = [load_model(domain) for domain in TARGETS]
    images = [load(domain, "train")[0][:SAMPLES] for domain in TARGETS]
    tests = [load(domain, "test") for domain in TARGETS]

    def show(name: str, model: nn.Module) -> None:
        scores = [accuracy(model, *test) for test in tests]
        print(f"{name}: {', '.join(f'{s:.1f}' for s in scores)}; mean {sum(scores) / len(scores):.1f}", flush=True)

    average = copy.deepcopy(experts[0])
    average.load_state_dict(merge_float(experts))
    show("average in float", average)
    cases = [("W4A16", method, {}) for method in ("rtn", "gptq")]
    cases += [("W4A16", "epmq", options) for options in GUIDED]
    cases += [("W4A16", "regmean", options) for options in IN_FLOAT]
    cases += [("W4A4", method, {}) for method in ("rtn", "gptq", "epmq")]
    cases += [(bits, "hdrq", options) for bits in ("W4A16", "W4A4") for options in LEARNED]
    for bits, method, options in cases:
        model = hdrq.post_merge(experts, images, method=method, bits=bits, group_size=None, progress=False, **options)
        show(f"{bits} {method} {options or ''}", model)


if __name__ == "__main__":
    main()
