"""``python -m hdrq.cli``."""

from hdrq.cli import app

app()
