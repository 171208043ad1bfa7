"""The kernels' launches as machine code, for GPUs that need not be here.

Whatever the ops would launch is caught with its arguments, compiled for a target as Triton would specialise it, and
read: what the contract forbids, and what one element costs.

The straight path, which is counted, goes from a kernel's entry to its end and calls no subroutine (those are the slow
ways of a division, of floats or of 64-bit integers). Where it forks it takes the cheaper way, since the dearer is for
what is rare: a histogram with hidden bins, a row that ends in the tile. In a kernel with loops it takes the dearer way,
since the cheaper leaves a loop out. Each instruction counts once for each thread, those of a loop as often as the loop
is gone through, and the sum is divided by the elements of a thread. Predicated instructions count: they are issued
whether or not they do anything. A tile is full.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hdrq.kernels import _launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
PARKED = 8  # bytes of stack: one pointer, which some releases of ptxas set aside to fit more threads
# Parameters that are no part of an op's traffic.
SCRATCH = ("row_sums", "zero_sums", "squares", "penalties", "sums", "partial")
# Passes through a kernel's loops, in the order of their code. A kernel whose loops are more or fewer has no count.
LOOPS = {"error_histogram_kernel": (16,), "range_errors_kernel": (64,)}

NAMES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
}


@dataclass(frozen=True)
class Launch:
    kernel: triton.JITFunction
    args: tuple
    keywords: dict

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    def bound(self) -> Iterator[tuple]:
        """Each parameter with its argument."""
        own = self.kernel.params
        return zip(own, [*self.args, *(self.keywords[p.name] for p in own[len(self.args) :])], strict=True)

    def tensors(self, *, scratch: bool = True) -> list[torch.Tensor]:
        named = [(p.name, a) for p, a in self.bound() if scratch or p.name not in SCRATCH]
        flat = [each for _, a in named for each in (a if isinstance(a, tuple) else (a,))]
        return [a for a in flat if isinstance(a, torch.Tensor)]

    def elements(self) -> int:
        """Of a program's tile."""
        return self.keywords["BLOCK"]

    def bytes(self) -> float:
        """What an element must move: its share of every tensor that has one entry for each of many."""
        tensors = self.tensors(scratch=False)
        largest = max(t.numel() for t in tensors)
        return sum(t.element_size() * t.numel() / largest for t in tensors if 8 * t.numel() >= largest)

    def title(self) -> str:
        dtypes = sorted({str(a.dtype).removeprefix("torch.") for a in self.tensors()})
        constants = [str(self.keywords[k]) for k in ("ROWS", "NOISE") if k in self.keywords]
        flags = [k.lower() for k in ("DROP", "HARD", "SOURCES") if self.keywords.get(k)]
        absent = [f"no {p.name}" for p, a in self.bound() if a is None]
        return f"{self.name}({', '.join([*dtypes, *constants, *flags, *absent])})"

    def source(self) -> ASTSource:
        """The kernel specialised as a launch does: None and 1 are constants, and 16 a known divisor."""
        constants: dict = {}
        attributes: dict = {}

        def type_of(place: tuple, argument, specialise: bool, constant: bool):
            if isinstance(argument, tuple):
                return tuple(type_of((*place, i), each, specialise, constant) for i, each in enumerate(argument))
            if constant or argument is None or (specialise and isinstance(argument, int) and argument == 1):
                constants[place] = argument
                return "constexpr"
            divisible = False
            if isinstance(argument, torch.Tensor):
                kind = "*" + NAMES[argument.dtype]
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
            for place, (parameter, argument) in enumerate(self.bound())
        }
        return ASTSource(self.kernel, signature, constants, attributes)

    def options(self) -> dict:
        return {k: self.keywords[k] for k in ("num_warps", "enable_fp_fusion")}


@contextmanager
def caught(warp_size: int) -> Iterator[list[Launch]]:
    """The launches made inside, none of which runs: tensors may be without memory (``device="meta"``)."""
    launches: list[Launch] = []
    before = triton.JITFunction.run, _launch.warp_size
    triton.JITFunction.run = lambda kernel, *args, grid, warmup, **keywords: launches.append(
        Launch(kernel, args, keywords)
    )
    _launch.warp_size = lambda device: warp_size
    try:
        yield launches
    finally:
        triton.JITFunction.run, _launch.warp_size = before


