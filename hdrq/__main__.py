"""``python -m hdrq``: the command line."""

from hdrq.cli import app

app(prog_name="hdrq")
