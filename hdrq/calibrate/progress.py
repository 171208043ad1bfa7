"""What a run tells while it lasts: steps for a callable, bars for a terminal, lines for a log, losses for a file."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from hdrq.checks import plain

logger = logging.getLogger("hdrq")
LOG_EVERY = 50  # iterations between two readings of the loss: each waits for the device


@dataclass(frozen=True)
class Step:
    """Where a reconstruction is: what the caller's ``progress`` is told."""

    block: str
    index: int  # of the block
    blocks: int
    iteration: int  # iterations of this block that are done
    iterations: int
    loss: float  # reconstruction loss at the last reading


def lines(description: str = "", what: str = "block") -> Callable[[Step], None]:
    """A callable that logs a line for each block, at level INFO of the logger ``hdrq``, which the command line shows.

    ``what`` is a step's outer unit, in one word.
    """

    def log(step: Step) -> None:
        if step.iteration == step.iterations:
            place = f"{description} {what} {step.index + 1} of {step.blocks}".strip()
            logger.info("%s, %s: loss %.4g", place, plain(step.block) or "model", step.loss)

    return log


@contextmanager
def bars(description: str = "", what: str = "block") -> Iterator[Callable[[Step], None]]:
    """A callable that shows steps as rich bars, or as :func:`lines` where standard error is no terminal or rich is
    missing.
    """
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        yield lines(description, what)
        return
    if not sys.stderr.isatty():
        yield lines(description, what)
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as shown:
        total = shown.add_task(description or f"{what}s")
        block = shown.add_task("")

        def show(step: Step) -> None:
            done = step.index * step.iterations + step.iteration
            title = f"{description} {what} {step.index + 1} of {step.blocks}".strip()
            shown.update(total, total=step.blocks * step.iterations, completed=done, description=title)
            text = f"{plain(step.block)}, loss {step.loss:.3g}"
            shown.update(block, total=step.iterations, completed=step.iteration, description=text)

        yield show