@dataclass
class Code:
    """What one launch compiles to. Figures are of one element on the straight path, 0 where a loop hides them."""

    launch: Launch
    problems: list[str] = field(default_factory=list)
    instructions: float = 0.0
    multiplies: float = 0.0  # of integers: half the rate of other instructions
    gathers: float = 0.0  # loads of 8 bytes or less: not those that stream
    registers: int = 0
    spills: int = 0  # bytes


class Compiler:
    """Compiles each launch once: launches that Triton specialises alike share what they become."""

    def __init__(self, target: str):
        self.target = TARGETS[target]
        self._known: dict[str, Code] = {}

    def __call__(self, launch: Launch) -> Code:
        source, options = launch.source(), launch.options()
        key = f"{launch.name} {source.signature} {source.constants} {source.attrs} {options}"
        if key not in self._known:
            compiled = triton.compile(source, target=self.target, options=options)
            threads = options["num_warps"] * self.target.warp_size
            read = _nvidia if self.target.backend == "cuda" else _amd
            self._known[key] = read(launch, compiled, threads)
        return self._known[key]


def _wide_bytes(launch: Launch, threads: int) -> int:
    """What each thread must move in accesses of 16 bytes: its share of a tile, for every tensor of floats of that size.

    Integer codes may go narrower: a thread has as many as it has floats, which are two to four times their size, and a
    warp's are neighbours all the same.
    """
    block, tensors = launch.elements(), launch.tensors(scratch=False)
    size = max(block, *(a.numel() for a in tensors))
    return sum(a.element_size() * block // threads for a in tensors if a.is_floating_point() and a.numel() >= size)


def _demand_wide(code: Code, moved: int, threads: int) -> None:
    wanted = _wide_bytes(code.launch, threads)
    if moved < wanted:
        code.problems.append(f"a thread must move {wanted} bytes in accesses of 16 or more, got {moved}")


def _nvidia(launch: Launch, compiled, threads: int) -> Code:
    from triton import knobs

    code, ptx = Code(launch), compiled.asm["ptx"]
    forbidden = r"\.ftz\b|div\.full|div\.approx|rcp\.approx|\b[a-z]+\.local\b"
    code.problems += [f"PTX must not contain {found}" for found in sorted(set(re.findall(forbidden, ptx)))]
    code.problems += [f"LLVM IR must not contain {found}" for found in fused_outside_division(compiled.asm["llir"])]
    if _fused(ptx) != _fused(compiled.asm["llir"]) or re.search(r"\bfma\.(?!rn\.f32)", ptx):
        code.problems.append("PTX must not contain fused multiply-adds that are not in LLVM IR")
    widths = [int(n) * int(b) // 8 for n, b in re.findall(r"\b(?:ld|st)\.global[\w.:]*\.v(\d)\.b(\d+)", ptx)]
    _demand_wide(code, sum(w for w in widths if w >= 16), threads)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-sass", "--dump-resource-usage", file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    resources = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", listing)}
    code.registers, code.spills = resources["REG"], sum(v for k, v in resources.items() if k != "REG" and v > PARKED)
    if code.spills:
        code.problems.append(f"must not spill, got {code.spills} bytes")
    _count(code, [_sass(line) for line in _SASS.findall(listing)], threads)
    return code


