"""A quantization code as it is written: what ``patch`` would try in it, and what its loops compute that we have fused.

Source is read, not run.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from hdrq.compat import classes
from hdrq.compat.conventions import NAMES, Unlike, roles_of

MIX = "QDrop's mix with a mask of its own: hdrq.ops.drop_mix(quantized, full, keep, rng), or keep= of a quantizer"
PENALTY = "AdaRound's rounding penalty: hdrq.compat.functional.adaround(…, beta=…) has it with the weights, in one pass"
DISTANCE = (
    "the distance of weights to others: hdrq.ops.source_distance, or hdrq.ops.quantize_weights for a block's layers"
)


def check(path: Path) -> Iterator[str]:
    """A line for each function and class whose name speaks of quantization, and for each fused form: its place, and
    what becomes of it.

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
            if verdict := _verdict(node):
                yield f"{file}:{node.lineno} {node.name}: {verdict}"  # type: ignore[attr-defined]
        for line, form in fused(tree):
            yield f"{file}:{line} {form}"


def fused(tree: ast.AST) -> list[tuple[int, str]]:
    """The lines at which a loop computes a term that we have fused, and its name here."""
    found = {(node.lineno, form) for node in ast.walk(tree) if (form := _fused(node))}  # type: ignore[attr-defined]
    return sorted(found)


def _verdict(node: ast.AST) -> str | None:
    """What becomes of a function, of an autograd function, or of a module with a forward pass of x alone."""
    if isinstance(node, ast.FunctionDef):
        return _tried(node.args, skip=0) if NAMES.search(node.name) else None
    if not isinstance(node, ast.ClassDef):
        return None
    forward = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "forward"), None)
    if forward is None:
        return None
    if any("Function" in ast.unparse(base) for base in node.bases):
        return _tried(forward.args, skip=1) if NAMES.search(node.name) else None
    if classes.NAMES.search(node.name) and len(_names(forward.args)) == 2:
        return "an object with a scale and a range of its own is compared at its first call"
    return None


def _names(arguments: ast.arguments) -> list[str]:
    every = (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)
    return [a.arg for a in (*every, *filter(None, (arguments.vararg, arguments.kwarg)))]


def _tried(arguments: ast.arguments, skip: int) -> str | None:
    names = _names(arguments)[skip:]
    if not names:
        return None
    try:
        roles = roles_of(names)
    except Unlike as reason:
        return f"left: {reason}"
    return f"tried on small numbers, as {', '.join(roles.values())}"


def _fused(node: ast.AST) -> str | None:
    if isinstance(node, ast.BinOp):
        powers = isinstance(node.op, ast.Sub) and _number(node.left) == 1 and _called(node.right) in ("pow", "**")
        return PENALTY if powers and {"abs", 0.5} <= _words(node.right) else None
    if not isinstance(node, ast.Call):
        return None
    if _called(node) == "where" and node.args and isinstance(node.args[0], ast.Compare):
        return MIX if _words(node.args[0]) & {"rand", "rand_like", "bernoulli"} else None
    if _called(node) == "norm":
        of = [*node.args[:1], *([node.func.value] if isinstance(node.func, ast.Attribute) else [])]
        differences = [o for o in of if isinstance(o, ast.BinOp) and isinstance(o.op, ast.Sub)]
        return DISTANCE if any("weight" in str(word) for d in differences for word in _words(d)) else None
    return None


def _called(node: ast.AST) -> str | None:
    """The last name of what is called; "**" of a power."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        return "**"
    if not isinstance(node, ast.Call):
        return None
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)


def _number(node: ast.AST) -> float | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)) else None


def _words(node: ast.AST) -> set:
    """All names and constants in an expression."""
    found: set = set()
    for part in ast.walk(node):
        if isinstance(part, ast.Name):
            found.add(part.id)
        elif isinstance(part, ast.Attribute):
            found.add(part.attr)
        elif isinstance(part, ast.Constant):
            found.add(part.value)
    return found
