"""``python -m hdrq.benchmarks.budget``: what an element of every op costs in machine code, and what speed that allows.

No GPU is needed: :mod:`hdrq.benchmarks.machine_code` compiles and counts. A kernel cannot be faster than its
instructions are issued, nor than its bytes are moved. Their ratio says which of the two it waits for: below 1 it is
memory, with room for what no count sees (latencies, and what tiles do not fill).
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from hdrq.benchmarks.machine_code import Compiler

SUSTAINED = 0.858  # of the boost clock under load: 1.7 of an H100's 1.98 GHz
COPIED = 0.9  # of a memory's published bandwidth, which a copy reaches


class Machine(NamedTuple):
    """``lanes`` are the threads for which all units of the machine issue one instruction in a cycle."""

    target: str
    lanes: int
    boost: float  # Hz
    bandwidth: float  # bytes a second

    @property
    def issue(self) -> float:
        """Instructions of single threads, a second."""
        return self.lanes * self.boost * SUSTAINED

    @property
    def copy(self) -> float:
        return self.bandwidth * COPIED


MACHINES = {
    # NVIDIA H100 data sheet, SXM: 67 TFLOPS of FP32 are 132 SMs × 128 lanes × 2 × 1.98 GHz; 3.35 TB/s.
    "H100": Machine("sm_90", 132 * 128, 1.98e9, 3.35e12),
    # NVIDIA H200 data sheet, SXM: the same chip; 4.8 TB/s.
    "H200": Machine("sm_90", 132 * 128, 1.98e9, 4.8e12),
    # NVIDIA HGX data sheet, B200: 8 GPUs have 600 TFLOPS of FP32, which are 148 SMs × 128 lanes × 2 × 1.98 GHz; 8 TB/s.
    "B200": Machine("sm_100", 148 * 128, 1.98e9, 8.0e12),
    # AMD MI300X data sheet and CDNA 3 white paper: 304 compute units of 4 × 16 lanes, 2.1 GHz; 5.3 TB/s.
    "MI300X": Machine("gfx942", 304 * 64, 2.1e9, 5.3e12),
}

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
LAYOUTS: dict[str, tuple[tuple[int, ...], int | None]] = {  # shape and axis
    "one": ((64, 1024), None),  # scale
    "rows": ((64, 1152), 0),  # of whole groups of 16 bytes, long or short: so are those of groups of 128
    "long": ((64, 1025), 0),  # rows of any other length, longer than a tile
    "short": ((64, 64, 49), 1),  # and shorter
    "huge": ((2**16, 2**16), 0),  # over 2³¹ elements
}
# The most that the time to issue may be of the time to move, on an H100.
TARGETS = {"noise": 0.85, "fakequant": 0.85, "drop": 0.85, "empirical": 1.2, "adaround": 1.0}


class Case(NamedTuple):
    """A launch of an op. ``options``: "drop", "empirical", "zero" (point), "penalty"."""

    op: str
    dtype: str
    layout: str
    options: tuple[str, ...] = ()

    @property
    def target(self) -> float:
        return TARGETS["empirical" if "empirical" in self.options else self.op.split()[0]]

    def __str__(self) -> str:
        return " ".join([self.op, *self.options, self.dtype, self.layout])


# The budgets: the most instructions that an element of float32, and of bfloat16, may cost on the straight path, on
# sm_90 and on sm_100. They are 8% above what Triton 3.9 makes, since releases differ by up to 5%.
TABLE = """
noise forward                    one      29   27
noise forward                    rows     34   29
noise forward                    long     35   32
noise forward                    short    45   44
noise forward drop               one      41   33
noise forward drop               rows     45   35
noise forward drop               long     50   40
noise forward drop               short    59   51
noise backward                   one      38   38
noise backward                   rows     46   38
noise backward                   long     62   61
noise backward                   short    56   57
noise backward drop              one      54   46
noise backward drop              rows     61   51
noise backward drop              long     81   73
noise backward drop              short    71   64
fakequant forward                one      18   17
fakequant forward                rows     25   20
fakequant forward                long     34   31
fakequant forward                short    38   39
fakequant forward drop           one      35   26
fakequant forward drop           rows     42   29
fakequant forward drop           long     50   41
fakequant forward drop           short    56   49
fakequant backward               one      30   28
fakequant backward               rows     38   32
fakequant backward               long     60   49
fakequant backward               short    46   48
fakequant backward drop          one      48   36
fakequant backward drop          rows     58   41
fakequant backward drop          long     77   56
fakequant backward drop          short    62   58
noise forward empirical          one      39   35
noise backward empirical         one      49   45
noise forward empirical drop     rows     58   48
fakequant forward zero           rows     27   23
fakequant backward zero drop     rows     59   43
drop forward                     one      23   12
drop backward                    one      24   14
adaround forward                 one      70   70
adaround backward                one      83   86
adaround forward penalty         one     149  143
adaround backward penalty        one     158  173
adaround forward penalty         rows    153  146
"""

BUDGETED = ("sm_90", "sm_100")

# What may miss its target, by the names of cases, and why. Everything else meets it.
MISSED = {
    r"(noise|fakequant) .*bf16 (long|short)": "a row that begins anywhere gives each element a scale of its own",
    r"adaround .*penalty": "two polynomials and three divisions, of which the contract rounds each operation",
}


def missed(case: Case) -> str | None:
    """Why a case may miss its target, if it may."""
    return next((reason for name, reason in MISSED.items() if re.fullmatch(name + ".*", str(case))), None)


def budgets() -> dict[Case, float]:
    """Of every case of :data:`TABLE`, its budget."""
    found = {}
    for line in TABLE.strip().splitlines():
        *words, layout, single, half = line.split()
        for dtype, budget in (("f32", single), ("bf16", half)):
            found[Case(" ".join(words[:2]), dtype, layout, tuple(words[2:]))] = float(budget)
    return found


def call(case: Case) -> str:
    """Launch the case's kernel, and others that its op needs, on tensors without memory: the kernel's name."""
    from hdrq.kernels import drop, fakequant, noise, rounding

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    shape, axis = LAYOUTS[case.layout]
    x, s = empty(*shape, dtype=DTYPES[case.dtype]), empty(1 if axis is None else shape[axis])
    rng = empty(3, dtype=torch.int64)
    counts = empty(257, dtype=torch.int64) if "empirical" in case.options else None
    threshold = 2**15 if "drop" in case.options else 2**16
    z = s if "zero" in case.options else None
    alpha, beta = empty(*shape), empty() if "penalty" in case.options else None
    grid = s, -8, 7
    if case.op == "noise forward":
        noise.noise_quantize(x, *grid, rng, counts, axis, threshold)
        return "noise_quantize_kernel"
    if case.op == "noise backward":
        noise.noise_quantize_backward(x, x, *grid, rng, counts, axis, 1.0, threshold)
        return "noise_quantize_backward_kernel"
    if case.op == "fakequant forward":
        fakequant.fake_quantize(x, *grid, z, axis, rng, threshold)
        return "fake_quantize_kernel"
    if case.op == "fakequant backward":
        fakequant.fake_quantize_backward(x, x, *grid, z, axis, 1.0, rng, threshold)
        return "fake_quantize_backward_kernel"
    if case.op == "drop forward":
        drop.drop_mix(x, x, 5, rng)
        return "drop_mix_kernel"
    if case.op == "drop backward":
        drop.drop_mix_backward(x, 5, rng)
        return "drop_mix_backward_kernel"
    if case.op == "adaround forward":
        rounding.adaround(x, s, alpha, -8, 7, beta, axis, False)
        return "adaround_kernel"
    if case.op == "adaround backward":
        rounding.adaround_backward(x, empty(), x, s, alpha, -8, 7, beta, axis)
        return "adaround_backward_kernel"
    raise ValueError(f"op must be one of the table, got {case.op}")


@dataclass(frozen=True)
class Line:
    """A case in machine code."""

    case: Case
    instructions: float
    multiplies: float
    gathers: float
    bytes: float
    registers: int
    spills: int
    problems: list[str]

    def bound(self, name: str) -> float:
        """Time to issue, of the time to move, on a machine."""
        machine = MACHINES[name]
        return self.instructions / machine.issue / (self.bytes / machine.copy)


def misses(line: Line) -> bool:
    """Whether a case is beyond its target: by more than what releases of Triton differ by."""
    return line.bound("H100") > 1.03 * line.case.target


def measured(case: Case, compiler: Compiler) -> Line:
    """A case in machine code."""
    from hdrq.benchmarks.machine_code import caught

    with caught(compiler.target.warp_size) as launches:
        kernel = call(case)
    launch = next(each for each in launches if each.name == kernel)
    code = compiler(launch)
    figures = code.instructions, code.multiplies, code.gathers, launch.bytes(), code.registers, code.spills
    return Line(case, *figures, code.problems)


def main(arguments: list[str] | None = None) -> int:
    """Print a line for every case: 0, or 1 if one is beyond its budget, or misses its target and is not said to."""
    targets = sorted({machine.target for machine in MACHINES.values()})
    parser = argparse.ArgumentParser(prog="python -m hdrq.benchmarks.budget", description=__doc__.split("\n")[0])
    parser.add_argument("--target", choices=targets, default="sm_90", help="what to compile for")
    parser.add_argument("--match", default="", metavar="TEXT", help="only the cases that have TEXT in their names")
    options = parser.parse_args(arguments)
    from hdrq.benchmarks.machine_code import Compiler

    compiler = Compiler(options.target)
    machines = {name: m for name, m in MACHINES.items() if m.target == options.target}
    for name, m in machines.items():
        print(
            f"{name}: {m.issue / 1e12:.1f}e12 instructions of single threads and {m.copy / 1e12:.2f}e12 bytes a second"
        )
    print(f"{'':42} instr budget  mult gather regs spill", *(f"{name:>20}" for name in machines))
    print(f"{'':79}", *(f"{'issue  move ps ratio':>20}" for _ in machines))
    failed = False
    for case, budget in budgets().items():
        if options.match not in str(case):
            continue
        line = measured(case, compiler)
        over = options.target in BUDGETED and line.instructions > budget
        beyond = options.target == "sm_90" and misses(line)
        why = missed(case) if beyond else None
        failed |= over or (beyond and why is None) or bool(line.problems)
        counts = f"{line.instructions:6.1f} {budget:6.0f} {line.multiplies:5.1f} {line.gathers:6.2f}"
        times = [
            f"{line.instructions / m.issue * 1e12:6.2f} {line.bytes / m.copy * 1e12:6.2f} {line.bound(name):6.2f}"
            for name, m in machines.items()
        ]
        notes = ["over its budget"] * over + [f"misses {case.target}: {why or 'must not'}"] * beyond + line.problems
        print(f"{case!s:42} {counts} {line.registers:4} {line.spills:5}", *times, *notes, flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
