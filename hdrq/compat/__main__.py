"""``python -m hdrq.compat check PATH``: what ``hdrq.compat.patch`` would try in a source tree. It is read, not run."""

from __future__ import annotations

import argparse
import ast
from collections.abc import Iterator
from pathlib import Path

from hdrq.compat.conventions import NAMES, Unlike, roles_of


def check(path: Path) -> Iterator[str]:
    """A line for each function whose name speaks of quantization: its place, and what becomes of it.

    Raises:
        FileNotFoundError: there is no such path.
    """
    if not path.exists():
        raise FileNotFoundError(f"PATH must be a file or a folder that is there, got {path}")
    for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
        try:
            tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError) as error:
            yield f"{file}: not read: {error}"
            continue
        for node in ast.iter_child_nodes(tree):
            if names := _arguments(node):
                yield f"{file}:{node.lineno} {node.name}: {_verdict(names)}"  # type: ignore[attr-defined]


def _arguments(node: ast.AST) -> list[str]:
    """Those of a function, or of the forward pass of an autograd function, whose name speaks of quantization."""
    if isinstance(node, ast.ClassDef) and any("Function" in ast.unparse(base) for base in node.bases):
        forward = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "forward"]
        names = [a.arg for a in (*forward[0].args.posonlyargs, *forward[0].args.args)][1:] if forward else []
    elif isinstance(node, ast.FunctionDef):
        names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    else:
        return []
    return names if NAMES.search(node.name) else []


def _verdict(names: list[str]) -> str:
    try:
        roles = roles_of(names)
    except Unlike as reason:
        return f"left: {reason}"
    return f"tried on small numbers, as {', '.join(roles.values())}"


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
