"""The command line, one file a command. It parses, shows progress and prints; the work is done elsewhere."""

import logging
import os
import sys
from typing import Annotated

from hdrq._version import __version__

try:
    import typer

    from hdrq.cli import (
        bench,
        demo,
        evaluate,
        export,
        import_,
        info,
        inspect,
        merge,
        parity,
        post_merge,
        qat,
        quantize,
        recipes,
        reproduce,
        sensitivity,
    )
    from hdrq.cli.terminal import Commands, show_log
except ImportError as error:
    sys.exit(f'hdrq: the command line needs {error.name}; pip install "hdrq[cli]"')

app = typer.Typer(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command()(info.info)
app.command()(quantize.quantize)
app.command()(sensitivity.sensitivity)
app.command()(recipes.recipes)
app.command()(merge.merge)
app.command("post-merge")(post_merge.post_merge)
app.command()(qat.qat)
app.command()(inspect.inspect)
app.command()(evaluate.evaluate)
app.command()(export.export)
app.command("import")(import_.import_)
app.command()(demo.demo)
app.command()(reproduce.reproduce)
app.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})(bench.bench)
app.command()(parity.parity)


for _stream in (sys.stdout, sys.stderr):
    if hasattr(_stream, "reconfigure"):
        _stream.reconfigure(errors="backslashreplace")  # a terminal without UTF-8 shows escapes, and no error


def _version(wanted: bool) -> None:
    if wanted:
        print(f"hdrq {__version__}")
        raise typer.Exit


@app.callback()
def hdrq(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress: results and errors alone.")] = False,
) -> None:
    """Quantizers for reconstruction loops, and a merge of quantized models that works on their integers."""
    show_log(logging.WARNING if quiet else logging.INFO)
    if os.environ.get("HDRQ_BACKEND"):
        from hdrq.backends.dispatch import of_process

        of_process()  # refuses a name that is none before any work
