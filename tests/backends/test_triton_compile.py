"""The Triton kernels as machine code, for GPUs that are not here: what it must not contain, what an element costs.

Other tests interpret the kernels, and Triton decides which of the two it does once in a process: this has its own. One
target has every kernel, and every layout of the dearest; the others have a sample.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

TARGETS = {"sm_80": "few", "sm_90": "all", "sm_100": "some", "gfx942": "some"}
ROWED = ("noise forward", "noise backward", "fakequant forward", "fakequant backward")


@pytest.mark.parametrize("targets", [("sm_90",), ("sm_80", "sm_100", "gfx942")], ids=" ".join)
def test_kernels_compile_to_what_the_contract_asks_within_their_budgets(targets, tmp_path):
    pytest.importorskip("triton", reason="triton is not installed")
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "HDRQ_BACKEND")}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    run = subprocess.run([sys.executable, __file__, *targets], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert not found, "\n".join(found)


def test_only_odd_rows_of_half_types_and_the_penalty_may_miss_their_target():
    pytest.importorskip("triton", reason="triton is not installed")
    from hdrq.benchmarks.budget import LAYOUTS, Case, budgets, missed

    known = set(budgets())
    for op, layout, dtype, drop in itertools.product(
        ROWED, LAYOUTS.keys() - {"huge"}, ("f32", "bf16"), ((), ("drop",))
    ):
        case = Case(op, dtype, layout, drop)
        assert case in known
        assert (missed(case) is not None) == (dtype == "bf16" and layout in ("long", "short"))
    others = [case for case in known if missed(case) and case.op not in ROWED]
    assert all(case.op.startswith("adaround") and "penalty" in case.options for case in others)


def test_no_function_has_a_text_for_a_default():
    """Triton 3.6 makes no constant of it, and refuses to compile a call that leaves the argument out."""
    pytest.importorskip("triton", reason="triton is not installed")
    functions = [value for module in _modules() for value in vars(module).values() if hasattr(value, "arg_names")]
    defaults = {f.fn.__name__: f.fn.__defaults__ or () for f in functions}
    assert len(defaults) > 50
    assert not [name for name, own in defaults.items() if any(isinstance(value, str) for value in own)]


def _modules() -> list:
    """All modules of kernels."""
    import hdrq.kernels

    return [importlib.import_module(f"hdrq.kernels.{m.name}") for m in pkgutil.iter_modules(hdrq.kernels.__path__)]


def _cases(extent: str) -> list:
    """The lines of the table of budgets that are compiled."""
    from hdrq.benchmarks.budget import Case

    few = [Case(op, "bf16", "rows", ("drop",)) for op in ("noise forward", "fakequant backward")]
    some = [*few, Case("adaround forward", "f32", "one", ("penalty",))]
    every = [Case(op, "bf16", "rows", ("drop",)) for op in ("noise backward", "fakequant forward")]
    every += [
        Case(op, "bf16", odd, ("drop",)) for op in ("noise forward", "noise backward") for odd in ("long", "short")
    ]
    every += [Case("fakequant backward", "bf16", "long", ("drop",))]
    every += [Case(op, "f32", "one") for op in (*ROWED, "drop forward", "drop backward")]
    every += [
        Case("noise forward", "bf16", "one", ("empirical",)),
        Case("noise backward", "f32", "one", ("empirical",)),
    ]
    every += [Case("fakequant backward", "bf16", "rows", ("zero", "drop"))]
    every += [Case("adaround backward", "f32", "one", ("penalty",))]
    return {"few": few, "some": some, "all": some + every}[extent]


def _others(extent: str) -> None:
    """Launch the kernels that have no budget."""
    import torch

    from hdrq.benchmarks.budget import Case, call
    from hdrq.kernels import distance, fakequant, merging, noise, ranges, systematic, weights

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    rng, cumulative = empty(3, dtype=torch.int64), empty(257, dtype=torch.int64)
    x, half, one, rows = empty(64, 1024), empty(64, 1024, dtype=torch.bfloat16), empty(1), empty(64)
    grid = one, -8, 7
    noise.error_histogram(x, *grid, None)
    fakequant.quantize(half, rows, -8, 7, rows, 0)
    codes = empty(64, 1024, dtype=torch.int16)
    merging.merge(
        [codes] * 3, [one] * 3, [one] * 3, -8, 7, rng, [0.25, 0.25, 0.5], 4, "odd", None, "first", "fast",
        codes.shape, [False] * 3, False,
    )  # fmt: skip
    if extent != "all":
        return
    block = ([x] * 2, [one] * 2, [-8] * 2, [7] * 2, [x] * 2, [rng] * 2, [cumulative] * 2, [None] * 2)
    weights.quantize_weights(*block)
    weights.quantize_weights_backward([x] * 2, empty(2), empty(2), *block, [1.0] * 2)
    block = ([half] * 2, [rows] * 2, [-8] * 2, [7] * 2, [], [], [], [0] * 2)
    weights.quantize_weights(*block)
    weights.quantize_weights_backward([half] * 2, empty(2), empty(2), *block, [1.0] * 2)
    fakequant.fake_quantize(half, rows, -8, 7, rows, 0, None, 2**16, "reciprocal")
    fakequant.fake_quantize_backward(x, x, *grid, one, None, 1.0, None, 2**16, "shifted", "clamp-first", True)
    fakequant.fake_quantize_backward(half, half, rows, -8, 7, rows, 0, 1.0, rng, 1, "reciprocal", "pass-through", True)
    fakequant.dequantize(codes, rows, None, 0)
    packed = empty(codes.numel() // 2, dtype=torch.uint8)
    exact = "official", "exact", codes.shape, [False] * 2, False
    fast = "official", "fast", codes.shape, [True] * 2, True
    merging.merge([codes] * 2, [one] * 2, [one] * 2, -8, 7, rng, [0.5, 0.5], 4, "all", None, *exact)
    merging.merge([packed] * 2, [rows] * 2, [rows] * 2, -8, 7, rng, [0.5, 0.5], 4, "all", 0, *fast)
    at_once = [0.5, 0.5], 0.1, 0, codes.shape, [True] * 2, True
    systematic.merge_systematic([packed] * 2, [rows] * 2, [rows] * 2, -8, 7, rng, *at_once)
    candidates = empty(64, 100)
    ranges.range_errors(x, x, candidates, candidates, candidates, rows, 2.4)
    ranges.range_table(x, rows, rows, 2**16)
    distance.source_distance(x, x)
    distance.source_distance_backward(empty(), empty(), x, x)
    call(Case("noise forward", "f16", "huge"))


def _unlaunched(launches: list) -> list[str]:
    """Kernels that nothing above launches. In a family's module, a jitted function that is none is named ``_…``."""
    import triton

    launched = {launch.kernel.fn for launch in launches}
    functions = [
        value
        for module in _modules()
        if not module.__name__.rpartition(".")[2].startswith("_")
        for name, value in vars(module).items()
        if isinstance(value, triton.JITFunction) and value.fn.__module__ == module.__name__ and not name.startswith("_")
    ]
    return [f"no test launches {f.fn.__name__}" for f in functions if f.fn not in launched]