def _amd(launch: Launch, compiled, threads: int) -> Code:
    """As :func:`_nvidia`. A division, of floats or integers, takes fused multiply-adds in machine code: there they are
    looked for where LLVM's IR divides nothing, and in the IR what would allow one. Counted are the instructions of the
    vector unit, beside which others are issued from other waves."""
    code, assembly, ir = Code(launch), compiled.asm["amdgcn"], compiled.asm["llir"]
    forbidden = r"\bcontract\b|\breassoc\b|\bfast\b|\bafn\b|\barcp\b|!fpmath|preserve-sign"
    code.problems += [f"LLVM IR must not contain {found}" for found in sorted(set(re.findall(forbidden, ir)))]
    code.problems += [f"LLVM IR must not contain {found}" for found in fused_outside_division(ir)]
    if not re.search(r"\b(?:fdiv|[su]div|[su]rem)\b|llvm\.fma", ir):
        fused = r"\bv_(?:pk_)?(?:fma|fmac|mac|mad)\w*_f(?:16|32|64)\w*"
        code.problems += [f"code must not contain {found}" for found in sorted(set(re.findall(fused, assembly)))]
    wanted = r"\.(vgpr_count|vgpr_spill_count|private_segment_fixed_size):\s*(\d+)"  # scalars spill to registers
    resources = {name: int(value) for name, value in re.findall(wanted, assembly)}
    code.registers = resources.pop("vgpr_count")
    code.spills = sum(resources.values())
    if code.spills:
        code.problems.append(f"must not spill, got {code.spills} bytes")
    _demand_wide(code, 16 * len(re.findall(r"\b(?:buffer|global)_(?:load|store)_dwordx4\b", assembly)), threads)
    _count(code, _gcn(assembly), threads)
    return code


def fused_outside_division(ir: str) -> list[str]:
    """The fused multiply-adds of LLVM's IR that are not the two of a division.

    Those are ``e = fma(q, −s, x)`` and ``fma(e, r, q)``, as ``hdrq.kernels._lang.quotient`` has them; LLVM may put
    values of two elements into a vector, or take them out, in between.
    """
    value, kind = r"([^\s,;()]+)", r"(?:float|<\d+ x float>)"
    operands = ", ".join([f"{kind} {value}"] * 3)
    fused = re.findall(rf"{value} = (?:tail )?call {kind} @llvm\.fma\.\w+\({operands}\)", ir)
    made = {vector: {below, part} for vector, below, part in re.findall(
        rf"{value} = insertelement {kind} {value}, float {value},", ir)}  # fmt: skip
    made |= {part: {vector} for part, vector in re.findall(rf"{value} = extractelement {kind} {value},", ir)}

    def parts(name: str) -> set[str]:
        return set().union(*map(parts, made[name])) if name in made else {name}

    factors = {result: parts(a) | parts(b) for result, a, b, _ in fused}
    second, used = set(), set()
    for result, a, b, c in fused:
        for e in (parts(a), parts(b)):
            known = e & factors.keys()
            if known and parts(c) <= {"poison"}.union(*(factors[each] for each in known)):
                second.add(result)
                used |= known
    wrong = [f"fma {' '.join(f)}" for f in fused if f[0] not in second | used]
    if len(re.findall(r"\bcall [^@\n]*@llvm\.(?:fma|fmuladd)\.", ir)) != len(fused):
        wrong.append("fma of an unknown form")
    return wrong


def _fused(text: str) -> int:
    """Fused multiply-adds of PTX or LLVM's IR, those of vectors for each part."""
    widths = re.findall(r"\bfma\.rn\.f32(?:x(\d))?\s", text)
    widths += re.findall(r"\bcall [^@\n]*@llvm\.fma\.(?:v(\d+))?f32\(", text)
    return sum(int(width or 1) for width in widths)


@dataclass
class Instruction:
    place: int
    name: str
    conditional: bool = False
    target: int | None = None  # of a branch
    ends: bool = False  # nothing follows
    slow: bool = False  # no straight path goes through
    counts: bool = True
    multiplies: bool = False
    gathers: bool = False


_SASS = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:(@\S+)\s+)?([A-Z][\w.]*)([^;]*);", re.M)


