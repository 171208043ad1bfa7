"""``hdrq recipes``."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from hdrq.cli.terminal import console


def recipes(
    name: Annotated[str | None, typer.Argument(help="rtn, brecq, qdrop, hdrq, gptq or awq; none lists them.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print the recipes, or every knob of one: its value as the paper and as the released code have it, and its text.

    Any knob is a setting of hdrq quantize: --set name=value, or a line of its YAML file.
    """
    from dataclasses import fields

    from rich.table import Table

    from hdrq.recipes import NAMES, SOURCES, Recipe, recipe
    from hdrq.report.tables import shown

    if name is None:
        if as_json:
            print(json.dumps(SOURCES, indent=2))
            return
        table = Table(box=None, show_header=False)
        for each in NAMES:
            table.add_row(each, shown(SOURCES[each]))
        console.print(table)
        return
    presets = {preset: recipe(name, preset) for preset in ("paper", "official")}
    knobs: list[dict[str, Any]] = [
        {"knob": f.name, **{preset: getattr(plan, f.name) for preset, plan in presets.items()}, **f.metadata}
        for f in fields(Recipe)
        if f.name != "name"
    ]
    if as_json:
        print(json.dumps(knobs, indent=2))
        return
    table = Table(title=shown(SOURCES[name]), caption="official where it differs from paper")
    for head in ("knob", "paper", "official", ""):
        table.add_column(head, overflow="fold")
    for row in knobs:
        other = "" if row["official"] == row["paper"] else str(row["official"])
        table.add_row(row["knob"], shown(row["paper"]), shown(other), shown(row["text"]))
    console.print(table)
