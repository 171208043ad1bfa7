"""``python -m hdrq.compat check PATH``: what ``hdrq.compat.patch`` would try in a source tree. It is read, not run."""

from __future__ import annotations

import argparse
from pathlib import Path

from hdrq.compat.source import check


def main(arguments: list[str] | None = None) -> int:
    """Print what :func:`check` finds: 0, or 2 where there is no such path."""
    parser = argparse.ArgumentParser(prog="python -m hdrq.compat", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("check", help="a source tree").add_argument("path", type=Path, metavar="PATH")
    path = parser.parse_args(arguments).path
    try:
        for line in check(path):
            print(line)
    except FileNotFoundError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
