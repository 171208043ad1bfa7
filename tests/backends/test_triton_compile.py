"""The Triton kernels as machine code, for GPUs that are not here: what they must and must not contain.

Every launch that the ops make is caught with its arguments, compiled for each target as Triton would specialise it,
and read. Other tests interpret the kernels, and Triton decides which of the two it does once in a process: each target
has a process of its own.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Container
from pathlib import Path

import pytest

CUDA = {"sm_80": 80, "sm_90": 90, "sm_100": 100}
# The layouts that are compiled, numbers of the list in _launches. One target has all of them. The others have one scale
# in float32 (0), which launches every kernel, and one of another architecture long rows in bfloat16 (3) too.
TARGETS = {"sm_80": (0,), "sm_90": range(6), "sm_100": (0,), "gfx942": (0, 3)}
PARKED = 8  # bytes of stack: one pointer, which some releases of ptxas set aside to fit more threads


@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile_to_what_the_contract_asks(target, tmp_path):
    pytest.importorskip("triton", reason="triton is not installed")
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "HDRQ_BACKEND")}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    run = subprocess.run([sys.executable, __file__, target], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    problems = [f"{r['kernel']}: {p}" for r in json.loads(run.stdout) for p in r["problems"]]
    assert not problems, "\n".join(problems)


def _launches(warp_size: int, layouts: Container[int]) -> list[tuple]:
    """``(kernel, arguments, keywords)`` of every launch that the calls below make, on tensors without memory.

    ``layouts`` are the numbers of the grids that are launched.
    """
    import torch
    import triton

    from hdrq.kernels import _launch, distance, drop, fakequant, merging, noise, ranges, rounding, systematic, weights

    caught = []
    triton.JITFunction.run = lambda kernel, *args, grid, warmup, **keywords: caught.append((kernel, args, keywords))
    _launch.warp_size = lambda device: warp_size

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    rng, cumulative = empty(3, dtype=torch.int64), empty(257, dtype=torch.int64)
    grids = (  # shape and axis: one scale, rows longer than a tile, shorter rows, and over 2³¹ elements
        ((64, 1024), None, torch.float32),
        ((64, 1024), None, torch.bfloat16),
        ((64, 1024), 0, torch.float32),
        ((64, 1024), 0, torch.bfloat16),
        ((1024, 64), 1, torch.float32),
        ((2**16, 2**16), 0, torch.float16),
    )
    for number, (shape, axis, dtype) in enumerate(grids):
        if number not in layouts:
            continue
        x, s = empty(*shape, dtype=dtype), empty(1 if axis is None else shape[axis])
        threshold = (2**16, 2**15)[number in (1, 4)]
        for counts in (None, cumulative)[: 1 + (number in (0, 3))]:
            noise.noise_quantize(x, s, -8, 7, rng, counts, axis, threshold)
            noise.noise_quantize_backward(x, x, s, -8, 7, rng, counts, axis, 1.0, threshold)
        noise.error_histogram(x, s, -8, 7, axis)
        for zero_point in (None, s)[: 1 + (number in (1, 2))]:
            fakequant.fake_quantize(x, s, -8, 7, zero_point, axis, rng, threshold)
            fakequant.fake_quantize_backward(x, x, s, -8, 7, zero_point, axis, 1.0, rng, threshold)
            fakequant.quantize(x, s, -8, 7, zero_point, axis)
        alpha = empty(*shape)
        for beta in (None, empty())[: 1 + (number in (0, 3))]:
            rounding.adaround(x, s, alpha, -8, 7, beta, axis, number == 2)
            rounding.adaround_backward(x, empty(), x, s, alpha, -8, 7, beta, axis)
        codes = empty(*shape, dtype=torch.int8 if number % 2 else torch.int16)
        fakequant.dequantize(codes, s, None, axis)
        if number in (0, 1, 3):
            mode = ("odd", "none", None, "all")[number]
            packed, half = number == 3, empty(codes.numel() // 2, dtype=torch.uint8)
            how = ("official", "fast" if number else "exact", codes.shape, [packed] * 2, packed)
            pair = [half, half] if packed else [codes, codes]
            merging.merge(pair, [s, s], [s, s], -8, 7, rng, [0.5, 0.5], 4, mode, axis, *how)
            at_once = [0.5, 0.5], 0.1, axis, codes.shape, [packed] * 2, packed
            systematic.merge_systematic(pair, [s, s], [s, s], -8, 7, rng, *at_once)
            if number == 0:
                three = [codes] * 3, [s] * 3, [s] * 3, -8, 7, rng, [0.25, 0.25, 0.5]
                merging.merge(*three, 4, mode, axis, "first", "fast", *how[2:])
        if number < 3:
            candidates, rows = empty(64, 100), empty(64)
            ranges.range_errors(x, x if number == 2 else None, candidates, candidates, candidates, rows, 2.4)
            ranges.range_table(x, rows, rows, 2**16)
        if axis is None:
            drop.drop_mix(x, x, 5, rng)
            drop.drop_mix_backward(x, 5, rng)
            distance.source_distance(x, x)
            distance.source_distance_backward(empty(), empty(), x, x)
        if number < 5:
            rngs, counts = ([rng] * 2, [cumulative] * 2 * (number == 0)) if number % 2 == 0 else ([], [])
            block = ([x] * 2, [s] * 2, [-8] * 2, [7] * 2, [x] * 2 if number != 2 else [], rngs, counts, [axis] * 2)
            weights.quantize_weights(*block)
            weights.quantize_weights_backward([x] * 2, empty(2), empty(2), *block, [1.0] * 2)
    return caught


def _unlaunched(launches: list[tuple]) -> list[str]:
    """Kernels that no call above launches. In a family's module, a jitted function that is none is named ``_…``."""
    import importlib
    import pkgutil

    import triton

    import hdrq.kernels

    launched = {kernel.fn for kernel, _, _ in launches}
    families = [m.name for m in pkgutil.iter_modules(hdrq.kernels.__path__) if not m.name.startswith("_")]
    modules = [importlib.import_module(f"hdrq.kernels.{name}") for name in families]
    functions = [
        value
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, triton.JITFunction) and value.fn.__module__ == module.__name__ and not name.startswith("_")
    ]
    return [f.fn.__name__ for f in functions if f.fn not in launched]


