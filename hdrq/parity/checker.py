"""Do all backends of this machine give the same bits? Random cases of every op, against the NumPy reference."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import count
from typing import Any

import torch

from hdrq import checks
from hdrq._version import __version__
from hdrq.backends.dispatch import available_backends, implements, use_backend
from hdrq.parity.cases import LARGE, OPS, SMALL, Draw, Op, run

ROUNDS = 2  # of all ops, however short the time: a small and a large case


@dataclass(frozen=True)
class Backend:
    """A backend of this machine; the C++ path counts once for each instruction set."""

    name: str
    device: str = "cpu"
    largest: int = LARGE  # elements: an interpreter takes the small cases alone

    @contextmanager
    def use(self) -> Iterator[None]:
        with use_backend(self.kind):
            if self.kind != "cpp":
                yield
                return
            from hdrq import _C

            previous = _C.use_isa(self.name.partition("/")[2])
            try:
                yield
            finally:
                _C.use_isa(previous)

    @property
    def kind(self) -> str:
        return self.name.partition("/")[0]

    def implements(self, op: Op) -> bool:
        return implements(self.kind, op.family)

    def takes(self, arguments: dict[str, Any]) -> bool:
        lists = (value if isinstance(value, list) else [value] for value in arguments.values())
        return all(v.numel() <= self.largest for values in lists for v in values if isinstance(v, torch.Tensor))


def available() -> list[Backend]:
    """What is compared with the reference here."""
    missing, cuda = available_backends(), torch.cuda.is_available()
    found = [Backend("torch")]
    if cuda:
        found.append(Backend("torch/cuda", "cuda"))
    if missing["cpp"] is None:
        from hdrq import _C

        found += [Backend(f"cpp/{isa}") for isa in _C.isas()]
    if missing["triton"] is None:
        found.append(Backend("triton", "cuda") if cuda else Backend("triton", largest=SMALL))
    return found


@dataclass(frozen=True)
class Mismatch:
    """The first element of a case that is not what the reference says, and all that is needed to see it again."""

    op: str
    backend: str
    seed: int
    case: int
    arguments: dict[str, str]
    result: str  # which result of the op; "error" where the op raised one
    got: str
    want: str
    index: int = 0  # in the contiguous order
    different: int = 0
    elements: int = 0

    def __str__(self) -> str:
        arguments = ", ".join(f"{name} = {value}" for name, value in self.arguments.items())
        return (
            f"{self.op} on {self.backend}: {self.result} at {self.index} is {self.got}, not {self.want}; "
            f"{self.different} of {self.elements} elements differ, first there\n"
            f"arguments: {arguments}\n"
            f"again: hdrq.parity.repeat({self.op!r}, {self.backend!r}, seed={self.seed}, case={self.case})"
        )


@dataclass
class Tally:
    """What was compared of one op on one backend."""

    op: str
    backend: str
    cases: int = 0
    elements: int = 0  # bit by bit
    sums: int = 0
    error: float = 0.0  # the largest of a sum, relative to its magnitude
    mismatch: Mismatch | None = None


@dataclass
class Report:
    """The outcome of :func:`check`."""

    seed: int
    seconds: float
    missing: dict[str, str]  # backends that are not here, and why
    tallies: list[Tally]

    @property
    def mismatches(self) -> list[Mismatch]:
        return [t.mismatch for t in self.tallies if t.mismatch is not None]

    def as_dict(self) -> dict[str, Any]:
        return {"hdrq": __version__, "torch": torch.__version__, "equal": not self.mismatches, **asdict(self)}


def check(
    seconds: float = 60.0,
    seed: int = 0,
    *,
    backends: Sequence[str] = (),
    families: Sequence[str] = (),
    progress: Callable[[float, str], None] = lambda elapsed, op: None,
) -> Report:
    """Compare the backends of this machine with the reference for a time, in two rounds of all ops at least.

    An op that differs on a backend is not run there again. ``backends`` and ``families`` leave out all others, if they
    name any; ``"cpp"`` is all its instruction sets, ``"cpp/avx2"`` one. ``progress`` is told the time and the op.

    Raises:
        TypeError, ValueError: "X must be …, got …".
    """
    checks.real("seconds", seconds, 0.0)
    checks.integer("seed", seed, 0, 2**63 - 1)
    for family in families:
        checks.choice("families", family, tuple(dict.fromkeys(op.family for op in OPS.values())))
    here, missing = available(), {name: why for name, why in available_backends().items() if why is not None}
    for name in backends:
        if name in missing:
            raise ValueError(f"backends must be available here, got {name!r}: {missing[name]}")
        checks.choice("backends", name, tuple(dict.fromkeys(n for b in here for n in (b.kind, b.name))))
    chosen = [b for b in here if not backends or b.kind in backends or b.name in backends]
    names = [name for name, op in OPS.items() if not families or op.family in families]
    tallies = {name: {b: Tally(name, b.name) for b in chosen if b.implements(OPS[name])} for name in names}
    start = time.monotonic()
    for number, name in ((number, name) for number in count() for name in names):
        elapsed = time.monotonic() - start
        if number >= ROUNDS and elapsed >= seconds:
            break
        progress(elapsed, name)
        case = Case(name, seed, number)
        for backend, tally in tallies[name].items():
            if tally.mismatch is None and backend.takes(case.arguments):
                case.compare(backend, tally)
    return Report(seed, elapsed, missing, [tally for of_op in tallies.values() for tally in of_op.values()])


def repeat(op: str, backend: str, *, seed: int, case: int) -> Mismatch | None:
    """Run one case of :func:`check` again: its mismatch, or None where all is equal."""
    (found,) = (b for b in available() if b.name == backend)
    tally = Tally(op, backend)
    Case(op, seed, case).compare(found, tally)
    return tally.mismatch


class Case:
    """The arguments of one case, and what the reference makes of them."""

    def __init__(self, op: str, seed: int, number: int):
        self.op, self.seed, self.number = op, seed, number
        self.arguments = OPS[op].arguments(Draw(op, seed, number))
        with use_backend("reference"):
            self.want = run(op, self.arguments)

    def compare(self, backend: Backend, tally: Tally) -> None:
        """Run the case on a backend, and add what is found to the tally."""
        tally.cases += 1
        try:
            with backend.use():
                got = run(self.op, self.arguments, backend.device)
        except Exception as error:  # a kernel that does not compile here is a finding as well
            tally.mismatch = self._mismatch(backend, "error", [f"{type(error).__name__}: {error}", "none"])
            return
        for name, want in self.want.items():
            result, close = got[name], OPS[self.op].close.get(name)
            if (result.dtype, result.shape) != (want.dtype, want.shape):
                shown = [f"{t.dtype} {tuple(t.shape)}" for t in (result, want)]
                tally.mismatch = self._mismatch(backend, name, shown)
                return
            if close is None:
                tally.elements += want.numel()
                right = _same(result, want)
            else:
                tally.sums += want.numel()
                errors = _errors(result, want, close.magnitude(self.arguments, want))
                tally.error = max([tally.error, *errors.flatten().tolist()])
                right = errors <= close.bound + _rounding(want.dtype)
            if not right.all():
                wrong = (~right).flatten().nonzero().flatten()
                index = int(wrong[0])
                shown = [repr(t.flatten()[index].item()) for t in (result, want)]
                tally.mismatch = self._mismatch(backend, name, shown, index, len(wrong), want.numel())
                return

    def _mismatch(self, backend: Backend, result: str, shown: list[str], *where: int) -> Mismatch:
        arguments = {name: _described(value) for name, value in self.arguments.items()}
        got, want = shown
        return Mismatch(self.op, backend.name, self.seed, self.number, arguments, result, got, want, *where)


def _same(got: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """Where bits are equal; a NaN is a NaN, whatever its payload."""
    if not want.is_floating_point():
        return got == want
    return ((got == want) & (got.signbit() == want.signbit())) | (got.isnan() & want.isnan())


def _errors(got: torch.Tensor, want: torch.Tensor, magnitude: torch.Tensor) -> torch.Tensor:
    """Relative to the magnitude; 0 where both are equal or NaN, infinite where one alone is."""
    errors = ((got.double() - want.double()).abs() / magnitude).nan_to_num(nan=torch.inf)
    return errors.masked_fill((got == want) | (got.isnan() & want.isnan()), 0.0)


def _rounding(dtype: torch.dtype) -> float:
    """What the last rounding of a half type may add."""
    return torch.finfo(dtype).eps if dtype in (torch.bfloat16, torch.float16) else 0.0


def _described(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_described, value))}]"
    if not isinstance(value, torch.Tensor):
        return repr(value)
    if value.numel() <= 4:
        return f"{value.tolist()} {value.dtype}"
    return f"{value.dtype} {tuple(value.shape)}, strides {value.stride()}, offset {value.storage_offset()}"
