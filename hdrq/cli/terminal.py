"""What commands share: the two consoles, and how an error ends any of them."""

from __future__ import annotations

import errno
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from typer.core import TyperGroup

from hdrq.checks import plain
from hdrq.errors import BackendError, MissingExtra

if TYPE_CHECKING:
    from hdrq.calibrate.report import RunReport

WIDE = 200  # columns of a pipe or a file, which tables fit whatever their names are
_terminal = sys.stdout is not None and sys.stdout.isatty()  # there is none where a shell has closed it
_width = None if _terminal or "COLUMNS" in os.environ else WIDE
console, errors = Console(width=_width), Console(stderr=True)

# What hdrq raises, with a message of its own.
OURS = (ValueError, TypeError, OSError, FloatingPointError, BackendError, MissingExtra)
LONGEST = 2000  # characters of a message
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Commands(TyperGroup):
    """Commands of which any error is one line on stderr; bad input ends with status 2, a loss that diverges with 1.

    With ``HDRQ_TRACEBACK`` in the environment the traceback is shown in place of that line.
    """

    def main(self, *args: Any, **options: Any) -> Any:
        if not options.get("standalone_mode", True) or os.environ.get("HDRQ_TRACEBACK"):
            return super().main(*args, **options)
        before, warnings.formatwarning = warnings.formatwarning, warning_line
        try:
            status = super().main(*args, **{**options, "standalone_mode": False}) or 0
            if sys.stdout is not None:
                sys.stdout.flush()
        except typer.Abort:
            status = 1
        except BrokenPipeError:
            status = 1
        except Exception as error:
            sys.stderr.write(f"hdrq: {line(error)}\n")  # at once: other processes may write there too
            status = status_of(error)
        finally:
            warnings.formatwarning = before
        _drop_what_cannot_be_written()
        if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun's: threads of gloo may abort an interpreter that winds down
            sys.stderr.flush()
            os._exit(status)
        sys.exit(status)


class Log(logging.StreamHandler):
    """Lines of the log on what standard error is when they come."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self):  # type: ignore[override]
        return sys.stderr


def show_log(level: int) -> None:
    """Show what the logger ``hdrq`` says, from a level on."""
    logger = logging.getLogger("hdrq")
    logger.handlers = [Log()]
    logger.setLevel(level)


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int, str], None]]:
    """A bar on the terminal while the block lasts; what is yielded takes layers done, of how many, and a name."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
    )
    with Progress(*columns, console=errors, disable=not errors.is_terminal, transient=True) as bars:
        task = bars.add_task(title, total=1)

        def show(done: int, total: int, name: str) -> None:
            bars.update(task, completed=done, total=total, description=plain(name))

        yield show


def tell_of_blocks(report: RunReport, workdir: Path | None) -> None:
    """Print what the layers or the blocks of a run came to, and plot its losses into its work folder, if it has one."""
    from hdrq.report.figures import write_losses
    from hdrq.report.tables import errors_table, layers_table

    if any(block.layers for block in report.blocks):
        console.print(layers_table(report))
    elif report.blocks:
        console.print(errors_table({report.recipe: report}, f"Loss: {report.recipe}"))
    if workdir is not None and report.losses:
        write_losses(report.losses, workdir / "losses.png")


def numbers(name: str, text: str | None) -> tuple[float, ...] | None:
    """An option of numbers between commas; None where it was not given.

    Raises:
        ValueError: it is not of that form.
    """
    try:
        return None if text is None else tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"{name} must be numbers between commas, got {text!r}") from error


def left_out(context: typer.Context, when: str, *names: str) -> None:
    """Refuse options that were given on the command line where nothing reads them.

    Args:
        context: of the command.
        when: ends the message: "with --like".
        names: parameters of the command, as its function has them.

    Raises:
        ValueError: names the first that was given.
    """
    options = {parameter.name: parameter.opts for parameter in context.command.params}
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            option = max(options[name], key=len).lstrip("-").replace("-", "_")
            raise ValueError(f"{option} must be left out {when}, got {context.params[name]}")


def status_of(error: Exception) -> int:
    """What a command ends with: 1 for a loss that diverged, 2 for bad input."""
    return 1 if isinstance(error, FloatingPointError) else 2


def line(error: Any) -> str:
    """An error in one line, as a command ends with it."""
    if hasattr(error, "format_message"):  # the options were wrong
        return plain(error.format_message())
    whole = isinstance(error, OSError) and error.strerror and error.filename is None  # a message without "[Errno 28]"
    text = plain(error.strerror if whole else str(error))[:LONGEST]
    if whole and error.errno in FULL and error.strerror == os.strerror(error.errno):  # of files hdrq says more
        text = f"standard output must be written to a disk with room, got {text}"
    if isinstance(error, ImportError) and not isinstance(error, MissingExtra):
        return f'{text}; pip install "hdrq[demo]" brings what commands need'
    if isinstance(error, OURS) and text:
        return text
    return f"{type(error).__name__}: {text}; HDRQ_TRACEBACK=1 shows where"


def warning_line(message: Any, *_: Any, **__: Any) -> str:
    return f"hdrq: warning: {plain(str(message))[:LONGEST]}\n"


def _drop_what_cannot_be_written() -> None:
    """Where standard output is closed or full, Python would complain once more at its end."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