def _source(kernel, args: tuple, keywords: dict):
    """The kernel with its arguments specialised as a launch does: None and 1 are constants, and 16 a known divisor."""
    import torch
    from triton.compiler import ASTSource

    names = {
        torch.float64: "fp64",
        torch.float32: "fp32",
        torch.bfloat16: "bf16",
        torch.float16: "fp16",
        torch.int64: "i64",
        torch.int16: "i16",
        torch.int8: "i8",
        torch.uint8: "u8",
    }
    constants, attributes = {}, {}

    def type_of(place: tuple, argument, specialise: bool, constant: bool):
        if isinstance(argument, tuple):
            return tuple(type_of((*place, i), each, specialise, constant) for i, each in enumerate(argument))
        if constant or argument is None or (specialise and isinstance(argument, int) and argument == 1):
            constants[place] = argument
            return "constexpr"
        divisible = False
        if isinstance(argument, torch.Tensor):
            kind = "*" + names[argument.dtype]
            divisible = argument.storage_offset() * argument.element_size() % 16 == 0
        elif isinstance(argument, float):
            kind = "fp32"
        else:
            kind = "i32" if argument < 2**31 else "i64"
            divisible = specialise and argument % 16 == 0
        if divisible:
            attributes[place] = [["tt.divisibility", 16]]
        return kind

    signature = {
        parameter.name: type_of((place,), argument, not parameter.do_not_specialize, parameter.is_constexpr)
        for place, (parameter, argument) in enumerate(_bound(kernel, args, keywords))
    }
    return ASTSource(kernel, signature, constants, attributes)


def _bound(kernel, args: tuple, keywords: dict):
    """Each parameter with its argument."""
    return zip(kernel.params, [*args, *(keywords[p.name] for p in kernel.params[len(args) :])], strict=True)


def _flat(args: tuple) -> list:
    """Arguments, those of tuples one by one."""
    return [each for a in args for each in (a if isinstance(a, tuple) else (a,))]


