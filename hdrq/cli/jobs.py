"""Several runs of ``hdrq quantize`` by one command: each in a process of its own, so many of them at once."""

from __future__ import annotations

import logging
import os
import signal
import threading
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

import torch

from hdrq.calibrate.cache import half_of_free
from hdrq.calibrate.progress import lines
from hdrq.calibrate.report import RunReport, report_of
from hdrq.checks import listed, plain
from hdrq.cli.terminal import line, show_log, status_of, warning_line
from hdrq.methods import job
from hdrq.methods.reconstruct.memory import keep_freed_memory

logger = logging.getLogger("hdrq")
THREADS = "OMP_NUM_THREADS"


@dataclass(frozen=True)
class Failure:
    """Why a run has no result, and the status of a command that ends with it."""

    message: str
    status: int


def check(runs: Mapping[str, job.Run]) -> None:
    """Refuse wrong settings of any run, before one begins.

    Raises:
        ValueError: names the runs, and what is wrong with each.
    """
    job.check_apart(runs)
    wrong = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the runs say them
        for name, run in runs.items():
            try:
                job.check(run)
            except Exception as error:
                if os.environ.get("HDRQ_TRACEBACK"):
                    raise
                wrong.append(f"{name}: {line(error)}")
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()  # the processes need it
    if wrong:
        raise ValueError(listed(wrong))


def carry_out(runs: Mapping[str, job.Run], jobs: int) -> Iterator[tuple[str, RunReport | Failure]]:
    """Each run's name and what came of it, as they end. A run that fails, or whose process is killed, stops no other.

    A run has the cores divided by the number of processes as threads, unless ``OMP_NUM_THREADS`` says how many, and
    half of the memory that is free now divided by the same for its cache. Where the block ends early, so do the runs.
    """
    jobs = min(jobs, len(runs))
    waiting = {name: _sharing(run, jobs) for name, run in runs.items()}
    running: dict[Any, tuple[str, SpawnProcess]] = {}  # by the connection that a process answers on
    try:
        with _threads(jobs):
            while waiting or running:
                while waiting and len(running) < jobs:
                    name = next(iter(waiting))
                    answer, process = _start(name, waiting.pop(name))
                    running[answer] = name, process
                for ready in wait(list(running)):
                    name, process = running.pop(ready)
                    yield name, _outcome(ready, process)
    finally:
        for _, process in running.values():
            process.terminate()
            process.join()


def _sharing(run: job.Run, jobs: int) -> job.Run:
    """The run with its part of the memory for caches."""
    if jobs == 1 or run.cache_bytes is not None:
        return run
    return replace(run, cache_bytes=min(half_of_free(torch.device(run.device)).values()) // jobs)


@contextmanager
def _threads(jobs: int) -> Iterator[None]:
    """Processes that are started in the block have as many threads as there are for each."""
    if jobs == 1 or THREADS in os.environ:
        yield
        return
    os.environ[THREADS] = str(max(1, torch.get_num_threads() // jobs))
    logger.info("%d processes at once, each with %s=%s", jobs, THREADS, os.environ[THREADS])
    try:
        yield
    finally:
        del os.environ[THREADS]


def _start(name: str, run: job.Run) -> tuple[Connection, SpawnProcess]:
    context = get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(name, run, logger.getEffectiveLevel(), theirs))
    process.start()
    theirs.close()  # so that ours ends with the process
    return ours, process


def _outcome(answer: Any, process: SpawnProcess) -> RunReport | Failure:
    """What a process sent, or how it ended without."""
    try:
        found = answer.recv()
    except (EOFError, OSError):  # nothing was sent, or a part
        process.join()
        code = process.exitcode or 0
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with status {code}"
        found = Failure(f"its process ended {how}; where memory is short, fewer jobs need less", 2)
    process.join()
    answer.close()
    return found


def _work(name: str, run: job.Run, level: int, answer: Connection) -> None:
    """Carry out a run in this process, and send its report, or why there is none."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all: the command ends its processes itself
    threading.Thread(target=_end_with_the_command, daemon=True).start()
    show_log(level)
    warnings.formatwarning = lambda message, *_, **__: warning_line(f"{name}: {message}")
    outcome: RunReport | Failure
    try:
        with keep_freed_memory():
            outcome = report_of(job.execute(run, lines(f"{plain(name)}:")))
    except Exception as error:
        if os.environ.get("HDRQ_TRACEBACK"):
            traceback.print_exc()
        outcome = Failure(line(error), status_of(error))
    answer.send(outcome)


def _end_with_the_command() -> None:
    """A killed command takes its runs along: ``--resume`` would meet them in their work folders."""
    wait([parent_process().sentinel])  # type: ignore[union-attr]  # it has one: it was started
    os._exit(1)
