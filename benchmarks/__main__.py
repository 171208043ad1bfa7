"""``python -m hdrq.benchmarks``: ``hdrq bench``, without the packages that the rest of the command line needs."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from hdrq.benchmarks import report
from hdrq.benchmarks.harness import CORES, Plan, families, run
from hdrq.benchmarks.shapes import SHAPES

SIZES = {"cpu": [2**12, 2**16, 2**20, 2**24], "cuda": [2**12, 2**16, 2**20, 2**24, 2**26]}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(arguments: list[str] | None = None, prog: str = "python -m hdrq.benchmarks") -> int:
    """Run benches, print and write what they say: 0, or 1 if a verification failed. Exits with 2 on bad arguments.

    ``compat`` and ``deploy`` as the first argument are benches of their own, with arguments of their own.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] in (["compat"], ["deploy"]):
        bench = importlib.import_module(f"hdrq.benchmarks.{arguments[0]}")
        return bench.main(arguments[1:], prog=f"{prog} {arguments[0]}")
    parser = _parser(prog)
    options = parser.parse_intermixed_args(arguments)  # families may stand anywhere
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: cuda is not available here")
    if options.out is not None:
        try:
            options.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(
                f"argument --out: must be a folder that can be written to, got {options.out} ({error.strerror})"
            )
    with _progress() as show:
        result = run(_plan(options), show)
    if options.out is not None:
        report.write(result, options.device, options.out)
    print(json.dumps(report.record(result, options.device)) if options.json else report.text(result, options.device))
    return 1 if result.failures else 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        """One line, as the other commands say it."""
        self.exit(2, f"hdrq: {message}; {self.prog} --help lists what there is\n")


# Plain argparse, not typer: it takes several values after one option, and is there where only torch and triton are.
def _parser(prog: str) -> argparse.ArgumentParser:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    known = families()
    parser = _Parser(
        prog=prog,
        description="Verify the ops, then time them beside a copy, the eager formula and torch.compile.",
        epilog="In place of FAMILY: compat, a step in the released style before and after hdrq.compat.patch; deploy, "
        "exported models in other runtimes. compat --help and deploy --help have their options.",
    )
    add = parser.add_argument
    add("families", nargs="*", type=_one_of(known), metavar="FAMILY", help=f"all if none is given: {', '.join(known)}")
    add("--sizes", type=_integer(1), nargs="+", metavar="N", help="elements")
    add("--shapes", choices=SHAPES, nargs="+", default=[], metavar="NET", help=f"layers of {', '.join(SHAPES)}")
    add("--dtypes", choices=DTYPES, nargs="+", default=["float32"], metavar="T", help=", ".join(DTYPES))
    add("--threads", type=_integer(1, len(CORES)), nargs="+", metavar="N", help="default: one, then all")
    add("--device", choices=list(SIZES), default=device)
    add("--seconds", type=_seconds, help="stop after this time; what was not reached is named")
    add("--quick", action="store_true", help="two sizes, all threads, ten seconds, no torch.compile")
    add("--json", action="store_true", help="print JSON in place of tables")
    add("--out", type=Path, metavar="DIR", help="write figures (CSV, JSON) and plots there")
    return parser


def _plan(options: argparse.Namespace) -> Plan:
    sizes = options.sizes or ([] if options.shapes else [2**12, 2**20] if options.quick else SIZES[options.device])
    cases = {str(n): (n,) for n in sizes}
    cases |= {f"{net} {layer}": shape for net in options.shapes for layer, shape in SHAPES[net].items()}
    every = [len(CORES)] if options.quick or options.device == "cuda" else [1, len(CORES)]
    return Plan(
        families=_once(options.families or families()),
        cases=list(cases.items()),
        dtypes=[DTYPES[name] for name in _once(options.dtypes)],
        threads=_once(options.threads or every),
        device=options.device,
        seconds=options.seconds or (10.0 if options.quick else None),
        compile=not options.quick,
    )


def _once(values: list) -> list:
    """The values without those that repeat."""
    return list(dict.fromkeys(values))


def _one_of(known: list[str]) -> Callable[[str], str]:
    def family(value: str) -> str:
        if value not in known:
            raise argparse.ArgumentTypeError(f"family must be one of {', '.join(known)}, got {value!r}")
        return value

    return family


def _integer(low: int, high: int | None = None) -> Callable[[str], int]:
    def integer(value: str) -> int:
        if not value.isdecimal() or int(value) < low or (high is not None and int(value) > high):
            bounds = f"of at least {low}" if high is None else f"in [{low}, {high}]"
            raise argparse.ArgumentTypeError(f"must be an integer {bounds}, got {value!r}")
        return int(value)

    return integer


def _seconds(value: str) -> float:
    try:
        seconds = float(value)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise argparse.ArgumentTypeError(f"must be a positive number, got {value!r}")
    return seconds


@contextmanager
def _progress() -> Iterator[Callable[[str, float], None]]:
    """A bar on stderr, where that is a terminal and rich is installed."""
    try:
        from rich.progress import BarColumn, Console, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        yield lambda text, share: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    console = Console(stderr=True)
    quiet = {"console": console, "disable": not console.is_terminal, "transient": True, "auto_refresh": False}
    with Progress(*columns, TimeRemainingColumn(), **quiet) as bars:  # nothing is drawn while something is timed
        task = bars.add_task("benches", total=1.0)
        yield lambda text, share: bars.update(task, completed=share, description=text, refresh=True)


if __name__ == "__main__":
    sys.exit(main())