def _wide_bytes(kernel, args: tuple, keywords: dict, threads: int) -> int:
    """What each thread must move in accesses of 16 bytes: its share of a tile, for every tensor of floats of that size.

    Integer codes may go narrower: a thread has as many as it has floats, which are two to four times their size, and a
    warp's are neighbours all the same.
    """
    import torch

    block = keywords["BLOCK"]
    tensors = [a for a in _flat(args) if isinstance(a, torch.Tensor)]
    size = max(block, *(a.numel() for a in tensors))
    return sum(a.element_size() * block // threads for a in tensors if a.is_floating_point() and a.numel() >= size)


def _nvidia(compiled) -> tuple[list[str], int, dict]:
    """What is wrong, how many bytes a thread moves in accesses of at least 16, and the resources."""
    from triton import knobs

    ptx = compiled.asm["ptx"]
    forbidden = r"\bfma\.|\.ftz\b|div\.full|div\.approx|rcp\.approx|\b[a-z]+\.local\b"
    problems = [f"PTX must not contain {found}" for found in sorted(set(re.findall(forbidden, ptx)))]
    widths = [int(n) * int(b) // 8 for n, b in re.findall(r"\b(?:ld|st)\.global[\w.:]*\.v(\d)\.b(\d+)", ptx)]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    resources = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", listing)}
    problems += [f"must not spill, got {k} {resources[k]}" for k in ("STACK", "LOCAL") if resources[k] > PARKED]
    return problems, sum(w for w in widths if w >= 16), resources


def _amd(compiled) -> tuple[list[str], int, dict]:
    """As :func:`_nvidia`. A division, of floats or integers, takes fused multiply-adds in machine code: there they are
    looked for where LLVM's IR divides nothing, and in the IR what would allow one."""
    code, ir = compiled.asm["amdgcn"], compiled.asm["llir"]
    forbidden = r"llvm\.fma\w*|\bcontract\b|\breassoc\b|\bfast\b|\bafn\b|\barcp\b|!fpmath|preserve-sign"
    problems = [f"LLVM IR must not contain {found}" for found in sorted(set(re.findall(forbidden, ir)))]
    if not re.search(r"\b(?:fdiv|[su]div|[su]rem)\b", ir):
        fused = r"\bv_(?:pk_)?(?:fma|fmac|mac|mad)\w*_f(?:16|32|64)\w*"
        problems += [f"code must not contain {found}" for found in sorted(set(re.findall(fused, code)))]
    wanted = r"\.(vgpr_count|vgpr_spill_count|private_segment_fixed_size):\s*(\d+)"  # scalars spill to registers
    resources = {name: int(value) for name, value in re.findall(wanted, code)}
    problems += [f"must not spill, got {k} {v}" for k, v in resources.items() if k != "vgpr_count" and v]
    return problems, 16 * len(re.findall(r"\b(?:buffer|global)_(?:load|store)_dwordx4\b", code)), resources


def main(target: str) -> None:
    """Print, as JSON, one record for each kernel compiled."""
    import triton
    from triton.backends.compiler import GPUTarget

    nvidia = target in CUDA
    machine = GPUTarget("cuda", CUDA[target], 32) if nvidia else GPUTarget("hip", target, 64)
    launches = _launches(machine.warp_size, TARGETS[target])
    records = [{"kernel": name, "problems": ["no test launches it"]} for name in _unlaunched(launches)]
    for kernel, args, keywords in launches:
        options = {k: keywords[k] for k in ("num_warps", "enable_fp_fusion")}
        compiled = triton.compile(_source(kernel, args, keywords), target=machine, options=options)
        problems, wide, resources = (_nvidia if nvidia else _amd)(compiled)
        wanted = _wide_bytes(kernel, args, keywords, options["num_warps"] * machine.warp_size)
        if wide < wanted:
            problems.append(f"a thread must move {wanted} bytes in accesses of 16 or more, got {wide}")
        records.append({"kernel": _title(kernel, args, keywords), "problems": problems, "resources": resources})
    json.dump(records, sys.stdout, indent=1)


def _title(kernel, args: tuple, keywords: dict) -> str:
    import torch

    dtypes = sorted({str(a.dtype).removeprefix("torch.") for a in _flat(args) if isinstance(a, torch.Tensor)})
    constants = [str(keywords[k]) for k in ("ROWS", "NOISE") if k in keywords]
    absent = [f"no {p.name}" for p, a in _bound(kernel, args, keywords) if a is None]
    return f"{kernel.fn.__name__}({', '.join([*dtypes, *constants, *absent])})"


if __name__ == "__main__":
    # Started by path: this folder must not shadow what is installed.
    sys.path = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent]
    main(sys.argv[1])
