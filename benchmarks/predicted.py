"""``python -m hdrq.benchmarks.predicted FOLDER``: what the benches measured on a GPU, beside what the budget predicts.

An element cannot take less than its instructions take to be issued, nor than its bytes take to be moved
(:mod:`hdrq.benchmarks.budget`): the larger is the prediction, and a measurement far above it is a kernel that waits for
something that no count sees. The largest size of each op is taken, where launches weigh least.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import NamedTuple

from hdrq.benchmarks.budget import MACHINES, Case, Machine, budgets

ABOVE = 1.08  # budgets over what Triton makes

# The case of the budget that a provider of a bench launches, by operation and provider.
LAUNCHED = {
    ("noise_quantize forward, uniform", "hdrq"): ("noise forward", ()),
    ("noise_quantize backward", "hdrq"): ("noise backward", ()),
    ("fake_quantize forward", "hdrq"): ("fakequant forward", ()),
    ("fake_quantize backward", "hdrq"): ("fakequant backward", ()),
    ("drop_mix forward", "hdrq"): ("drop forward", ()),
    ("drop_mix backward", "hdrq"): ("drop backward", ()),
    ("drop_mix fused into fake_quantize", "hdrq"): ("fakequant forward", ("drop",)),
    ("adaround forward", "hdrq"): ("adaround forward", ("penalty",)),
    ("adaround forward", "hdrq, without the penalty"): ("adaround forward", ()),
}
DTYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "bf16"}  # half types cost alike


class Line(NamedTuple):
    """Picoseconds of an element: measured, to issue and to move."""

    case: Case
    elements: int
    measured: float
    issue: float
    move: float

    @property
    def ratio(self) -> float:
        return self.measured / max(self.issue, self.move)


def machine_of(gpu: str) -> Machine | None:
    """The published rates of a GPU of this name."""
    return next((machine for name, machine in MACHINES.items() if name in gpu), None)


def lines(record: dict) -> list[Line]:
    """A file of figures that a bench wrote: its ops that have a budget, each at its largest size.

    Raises:
        ValueError: the file is of no GPU whose rates are known.
    """
    machine = machine_of(record["gpu"])
    if machine is None:
        raise ValueError(f"the GPU must be one of {', '.join(MACHINES)}, got {record['gpu']}")
    instructions, largest = budgets(), {}
    known = [each for each in record["figures"] if (each.get("operation"), each.get("provider")) in LAUNCHED]
    for figure in sorted(known, key=lambda each: each["elements"]):
        op, options = LAUNCHED[figure["operation"], figure["provider"]]
        case = Case(op, DTYPES[figure["dtype"]], "one", options)
        issue = instructions[case] / ABOVE / machine.issue * 1e12
        move = figure["bytes_per_element"] / machine.copy * 1e12
        largest[case] = Line(case, figure["elements"], figure["p50"] * 1e3, issue, move)
    return list(largest.values())


def main(arguments: list[str] | None = None) -> int:
    """Print a line for every op measured: 0, or 1 if the folder holds no figures of a GPU that is known."""
    parser = argparse.ArgumentParser(prog="python -m hdrq.benchmarks.predicted", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="where the benches wrote their JSON")
    records = [json.loads(path.read_text()) for path in sorted(parser.parse_args(arguments).folder.glob("*.json"))]
    found = [line for record in records if machine_of(record.get("gpu", "")) for line in lines(record)]
    if not found:
        print(f"no figures of {', '.join(MACHINES)} there")
        return 1
    print(f"{'picoseconds an element':42}   elements measured issue  move measured / predicted")
    for line in found:
        times = f"{line.measured:8.2f} {line.issue:5.2f} {line.move:5.2f} {line.ratio:8.2f}"
        print(f"{line.case!s:42} {line.elements:10,} {times}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