def problems(target: str) -> list[str]:
    """What is wrong with the kernels that are compiled for a target."""
    from hdrq.benchmarks import budget, machine_code

    extent, compiler, found = TARGETS[target], machine_code.Compiler(target), []
    budgets, launches = budget.budgets(), []
    for case in _cases(extent):
        with machine_code.caught(compiler.target.warp_size) as own:
            budget.call(case)
        launches += own
        line = budget.measured(case, compiler)
        found += [f"{case}: {p}" for p in line.problems]
        cost = f"{line.instructions:.1f} instructions for an element"
        if target in budget.BUDGETED and not 0 < line.instructions <= budgets[case]:
            found.append(f"{case}: must take {budgets[case]:.0f} at most, got {cost}")
        if target == "sm_90" and budget.misses(line) and budget.missed(case) is None:
            found.append(f"{case}: must be issued in {case.target} of its time in memory, got {cost}")
    if extent != "few":
        with machine_code.caught(compiler.target.warp_size) as own:
            _others(extent)
        launches += own
        found += [f"{launch.title()}: {p}" for launch in own for p in compiler(launch).problems]
    return found + (_unlaunched(launches) if extent == "all" else [])


if __name__ == "__main__":
    # Started by path: this folder must not shadow what is installed.
    sys.path = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent]
    print(json.dumps([f"{target}: {problem}" for target in sys.argv[1:] for problem in problems(target)]))
