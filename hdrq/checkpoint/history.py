"""How a quantized model came to be: what it was made of, and what that was made of, from a manifest alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

DEEPEST = 100  # generations that are told


@dataclass(frozen=True)
class Step:
    """A model and those it was made of. ``sha256`` is that of its file, or of a folder's files by name."""

    what: str
    sha256: str | dict[str, str] | None
    parents: tuple[Step, ...]

    def lines(self, depth: int = 0) -> Iterator[str]:
        """A line for each model, parents below and two spaces farther in."""
        digest = self.sha256
        if isinstance(digest, Mapping):
            digest = ", ".join(f"{name} {value}" for name, value in digest.items())
        yield f"{'  ' * depth}{self.what}{'' if digest is None else f'  ({digest})'}"
        for parent in self.parents:
            yield from parent.lines(depth + 1)


def history(manifest: Mapping[str, Any], sha256: Any = None, depth: int = 0) -> Step:
    """The history that a manifest tells.

    Args:
        sha256: of the model's own file, where it is known.
    """
    parents: list[Any] = []
    if isinstance(manifest.get("models"), list):
        parents = manifest["models"]
    elif isinstance(manifest.get("parent"), Mapping):
        parents = [manifest["parent"]]
    known = [parent for parent in parents if isinstance(parent, Mapping)] if depth < DEEPEST else []
    return Step(_what(manifest), sha256, tuple(history(p, p.get("sha256"), depth + 1) for p in known))


def _what(manifest: Mapping[str, Any]) -> str:
    merge, added, recipe, origin = (manifest.get(key) for key in ("merge", "added", "recipe", "origin"))
    calibrated, guided = (manifest.get(key) for key in ("calibrated", "post_merge"))
    if isinstance(merge, Mapping):
        own = (
            {key: fact for key, fact in calibrated.items() if key != "recipe"}
            if isinstance(calibrated, Mapping)
            else {}
        )
        return _said("merged", {key: fact for key, fact in merge.items() if not own or key == "weights"} | own)
    if isinstance(added, Mapping):
        changes = added.get("changes")
        count = f"{len(changes)} change{'s' * (len(changes) != 1)}" if isinstance(changes, list) else "a change"
        return _said(f"{count} added", {key: fact for key, fact in added.items() if key != "changes"})
    if isinstance(recipe, Mapping):
        facts = {"recipe": recipe.get("name"), "bits": manifest.get("bits"), "seed": manifest.get("seed")}
        if isinstance(guided, Mapping):
            return _said("merged in float and quantized", {"merge": guided.get("merge"), **facts})
        return _said("quantized", facts)
    if isinstance(origin, Mapping):
        return _said("read", {key: fact for key, fact in origin.items() if key != "sha256"})
    return "of unknown origin"


def _said(what: str, facts: Mapping[str, Any]) -> str:
    told = ", ".join(
        f"{name} {value}" for name, value in facts.items() if value not in (None, {}) and value is not False
    )
    return f"{what}: {told}" if told else what