def _sass(found: tuple[str, str, str, str]) -> Instruction:
    place, predicate, name, operands = found
    kind = name.split(".")[0]
    conditional = bool(predicate) and predicate != "@PT"
    target = re.search(r"(0x[0-9a-f]+)\s*$", operands) if kind == "BRA" else None
    # A branch may have its condition among its operands, as a predicate that is no constant.
    conditional |= kind == "BRA" and bool(re.match(r"\s*!?U?P\d", operands))
    return Instruction(
        int(place, 16),
        name,
        conditional,
        int(target[1], 16) if target else None,
        kind in ("EXIT", "RET", "BRA") and not conditional,
        kind in ("CALL", "RET") or name == "BRA.DIV",
        kind != "NOP",
        kind == "IMAD"
        and not re.search(r"MOV|SHL|IADD|\.U32$", name.replace("WIDE.U32", "WIDE").replace("HI.U32", "HI")),
        kind == "LDG" and ".128" not in name,
    )


def _gcn(assembly: str) -> list[Instruction]:
    body = assembly[: assembly.index(".section\t.rodata")] if ".section\t.rodata" in assembly else assembly
    lines = [line.split(";")[0].strip() for line in body.splitlines()]
    labels: dict[str, int] = {}
    instructions: list[Instruction] = []
    for line in lines:
        if label := re.match(r"(\.L\w+):", line):
            labels[label[1]] = len(instructions)
        elif re.match(r"[a-z]\w*_\w+", line):
            name = line.split()[0]
            instructions.append(
                Instruction(
                    len(instructions),
                    line,
                    name.startswith("s_cbranch"),
                    ends=name in ("s_endpgm", "s_branch"),
                    slow=name == "s_swappc_b64",
                    counts=name.startswith("v_"),
                    multiplies=bool(re.match(r"v_(mul_(hi|lo)|mad_[iu]64)_", name)),
                    gathers=bool(re.match(r"(buffer|global|flat)_load_\w*(?<!x4)$", name)),
                )
            )
    for instruction in instructions:
        if to := re.match(r"s_c?branch\w*\s+(\.L\w+)", instruction.name):
            instruction.target = labels[to[1]]
    return instructions


def _count(code: Code, listing: list[Instruction], threads: int) -> None:
    """Sum the straight path: the cheaper of the ways on, or the dearer, from the last instruction to the first."""
    at = {instruction.place: number for number, instruction in enumerate(listing)}
    targets = [None if i.target is None else at.get(i.target) for i in listing]
    loops = [(t, n) for n, t in enumerate(targets) if t is not None and t < n and n - t > 0]
    reached = _reached(listing, targets)
    loops = [loop for loop in loops if loop[1] in reached]
    trips = LOOPS.get(code.launch.name, ())
    if len(trips) != len(loops):
        return
    often = [1.0] * len(listing)
    for (first, last), trip in zip(loops, trips, strict=True):
        often[first : last + 1] = [times * trip for times in often[first : last + 1]]
    nowhere = (float("-inf" if loops else "inf"),) * 3
    choose = max if loops else min
    best: list[tuple[float, ...]] = [nowhere] * (len(listing) + 1)
    for n in reversed(range(len(listing))):
        i, ways = listing[n], []
        if i.slow:
            continue
        if i.name.split()[0].split(".")[0] in ("EXIT", "s_endpgm") and not i.conditional:
            ways.append((0.0,) * 3)
        target = targets[n]
        if target is not None and target > n and not i.name.startswith("s_cbranch_exec"):  # some lane is live
            ways.append(best[target])
        if not i.ends or (target is not None and target <= n):
            ways.append(best[n + 1])
        own = (i.counts * often[n], i.multiplies * often[n], i.gathers * often[n])
        way = choose(ways, default=nowhere)
        best[n] = (own[0] + way[0], own[1] + way[1], own[2] + way[2])
    elements = code.launch.elements() * code.launch.keywords.get("TILES", 1) / threads
    code.instructions, code.multiplies, code.gathers = (figure / elements for figure in best[0])


def _reached(listing: list[Instruction], targets: list[int | None]) -> set[int]:
    """What comes before the subroutines, and before the loop in which a program is parked after its end."""
    found: set[int] = set()
    ahead = [0]
    while ahead:
        n = ahead.pop()
        if n in found or n >= len(listing):
            continue
        found.add(n)
        target = targets[n]
        if target is not None and not listing[n].slow:
            ahead.append(target)
        if not listing[n].ends:
            ahead.append(n + 1)
    return found
